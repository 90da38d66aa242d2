"""Which weights are read: safetensors files alone. The rest are pickles, and unpickling can run code."""

from functools import cache
from pathlib import Path

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
