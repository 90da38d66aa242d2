"""A base in a folder or on the Hub: its configuration, an SFT adapter's, and its safetensors files."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from peft import PeftConfig
from transformers import AutoConfig

from rm_recipe.errors import RecipeError, one_line
from rm_recipe.files import LFS_POINTER, holds, is_lfs_pointer, pickle_fault


def check_safetensors(name: str, revision: str = "main", *, adapter: bool = False) -> None:
    """Refuse a model or adapter whose weights are a pickle, in a folder or on the Hub.

    Raises:
        RecipeError: saying how to convert it.
    """
    fault = ""
    with suppress(OSError, httpx.HTTPError):  # who loads it next says what is wrong with the name
        fault = pickle_fault(name, revision, adapter=adapter)
    if fault:
        raise RecipeError(fault)


def load_config(name: str, revision: str = "main") -> Any:
    """Load a model's configuration, of an adapter without one its base's.

    Raises:
        RecipeError: nothing can be loaded under that name.
    """
    adapter = adapter_config(name, revision)
    try:
        if adapter is not None and not holds(name, "config.json", revision):
            name, revision = adapter.base_model_name_or_path, adapter.revision or "main"
        # Left unsaid, transformers asks at the terminal whether to run a model's own code.
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from None


def adapter_config(name: str, revision: str = "main") -> PeftConfig | None:
    """What PEFT knows of an adapter, in a folder or on the Hub; None where `name` is no adapter.

    Raises:
        RecipeError: it cannot be read, the Hub has nothing under that name, or a file of the folder is not
            there but a Git LFS pointer to it.
    """
    for path in filter(Path.is_file, sorted(Path(name).glob("*"))):
        if is_lfs_pointer(path):
            raise RecipeError(f"'{path}' {LFS_POINTER}")
    try:
        found = holds(name, "adapter_config.json", revision)
        return PeftConfig.from_pretrained(name, revision=revision) if found else None
    except (OSError, ValueError, TypeError, KeyError, httpx.HTTPError) as error:
        raise _not_loaded(name, error) from None


def _not_loaded(name: str, error: Exception) -> RecipeError:
    return RecipeError(f"'model_name_or_path: {name}' cannot be loaded: {one_line(error)}")


def sft_adapter(name: str, revision: str = "main") -> PeftConfig | None:
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
