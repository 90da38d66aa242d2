"""From a base model to a reward model: one label, a head that is safe, 4 bits; and a trained one back.

The reward head is what goes wrong most often (PEFT forgets it, quantisation rounds it, bf16 makes
its rewards tie), so here it is every parameter that the base checkpoint did not hold, kept in
fp32, trained in full and saved with the adapter.
"""

import copy
import gc
import re
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import PartialState
from peft import PeftConfig, PeftModel, TaskType, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import cached_file, logging
from trl import ModelConfig, get_quantization_config

from rm_recipe.errors import RecipeError
from rm_recipe.files import pickle_fault
from rm_recipe.model import lora, row_attention
from rm_recipe.model.head import head_names, initialise, outermost, saved_tensors, to_float32
from rm_recipe.model.tokenizer import check_lengths

LABEL = "reward"
# XLNet's classifier reads its last token, padding or not, FNet has no mask, and the others' are not tight.
# (Those of encoder-decoders, as BART's, want as many EOS in every conversation of a batch.)
READ_PADDING = ("convbert", "fnet", "nystromformer", "xlnet", "yoso")


def check_base(base: Any, config: ModelConfig, max_length: int | None) -> None:
    """Refuse by a base's configuration alone what training could not use, before any data is read.

    Args:
        base: its configuration, as `lora.load_config` gives it.

    Raises:
        RecipeError: it has too few positions, transformers has no classifier of its kind or one whose
            rewards depend on their batch, it comes quantised and would be trained in full, or LoRA's modules
            are not in it.
    """
    name = str(config.model_name_or_path)
    named = f"'model_name_or_path: {name}'"
    classifier = outline(base, name, config.attn_implementation)
    check_lengths(classifier, max_length, name)
    if base.is_encoder_decoder or base.model_type in READ_PADDING:
        raise RecipeError(
            f"{named}: the rewards of this {base.model_type} would depend on the batch that they are in; "
            "take a base of another kind, modernbert or deberta-v2 for one"
        )
    if config.use_peft:
        lora.check_target_modules(classifier, config)
        lora.add_lora(classifier, config, head_names(classifier), autocast=False)  # or PEFT refuses it
    elif hasattr(base, "quantization_config"):
        raise RecipeError(f"{named} comes quantised, so it cannot be trained in full: set 'use_peft: true'")


def outline(base: Any, name: str, attn_implementation: str | None = None) -> PreTrainedModel:
    """Build the one-label classifier of a configuration, without weights.

    Raises:
        RecipeError: transformers has none of its kind, or not with this attention.
    """
    if type(base) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise RecipeError(
            f"'model_name_or_path: {name}': transformers {transformers.__version__} has no sequence "
            f"classifier for '{base.model_type}'; take another base, a llama, qwen3 or modernbert for one"
        )
    base = copy.deepcopy(base)
    base.num_labels = 1
    with lora.readable(f"'{name}' cannot be loaded as a classifier"), torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(base, attn_implementation=attn_implementation)


