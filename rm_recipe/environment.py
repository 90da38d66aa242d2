"""What the libraries read from the environment, settled before they are imported."""

import atexit
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path


def set_environment() -> None:
    """Settings of libraries, unless the user has made them, and caches that can be written."""
    # TRL 1.16 sets `gradient_checkpointing`, which transformers 5.23 is about to rename.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    # PEFT looks for the config of an SFT adapter's base beside the adapter.
    warnings.filterwarnings("ignore", message="Could not find a config file in .* will assume that")
    # bitsandbytes 0.50 looks for an optional CPU kernel at import and logs that it is not there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # On a CPU, oneDNN keeps 1,024 compiled kernels, one for each shape; rows of ever-changing
    # length fill that with gigabytes (7.0 GB after 90 steps of the offline recipe) for no gain.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    replace_unwritable_caches()


def replace_unwritable_caches() -> None:
    """Gives libraries a folder for this process where theirs cannot be written, and says so.

    Downloaded models stay where they are: those may well lie in a place that is only read.
    """
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():  # a user without a home, of whom libraries would make a folder called ~
        home = Path(tempfile.mkdtemp(prefix="rm-recipe-home-"))
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HOME"] = str(home)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    folders = {
        "HF_DATASETS_CACHE": hub / "datasets",
        "HF_EVALUATE_CACHE": hub / "evaluate",
        "HF_METRICS_CACHE": hub / "metrics",
        "MPLCONFIGDIR": config / "matplotlib",
    }
    for name, default in folders.items():
        folder = Path(os.environ.get(name) or default).expanduser()
        if _writable(folder):
            continue
        instead = tempfile.mkdtemp(prefix="rm-recipe-cache-")
        atexit.register(shutil.rmtree, instead, ignore_errors=True)
        os.environ[name] = instead
        if name == "HF_DATASETS_CACHE":
            print(
                f"rm-recipe: {folder} cannot be written, so what is made of the data is kept for this run "
                "only; HF_HOME can name another folder",
                file=sys.stderr,
                flush=True,
            )


def _writable(folder: Path) -> bool:
    """Whether a folder is there to be written, or can be made."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    try:
        return there is not None and there.is_dir() and _can_make_a_file_in(there)
    except OSError:
        return False


def _can_make_a_file_in(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder):
        return True
