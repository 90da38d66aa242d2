"""Starting from an SFT model that is an adapter on a base: it is merged into its base first.

InstructGPT initialises the reward model from the SFT model (arXiv 2203.02155, section 3.5), and what
week 1 of a course leaves behind is often a LoRA adapter. A reward model needs its own adapter on a plain
model, so the SFT adapter becomes part of the base, each time it is loaded.
"""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rm_recipe.errors import RecipeError, one_line
from rm_recipe.model import quantisation
from rm_recipe.model.source import check_safetensors, holds

if TYPE_CHECKING:
    from peft import PeftConfig


def adapter_config(name: str, revision: str = "main") -> "PeftConfig | None":
    """What PEFT knows of an adapter, in a folder or on the Hub; None where `name` is no adapter.

    Raises:
        RecipeError: it cannot be read, or the Hub has nothing under that name.
    """
    try:
        if not holds(name, "adapter_config.json", revision):
            return None
        from peft import PeftConfig

        return PeftConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, TypeError, KeyError, httpx.HTTPError) as error:
        raise RecipeError(f"'model_name_or_path: {name}' cannot be loaded: {one_line(error)}") from None


def sft_adapter(name: str, revision: str = "main") -> "PeftConfig | None":
    """`adapter_config` of a language model's adapter.

    Raises:
        RecipeError: it is a classifier's.
    """
    adapter = adapter_config(name, revision)
    if adapter is not None and adapter.task_type == "SEQ_CLS":
        raise RecipeError(
            f"'model_name_or_path: {name}' is the adapter of a classifier, perhaps of a reward model; to "
            "train that further, start from its export"
        )
    return adapter


@contextmanager
def as_one_model(name: str, revision: str = "main", trust_remote_code: bool = False) -> Iterator[str]:
    """Within it, a name under which transformers finds a whole model.

    That is `name` itself, or for an SFT adapter a temporary folder with the merged model: on disk,
    because a model can only be quantised while it is loaded.

    Raises:
        RecipeError: the adapter is not one of a language model, it or its base is a pickle, or
            its base cannot be loaded.
    """
    adapter = sft_adapter(name, revision)
    if adapter is None:
        yield name
        return
    if adapter.is_prompt_learning:
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        raise RecipeError(f"the SFT adapter '{name}' is of type {kind}, which cannot be merged into its base")
    with tempfile.TemporaryDirectory(prefix="rm-recipe-sft-", ignore_cleanup_errors=True) as folder:
        try:
            merged = _merge(name, revision, adapter, trust_remote_code)
            # Not in the format of a base that came quantised, which transformers cannot go back to.
            merged.save_pretrained(folder, save_original_format=False)
            del merged
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            raise RecipeError(f"the SFT adapter '{name}' cannot be loaded: {one_line(error)}") from None
        yield folder


def _merge(name: str, revision: str, adapter: "PeftConfig", trust_remote_code: bool) -> PreTrainedModel:
    from peft import PeftModel

    check_safetensors(name, revision, adapter=True)
    base_name, base_revision = str(adapter.base_model_name_or_path), adapter.revision or "main"
    check_safetensors(base_name, base_revision)
    base = AutoModelForCausalLM.from_pretrained(
        base_name,
        revision=base_revision,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    if hasattr(base.config, "quantization_config"):  # SFT was QLoRA on a base that comes quantised
        quantisation.dequantize(base)
    if holds(name, "tokenizer_config.json", revision):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        size = len(tokenizer)
        if size > base.get_input_embeddings().num_embeddings:  # SFT has added tokens
            base.resize_token_embeddings(size)
    merged: PreTrainedModel = PeftModel.from_pretrained(base, name, revision=revision).merge_and_unload(
        progressbar=False
    )
    return merged