def load_base(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[PreTrainedModel, list[str]]:
    """Load the base model as a one-label classifier with a fresh head.

    Args:
        config: TRL's; `dtype`, `load_in_4bit` and the rest are applied as they stand.
        seed: of the head's initial weights.

    Returns:
        the model, and the names of the modules to be trained in full: the head, and whatever else
        the base checkpoint did not hold.

    Raises:
        RecipeError: the model cannot be loaded, or its head is quantised.
    """
    name, revision = str(config.model_name_or_path), config.model_revision
    kwargs: dict[str, Any] = {"num_labels": 1, "attn_implementation": config.attn_implementation}
    # What is trained is fp32: in bf16 a step of 1e-5 leaves five of six weights as they are.
    dtype = getattr(torch, str(config.dtype), "auto") if config.use_peft else torch.float32
    with as_one_model(name, revision) as folder:
        if hasattr(lora.load_config(folder, revision), "quantization_config"):
            kwargs["device_map"] = PartialState().device
        elif quantization := get_quantization_config(config):
            # Without weights first: which modules are new has to be known, or the head is quantised too.
            empty, new = _load(folder, revision, device_map="meta", **kwargs)
            quantization.llm_int8_skip_modules = outermost([*new, *head_names(empty)])
            kwargs |= {"quantization_config": quantization, "device_map": PartialState().device}
        model, new = _load(folder, revision, dtype=dtype, **kwargs)
    lora.check_head_is_whole(model, new, name)
    model.name_or_path = model.config._name_or_path = name  # where the adapter will look for its base
    prepare_for_rewards(model, tokenizer, new)
    torch.manual_seed(seed)
    for module_name in outermost(new):  # a head that is there, as in a reward model, is kept
        initialise(model, module_name)
    return model, outermost([*new, *head_names(model)])


def check_safetensors(name: str, revision: str = "main", *, adapter: bool = False) -> None:
    """Refuse a model or adapter whose weights are a pickle, in a folder or on the Hub.

    Raises:
        RecipeError: saying how to convert it, or why nobody can look.
    """
    with lora.readable(f"'{name}' cannot be loaded"):
        if fault := pickle_fault(name, revision, adapter=adapter):
            raise RecipeError(fault)


def _load(name: str, revision: str = "main", **kwargs: Any) -> tuple[PreTrainedModel, list[str]]:
    """Load the classifier; also give the modules with parameters that its checkpoint lacks.

    The head of a classifier with more labels is one of these.
    """
    # Said to be False, transformers does not ask at the terminal whether to run a model's own code.
    kwargs |= {"revision": revision, "trust_remote_code": False, "use_safetensors": True}
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    check_safetensors(name, revision)
    with lora.readable(f"'{name}' cannot be loaded as a classifier"), quietly():
        model, info = AutoModelForSequenceClassification.from_pretrained(name, **kwargs)
    heads = rf"^({'|'.join(map(re.escape, head_names(model)))})\."
    mismatched = [key for key, *_ in info["mismatched_keys"]]
    lacking = sorted([*info["missing_keys"], *mismatched])
    # Of a body a language model has all but what reads a classifier's reward.
    other = [key for key in lacking if not re.search(heads, key) and "pooler" not in key]
    if other:
        raise RecipeError(f"'{name}': its weights do not fit its config.json ({', '.join(other[:3])})")
    if model.device.type != "meta":  # a head was loaded in the body's precision
        folder = Path(str(cached_file(name, "config.json", revision=revision))).parent
        kept = {
            key: value.to(model.device)
            for key, value in saved_tensors(folder, heads).items()
            if key not in mismatched and value.is_floating_point()  # not quantised
        }
        model.load_state_dict(kept, strict=False, assign=True)
    return model, sorted({key.rpartition(".")[0] for key in lacking})


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bars and its report that a head is new: that is wanted, or refused by us."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def prepare_for_rewards(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, modules_to_save: Sequence[str] = ()
) -> None:
    """Pad token, label, fp32 head and the forward that reads rewards at given positions.

    Args:
        modules_to_save: which belong to the head, too; BERT's new pooler lies inside its body.
    """
    model.config.id2label, model.config.label2id = {0: LABEL}, {LABEL: 0}
    model.config.problem_type = "regression"  # keeps `pipeline` from applying a sigmoid
    vars(model.config).pop("auto_map", None)  # would send who loads the result to code of the base's own
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "use_cache"):  # keys and values are for who generates; a reward reads a text once
            config.use_cache = False
    # On Hopper and later torch prefers cuDNN's attention, which takes a second to plan for each shape of a
    # batch that it has not seen yet, and nearly every batch has one of its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    lora.keep_layout(model)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    for name in outermost([*head_names(model), *modules_to_save]):
        to_float32(model, name)
    add_reward_positions(model)


def is_decoder(model: nn.Module) -> bool:
    """Whether a classifier is a causal model with a `score` head, which can be read anywhere in a row."""
    return isinstance(getattr(model, "score", None), nn.Module)


