"""A pass over a data set: `datasets.map`, cached by content, in several processes where that pays."""

import inspect
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import datasets as hf_datasets
from datasets.fingerprint import Hasher
from multiprocess import TimeoutError as PoolTimeoutError

from rm_recipe.errors import TrainingError

LARGE = 20_000  # rows from which starting more processes takes less time than they save


def run_pass(
    rows: hf_datasets.Dataset,
    function: Callable[..., dict[str, Any]],
    description: str,
    features: dict[str, Any],
    depends_on: Sequence[Any],
    num_proc: int | None = None,
    **options: Any,
) -> hf_datasets.Dataset:
    """The rows with what `function` makes of them, computed once and memory-mapped.

    Args:
        depends_on: besides the rows, what the result depends on: settings, and modules for the
            source of their code.
        num_proc: `dataset_num_proc`; by default one process, and for a large set one for each core.
        options: more of `datasets.Dataset.map`'s.

    Raises:
        TrainingError: a process was killed.
    """
    if not len(rows):  # which `map` would leave without their new columns
        return hf_datasets.Dataset.from_dict({name: [] for name in features}, hf_datasets.Features(features))
    parts = [inspect.getsource(part) if isinstance(part, ModuleType) else part for part in depends_on]
    try:
        return rows.map(
            function,
            desc=description,
            features=hf_datasets.Features(features),
            new_fingerprint=Hasher.hash([rows._fingerprint, options, parts]),
            num_proc=processes(len(rows), num_proc),
            **options,
        )
    except PoolTimeoutError as error:
        # datasets 5.2 waits for its processes on the way out of Ctrl-C, and fails at that.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise TrainingError(
            f"{description.lower()}: a process was killed, perhaps for want of memory; set "
            "'dataset_num_proc: 1'"
        ) from None


def processes(rows: int, wanted: int | None) -> int | None:
    """How many processes work on so many rows."""
    if wanted is not None or rows < LARGE:
        return wanted
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
