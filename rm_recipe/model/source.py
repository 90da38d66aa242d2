"""A base in a folder or on the Hub: its configuration, an SFT adapter's, and its safetensors files."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from transformers import (
    AutoConfig,
)
from transformers.utils import cached_file

from rm_recipe.errors import RecipeError, one_line
from rm_recipe.recipe.weights import SAFE, holds, pickle_fault

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


def check_safetensors(name: str, revision: str = "main", *, adapter: bool = False) -> None:
    """Refuses a model or adapter whose weights are a pickle, in a folder or on the Hub.

    Raises:
        RecipeError: saying how to convert it.
    """
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    fault = ""
    with suppress(OSError, httpx.HTTPError):  # who loads it next says what is wrong with the name
        fault = pickle_fault(name, revision, adapter=adapter)
    if fault:
        raise RecipeError(fault)


def saved_as(
    name: str, prefixes: tuple[str, ...], revision: str = "main"
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """The tensors of a model whose names start so, in the precision that its files have.

    Raises:
        OSError: its weights are in files of other names.
    """
    from safetensors import safe_open

    single, index = SAFE[False]
    try:
        cached_file(name, single, revision=revision)
        files = {single}
    except OSError:
        shards = json.loads(Path(str(cached_file(name, index, revision=revision))).read_text())["weight_map"]
        files = {file for key, file in shards.items() if key.startswith(prefixes)}
    for file in sorted(files):
        with safe_open(cached_file(name, file, revision=revision), framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                if key.startswith(prefixes):
                    yield key, tensors.get_tensor(key)


def load_config(name: str, revision: str = "main") -> Any:
    """The model's configuration, of an adapter without one its base's.

    Raises:
        RecipeError: nothing can be loaded under that name.
    """
    adapter = adapter_config(name, revision)
    try:
        if adapter is not None and not holds(name, "config.json", revision):
            name, revision = adapter.base_model_name_or_path, adapter.revision or "main"
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"'model_name_or_path: {name}' cannot be loaded: {one_line(error)}") from None


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