def add_reward_positions(model: PreTrainedModel) -> None:
    """Give a decoder's classifier a forward that returns rewards at given positions.

    Called with `last_token_positions` (responses, 2), rows and columns, it runs the backbone on the rows and
    the head on those positions alone; without, it is the original. Everything calls the model as
    Accelerate hands it over (wrapped), so gradients are synchronised and autocast applies. An
    encoder's head reads one fixed position, so it keeps its forward.
    """
    if not is_decoder(model):
        return
    original: Callable[..., Any] = model.forward

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        last_token_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Rewards (responses, 1) at these positions as `logits`, or what the model gives without them."""
        if last_token_positions is None:
            return original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        kwargs["use_cache"] = False
        if attention_mask is not None and row_attention.by_block(self):
            row_attention.announce_rows(attention_mask)
        elif attention_mask is not None:
            attention_mask = mask = row_attention.row_mask(attention_mask)
            if self.config._attn_implementation == "eager":
                lowest = torch.finfo(self.dtype).min  # eager attention adds what it is given
                attention_mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, lowest)
        body = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = body.last_hidden_state[last_token_positions[:, 0], last_token_positions[:, 1]]
        return SequenceClassifierOutput(logits=self.score(hidden))

    model.forward = types.MethodType(forward, model)


def load_trained(
    path: str, tokenizer: PreTrainedTokenizerBase, dequantize_on: torch.device | None = None
) -> nn.Module:
    """A trained reward model for scoring: a run's `model/`, a merged export, or any one-label model.

    Args:
        dequantize_on: put the adapter of a quantised base on the same base de-quantised (the weights that it
            was trained on, as numbers that it can be merged into), which is done and left on this device.

    Raises:
        RecipeError: it cannot be loaded, has not exactly one label, or lacks a trained head.
    """
    gc.collect()  # frees models that were dropped: with its own forward bound to it each is a circle
    if adapter := lora.adapter_config(path):
        return _load_adapter(path, adapter, tokenizer, dequantize_on)
    config = lora.load_config(path)
    if config.num_labels != 1:
        kind = ", ".join(config.architectures or ["unknown architecture"])
        what = "is a language model" if "LM" in kind else f"has {config.num_labels} labels"
        raise RecipeError(f"{path} ({kind}) {what}; a reward model has a head with one label")
    model, new = _load(path, dtype="auto")
    if new:
        raise RecipeError(f"{path} has no trained head ({', '.join(new)} missing): not a reward model")
    prepare_for_rewards(model, tokenizer)
    return model.eval()


def _load_adapter(
    path: str, adapter: PeftConfig, tokenizer: PreTrainedTokenizerBase, dequantize_on: torch.device | None
) -> PeftModel:
    if adapter.task_type != TaskType.SEQ_CLS:
        raise RecipeError(f"{path} is the adapter of a language model, not of a reward model")
    check_safetensors(path, adapter=True)
    # By the base's own config: the saved one may have a pad token more than the base's checkpoint,
    # and names a quantisation that the checkpoint does not have.
    config = lora.load_config(path)
    name, revision = str(adapter.base_model_name_or_path), adapter.revision or "main"
    kwargs: dict[str, Any] = {"num_labels": 1, "dtype": config.dtype or "auto"}
    quantised = config.to_dict().get("quantization_config")
    if quantised:
        kwargs["device_map"] = PartialState().device
    with as_one_model(name, revision) as folder:
        comes_quantised = hasattr(lora.load_config(folder, revision), "quantization_config")
        if quantised and not comes_quantised:
            kwargs["quantization_config"] = transformers.BitsAndBytesConfig.from_dict(quantised)
        model, new = _load(folder, revision, **kwargs)
    trained = tuple(f"{part}." for part in adapter.modules_to_save or [])
    untrained = [part for part in new if not f"{part}.".startswith(trained)]
    if untrained:
        raise RecipeError(f"{path} has no trained {', '.join(untrained)}: its rewards would be random")
    model.config.rm_recipe = getattr(config, "rm_recipe", None)
    if quantised and dequantize_on:
        lora.dequantize(model, dequantize_on)
    prepare_for_rewards(model, tokenizer, new)
    with lora.readable(f"the adapter '{path}' cannot be loaded"):
        wrapped, saved = _with_adapter(model, path)
    lora.train_in_float32(wrapped)
    set_peft_model_state_dict(wrapped, saved)  # again: what is fp32 now was read in the base's precision
    lora.keep_activations_in_half(wrapped)
    return wrapped.eval()


def _with_adapter(
    model: PreTrainedModel, name: str, revision: str = "main"
) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model with an adapter, from a folder or the Hub, and the adapter's saved weights.

    Raises:
        RecipeError: they are not those of such an adapter on this model, which PEFT passes over.
    """
    saved = load_peft_weights(name, str(model.device), revision=revision)
    _fit_embeddings(model, saved)
    wrapped = PeftModel.from_pretrained(model, name, revision=revision)
    loaded = set_peft_model_state_dict(wrapped, saved)
    lost = [*loaded.unexpected_keys, *(key for key in loaded.missing_keys if ".lora_" in key)]
    if lost:
        raise RecipeError(f"the adapter '{name}' does not fit its base ({', '.join(lost[:3])})")
    return wrapped, saved


