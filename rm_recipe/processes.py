"""Several processes: who speaks, who waits for whom, and how work is shared among them."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from rm_recipe.errors import TrainingError

logger = logging.getLogger("rm_recipe")

# How one says that there was no memory: CUDA's allocator, its driver, cuBLAS, torch's on a CPU, Python, C++.
NO_MEMORY = "OutOfMemoryError|out of memory|ALLOC_FAILED|can't allocate memory|MemoryError|bad_alloc"


def processes() -> Any:
    """Accelerate's `PartialState`: this process's device, and its place among those that were launched.

    Made anew without `cpu`, it would take each of several processes on a CPU for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def this_device() -> torch.device:
    """The accelerator of this process, else the CPU.

    Of several it is the one that was chosen, by Accelerate for one, or the launcher's: `LOCAL_RANK`.
    """
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return torch.device("cpu")
    index, rank = torch.accelerator.current_device_index(), int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device(kind.type, index or (rank if rank < torch.accelerator.device_count() else 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left; a kernel that kills a process on a CPU raises nothing."""
    said = f"{type(error).__name__}: {error}"
    return isinstance(error, RuntimeError | MemoryError) and re.search(NO_MEMORY, said) is not None


def say(message: str) -> None:
    """Log a line at INFO, once however many processes there are; the command line prints it as it is."""
    if PartialState().is_main_process:
        logger.info(message)


def warn(message: str) -> None:
    """Log a line at WARNING, likewise; the command line prints it after `warning: `."""
    if PartialState().is_main_process:
        logger.warning(message)


def follow_log_level(training: Any) -> None:
    """Let a recipe's `log_level` decide what is told; its default, `passive`, leaves that as it is."""
    if training.log_level != "passive":
        logger.setLevel(training.get_process_log_level())


@contextmanager
def main_process_first() -> Iterator[None]:
    """Accelerate's own, with `wait_for_main_process` in place of its barrier."""
    if not PartialState().is_main_process:
        wait_for_main_process()
    yield
    if PartialState().is_main_process:
        PartialState().wait_for_everyone()


def wait_for_main_process() -> None:
    """A barrier; where the main process has ended, its message is the one to read.

    Raises:
        TrainingError: it has.
    """
    try:
        PartialState().wait_for_everyone()
    except RuntimeError as error:
        raise TrainingError(f"the main process has ended or takes too long: {error}") from None


def each_once(items: Sequence[Any], function: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """What `function` makes of the items, in their order, each item given to one of the processes.

    Every process gets all results. With one process this is `function(items)`.
    """
    state = PartialState()
    own = range(state.process_index, len(items), state.num_processes)
    made = zip(own, function([items[i] for i in own]), strict=True)
    return [result for _, result in sorted(gather_object(list(made)), key=lambda numbered: numbered[0])]
