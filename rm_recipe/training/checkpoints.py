"""Checkpoints that a run can be resumed from exactly, and how to tell that one is whole.

Trainer writes a checkpoint file by file, so a kill, a power cut or a full disk may leave half of one
under the name of a whole one. The manifest is written last and by renaming: a checkpoint without it, or
with another content than it says, does not count, and the one before is used.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    IntervalStrategy,
    rotate_checkpoints,
    sort_checkpoints,
)

from rm_recipe.errors import INTERRUPTS, Interrupted, RecipeError, TrainingError, one_line
from rm_recipe.files import read_json, sha256, write_json
from rm_recipe.model.memory import peak_memory, reset_peak_memory
from rm_recipe.processes import is_out_of_memory

MANIFEST = "manifest.json"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest step first, whole or not."""
    return [Path(path) for path in reversed(sort_checkpoints(str(run)))]


def write_manifest(checkpoint: Path, content: Mapping[str, Any]) -> None:
    """Mark a checkpoint as whole: SHA-256 and size of each of its files, and `content`.

    The files' bytes are on the disk before, and not only in memory, as a power cut would show.
    """
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(checkpoint))] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    write_json(checkpoint / MANIFEST, {**content, "files": files})


def fault_of(checkpoint: Path) -> str | None:
    """Why a checkpoint does not count, None if it is as it was when it was finished."""
    if not (checkpoint / MANIFEST).is_file():
        return "it was not finished"
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
    except (RecipeError, KeyError):
        return f"its {MANIFEST} cannot be read"
    for name, known in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != known["bytes"] or sha256(path) != known["sha256"]:
            return f"{name} is not as it was written"
    return None