def _fit_embeddings(model: PreTrainedModel, saved: dict[str, Tensor]) -> None:
    """Give a base as many embeddings as are saved beside its adapter, which may be more than it has."""
    layer = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is layer)
    for part in ("", "base_layer.", "token_adapter.base_layer."):  # the latter where they have adapters
        size = len(saved.get(f"base_model.model.{name}.{part}weight", ()))
        if size > layer.num_embeddings:
            model.resize_token_embeddings(size)


def autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """The precision in which the model computes: its body's, where that is a half precision."""
    weight = next(model.parameters())
    half = weight.dtype in lora.HALF
    return torch.autocast(weight.device.type, weight.dtype if half else None, enabled=half)


# --- an SFT adapter as the start: merged into its base first -----------------------------------
# InstructGPT initialises the reward model from the SFT model (arXiv 2203.02155, section 3.5), and what
# week 1 of a course leaves behind is often a LoRA adapter. A reward model needs its own adapter on a plain
# model, so the SFT adapter becomes part of the base, each time it is loaded.


@contextmanager
def as_one_model(name: str, revision: str = "main") -> Iterator[str]:
    """Within it, a name under which transformers finds a whole model.

    That is `name` itself, or for an SFT adapter a temporary folder with the merged model: on disk,
    because a model can only be quantised while it is loaded.

    Raises:
        RecipeError: the adapter is not one of a language model, it or its base is a pickle, or
            its base cannot be loaded.
    """
    adapter = lora.sft_adapter(name, revision)
    if adapter is None:
        yield name
        return
    with tempfile.TemporaryDirectory(prefix="rm-recipe-sft-", ignore_cleanup_errors=True) as folder:
        with lora.readable(f"the SFT adapter '{name}' cannot be loaded"):
            # Not in the format of a base that came quantised, which transformers cannot go back to.
            _merge(name, revision, adapter).save_pretrained(folder, save_original_format=False)
        yield folder


def _merge(name: str, revision: str, adapter: PeftConfig) -> PreTrainedModel:
    base_name, base_revision = str(adapter.base_model_name_or_path), adapter.revision or "main"
    check_safetensors(name, revision, adapter=True)
    check_safetensors(base_name, base_revision)
    safely = {"use_safetensors": True, "trust_remote_code": False, "dtype": "auto"}
    base = transformers.AutoModelForCausalLM.from_pretrained(base_name, revision=base_revision, **safely)
    if hasattr(base.config, "quantization_config"):  # SFT was QLoRA on a base that comes quantised
        lora.dequantize(base)
    model, _ = _with_adapter(base, name, revision)
    return cast(PreTrainedModel, model.merge_and_unload(progressbar=False))
