"""Which weights are read: safetensors files alone. The rest are pickles, and unpickling can run code."""

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rm_recipe.errors import RecipeError

if TYPE_CHECKING:
    import torch

# Of a whole model, and of an adapter.
SAFE = {False: ("model.safetensors", "model.safetensors.index.json"), True: ("adapter_model.safetensors",)}
PICKLED = {False: ("pytorch_model.bin", "pytorch_model.bin.index.json"), True: ("adapter_model.bin",)}


def holds(name: str, file: str, revision: str = "main") -> bool:
    """Whether a folder or a Hub repository has a file; the Hub is asked once.

    Raises:
        OSError, httpx.HTTPError: the Hub has nothing under that name, or cannot be reached.
    """
    return (Path(name) / file).is_file() if Path(name).is_dir() else _on_hub(name, file, revision)


@cache
def _on_hub(name: str, file: str, revision: str) -> bool:
    from transformers.utils.hub import has_file

    return bool(has_file(name, file, revision))


def pickle_fault(name: str, revision: str = "main", *, adapter: bool = False) -> str:
    """What is wrong with a model or adapter whose weights are a pickle; else nothing.

    Raises:
        OSError, httpx.HTTPError: as `holds` does.
    """
    if any(holds(name, file, revision) for file in SAFE[adapter]):
        return ""
    for file in PICKLED[adapter]:
        if holds(name, file, revision):
            how = "PeftModel.from_pretrained(BASE, ...)" if adapter else "AutoModel.from_pretrained(...)"
            return (
                f"'{name}' has its weights in {file} alone, a pickle, which can run code when it is read, "
                f"and no {SAFE[adapter][0]}; if you trust it, convert it by transformers: `{how}` and "
                "`.save_pretrained(FOLDER)`, the tokenizer likewise"
            )
    return ""


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
    from transformers.utils import cached_file

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