def newest_whole(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that counts, if any, and the newer ones that do not, with their faults."""
    faulty: dict[Path, str] = {}
    for checkpoint in checkpoints(run):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, faulty
        faulty[checkpoint] = fault
    return None, faulty


def newest_manifest(run: Path) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint that counts."""
    checkpoint, _ = newest_whole(run)
    return read_json(checkpoint / MANIFEST) if checkpoint else None


class Checkpoints(TrainerCallback):
    """Finish each checkpoint with its manifest, and end training where a signal has asked for it.

    Older checkpoints are removed when the new one is whole, not before as Trainer would (so its own
    `save_total_limit` is None): until then the one before is all there is. Of a run that ends with its best
    checkpoint, that one is kept besides.

    The manifest also keeps what Trainer and TRL have counted since the last log and forget on resuming:
    with it, a resumed run logs the same losses, and knows what the whole of it took.

    Args:
        trainer: the one that this is a callback of.
        identity: what a run may not be resumed without: data, number of processes.
        resumed: the manifest of the checkpoint that training goes on from.
        limit: how many checkpoints are kept; None for all.
    """

    def __init__(
        self, trainer: Any, identity: Mapping[str, Any], resumed: Mapping[str, Any] | None, limit: int | None
    ) -> None:
        self._trainer, self._identity, self._resumed, self._limit = trainer, identity, resumed, limit
        self._stopping = False
        self._began = time.monotonic()
        reset_peak_memory()

    def cost(self) -> dict[str, Any]:
        """Seconds and peak memory of the training so far, over resumes."""
        before = (self._resumed or {}).get("cost", {"train_seconds": 0.0, "peak_memory_bytes": 0})
        return {
            "train_seconds": before["train_seconds"] + time.monotonic() - self._began,
            "peak_memory_bytes": max(before["peak_memory_bytes"], peak_memory()),
        }

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Restore what was counted since the last log; remove what a kill has kept from being removed."""
        if self._resumed is None:
            return
        if state.is_world_process_zero:
            self._remove_older(args, state)
        state.compute_steps(args, state.max_steps)  # logging_steps and the like may differ from before
        since = self._resumed["since_last_log"]
        self._trainer._tr_loss += since["loss"]
        self._trainer._globalstep_last_logged = since["step"]
        self._trainer._total_train_tokens = since["tokens"]
        self._trainer._metrics["train"].update(since["metrics"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save where a signal has reached any of the processes; at an epoch's end after its evaluation."""
        accelerator, received = self._trainer.accelerator, INTERRUPTS.received is not None
        if accelerator.num_processes > 1:
            if received:
                accelerator.set_trigger()
            received = bool(accelerator.check_trigger())
        self._stopping = self._stopping or received
        by_epoch = IntervalStrategy.EPOCH in (args.eval_strategy, args.save_strategy, args.logging_strategy)
        if self._stopping and not (by_epoch and float(state.epoch or 0).is_integer()):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        """Save after the epoch's evaluation, which a resumed run would leave out."""
        if self._stopping:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Write the manifest when every process has written its files, and remove older checkpoints.

        Raises:
            Interrupted: on all processes, if a signal has reached one.
        """
        trainer = self._trainer
        checkpoint = checkpoint_of(args, state)
        loss = nested_gather(trainer._tr_loss, args.parallel_mode).mean().item()
        trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            remove_unread(checkpoint)
            since = {
                "step": trainer._globalstep_last_logged,
                "loss": loss,
                "tokens": trainer._total_train_tokens,
                "metrics": trainer._metrics["train"],
            }
            counted = {"step": state.global_step, "since_last_log": since, "cost": self.cost()}
            write_manifest(checkpoint, {**counted, **self._identity})
            self._remove_older(args, state)
        trainer.accelerator.wait_for_everyone()
        if self._stopping:
            raise Interrupted(
                f"interrupted after step {state.global_step} of {state.max_steps}, which is saved in "
                f"{checkpoint}",
                INTERRUPTS.received,
                resumable=True,
            )

    def _remove_older(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._limit:
            # By their numbers: a manifest that was written late says nothing of a checkpoint's age.
            kept = self._limit + bool(args.load_best_model_at_end)
            rotate_checkpoints(str(args.output_dir), kept, state.best_model_checkpoint)


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint after the newest step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def remove_unread(folder: Path) -> None:
    """Remove what Trainer and PEFT put beside a model and nothing reads.

    The pickled training arguments may hold a Hub token, and PEFT's empty card names the folder of the base.
    """
    for name in ("training_args.bin", "README.md"):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def told_in_one_message(trainer: Any, out_of_memory: Callable[[], str]) -> Iterator[None]:
    """Turn what can end a training into one message, with what is kept, and end the progress bars.

    Args:
        out_of_memory: what to say where a step has found no memory.

    Raises:
        TrainingError: there is no memory or no room on the disk, or a checkpoint that training is resumed
            from holds a pickle of something else than training writes, which torch does not read.
    """
    try:
        yield
    except UnpicklingError as error:
        raise TrainingError(
            f"{one_line(error)}; a checkpoint of {trainer.args.output_dir} holds something else than the "
            "numbers that training writes. Remove that one, and --resume goes on from the one before"
        ) from None
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:  # a full disk has many names
        state = trainer.state
        checkpoint = checkpoint_of(trainer.args, state)
        if is_out_of_memory(error):
            raise TrainingError(f"step {state.global_step + 1}: {out_of_memory()}") from None
        if checkpoint.is_dir() and not (checkpoint / MANIFEST).is_file():
            raise not_written(checkpoint, error) from error
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "close"):
                callback.close()


def not_written(unfinished: Path, error: Exception) -> TrainingError:
    """What to say where a folder of a run cannot be written, after removing what there is of it."""
    run = unfinished.parent
    shutil.rmtree(unfinished, ignore_errors=True)
    kept, _ = newest_whole(run)
    free = shutil.disk_usage(run).free
    return TrainingError(
        f"{unfinished} could not be written, with {free / 1e9:.1f} GB free on its disk: {one_line(error)}; "
        f"{f'{kept} is whole, --resume goes on from it' if kept else 'there is no other checkpoint'}"
    )
