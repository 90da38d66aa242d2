"""A run at work in its folder, and checkpoints that it can be resumed from exactly.

Trainer writes a checkpoint file by file, so a kill, a power cut or a full disk may leave half of one
under the name of a whole one. The manifest is written last and by renaming: a checkpoint without it, or
with another content than it says, does not count, and the one before is used.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, trainer_utils
from transformers.trainer_pt_utils import nested_gather

from rm_recipe.errors import INTERRUPTS, Interrupted, RecipeError, TrainingError, one_line
from rm_recipe.files import locked, read_json, sha256, tidy, write_json
from rm_recipe.model.memory import peak_memory, reset_peak_memory, too_little
from rm_recipe.processes import is_out_of_memory, say, warn
from rm_recipe.recipe.reader import RUN_RECIPE, Recipe, saved_values
from rm_recipe.training import monitoring, run_folder
from rm_recipe.training.trainer import SharedPrefixRewardTrainer

MANIFEST = "manifest.json"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest step first, whole or not."""
    return [Path(path) for path in reversed(trainer_utils.sort_checkpoints(str(run)))]


def write_manifest(checkpoint: Path, content: Mapping[str, Any]) -> None:
    """Mark a checkpoint as whole: the SHA-256 of each of its files, and `content`.

    The files' bytes are on the disk before, and not only in memory, as a power cut would show.
    """
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(checkpoint))] = sha256(path)
    write_json(checkpoint / MANIFEST, {**content, "files": files})


def fault_of(checkpoint: Path) -> str | None:
    """Why a checkpoint does not count, None if it is as it was when it was finished."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
    except (RecipeError, KeyError):
        return f"it was not finished, or its {MANIFEST} is broken"
    for name, known in files.items():
        if not (checkpoint / name).is_file() or sha256(checkpoint / name) != known:
            return f"{name} is missing or not as it was written"
    return None


def newest_manifest(run: Path) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint that counts."""
    whole = (checkpoint for checkpoint in checkpoints(run) if fault_of(checkpoint) is None)
    return next((read_json(checkpoint / MANIFEST) for checkpoint in whole), None)


@contextmanager
def open_run(recipe: Recipe, *, resume: bool, overwrite: bool) -> Iterator["Run"]:
    """Check that a run may use its folder, keep other processes out, and choose the checkpoint to go on from.

    Raises:
        RecipeError: as `run_folder.check_run_folder` does, or another process is at work in it.
        Interrupted: saying what is kept.
    """
    run = Run(recipe, overwrite)
    with INTERRUPTS.listening():
        try:
            with locked(run.folder) if PartialState().is_main_process else nullcontext():
                run_folder.check_run_folder(recipe, resume=resume, overwrite=overwrite)
                if resume:
                    run.find_checkpoint()
                yield run
        except KeyboardInterrupt:
            if not run.identity:
                raise Interrupted("interrupted before training began", INTERRUPTS.received) from None
            said = "interrupted; --resume goes on from the newest checkpoint"
            raise Interrupted(said, INTERRUPTS.received, resumable=True) from None


class Run(TrainerCallback):
    """A run in its folder: what it goes on from, its checkpoints as they are written, and its record.

    As the trainer's callback it finishes each checkpoint with its manifest, and ends training where a signal
    has asked for it. Older checkpoints are removed when the new one is whole, not before as Trainer would (so
    its own `save_total_limit` is None): until then the one before is all there is. Of a run that ends with
    its best checkpoint, that one is kept besides.

    The manifest also keeps what Trainer and TRL have counted since the last log and forget on resuming:
    with it, a resumed run logs the same losses, and knows what the whole of it took.

    Attributes:
        checkpoint: to go on from; None to begin at the beginning.
        identity: what must not change between a run and its resumption; known once it has begun.
    """

    def __init__(self, recipe: Recipe, overwrite: bool) -> None:
        self.folder, self._recipe, self._overwrite = recipe.output_dir, recipe, overwrite
        self.checkpoint: Path | None = None
        self.identity: dict[str, Any] = {}
        self._resumed: dict[str, Any] = {}  # the checkpoint's manifest
        self._faulty: list[Path] = []  # newer checkpoints that do not count
        self._stopping = False

    def find_checkpoint(self) -> None:
        """Find what to go on from, and say what it is and which newer ones do not count.

        What data and device have settled stays as it was: how batches are divided, and in which order.
        """
        then = saved_values(self.folder)
        settled = {"micro_batch_tokens": self._recipe.data, "train_sampling_strategy": self._recipe.training}
        for key, part in settled.items():
            if key in then and key not in self._recipe.values:
                setattr(part, key, then[key])
                self._recipe.values[key] = then[key]
        for path in checkpoints(self.folder):
            if fault := fault_of(path):
                warn(f"{path} does not count: {fault}")
                self._faulty.append(path)
            else:
                self.checkpoint, self._resumed = path, read_json(path / MANIFEST)
                say(f"resuming from {path}")
                return
        say("no checkpoint to resume from: starting anew")

    def begin(self, trainer: SharedPrefixRewardTrainer, report: dict[str, Any] | None) -> None:
        """Make the folder this run's, with recipe and data report, and watch the trainer from now on.

        With `overwrite` the run before is removed. Checkpoints that do not count go in any case, as rotation
        would keep them instead of whole ones.

        Raises:
            RecipeError: the data are not those that the checkpoint was trained on.
        """
        recipe = self._recipe
        identity = run_folder.identity_of(trainer.train_split, trainer.test_split)
        if self._resumed:
            run_folder.check_identity(self.folder, self._resumed, identity)
        self.identity = identity
        if trainer.is_world_process_zero():
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._overwrite:
                run_folder.empty(self.folder)
            tidy(self.folder)
            for checkpoint in self._faulty:
                shutil.rmtree(checkpoint)
            recipe.save(self.folder / RUN_RECIPE)
            write_json(self.folder / run_folder.DATA_REPORT, report)
        trainer.accelerator.wait_for_everyone()
        if recipe.hub.push_to_hub:
            say("push_to_hub: training uploads nothing; `rm-recipe run` uploads the proven export at its end")
        self._trainer, self._began = trainer, time.monotonic()
        reset_peak_memory()
        of_step = trainer.get_total_train_batch_size(trainer.args)
        # Without margins and centring, the loss of an untrained model is ln 2.
        plain = recipe.training.center_rewards_coefficient is None and recipe.data.margin_column is None
        trainer.add_callback(monitoring.EarlySigns(of_step, plain))
        trainer.add_callback(self)

    def finish(self) -> None:
        """Write `run.json`, which also says that the run is finished."""
        if self._trainer.is_world_process_zero():
            step = self._resumed.get("step", 0)
            write_json(self.folder / "run.json", run_folder.run_record(self._trainer, step, self._total_cost))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Restore what was counted since the last log; remove what a kill has kept from being removed."""
        if not self._resumed:
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
        if INTERRUPTS.received is not None:
            self._trainer.accelerator.set_trigger()
        self._stopping = self._trainer.accelerator.check_trigger() or self._stopping
        by_epoch = "epoch" in (args.eval_strategy, args.save_strategy, args.logging_strategy)
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
            since = {"step": trainer._globalstep_last_logged, "loss": loss}
            since |= {"tokens": trainer._total_train_tokens, "metrics": trainer._metrics["train"]}
            counted = {"step": state.global_step, "since_last_log": since, "cost": self._cost()}
            write_manifest(checkpoint, counted | self.identity)
            self._remove_older(args, state)
        trainer.accelerator.wait_for_everyone()
        if self._stopping:
            done = f"step {state.global_step} of {state.max_steps}, which is saved in {checkpoint}"
            raise Interrupted(f"interrupted after {done}", INTERRUPTS.received, resumable=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Note what the training took."""
        self._total_cost = self._cost()

    def _cost(self) -> dict[str, Any]:
        """Seconds and peak memory of the training so far, over resumes."""
        before = self._resumed.get("cost", {"train_seconds": 0.0, "peak_memory_bytes": 0})
        return {
            "train_seconds": before["train_seconds"] + time.monotonic() - self._began,
            "peak_memory_bytes": max(before["peak_memory_bytes"], peak_memory()),
        }

    def _remove_older(self, args: TrainingArguments, state: TrainerState) -> None:
        if limit := self._recipe.training.save_total_limit:
            # By their numbers: a manifest that was written late says nothing of a checkpoint's age.
            kept = limit + bool(args.load_best_model_at_end)
            trainer_utils.rotate_checkpoints(str(self.folder), kept, state.best_model_checkpoint)


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint after the newest step."""
    return Path(str(args.output_dir)) / f"{trainer_utils.PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def remove_unread(folder: Path) -> None:
    """Remove what Trainer and PEFT put beside a model and nothing reads.

    The pickled training arguments may hold a Hub token, and PEFT's empty card names the folder of the base.
    """
    for name in ("training_args.bin", "README.md"):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def ended_well(recipe: Recipe, trainer: SharedPrefixRewardTrainer) -> Iterator[None]:
    """Let a signal wait until the step is saved, and turn what can end a training into one message.

    Raises:
        TrainingError: there is no memory or no room on the disk, a data loader's worker was lost, or a
            checkpoint that training is resumed from holds a pickle of something else than training writes,
            which torch does not read.
    """
    try:
        with INTERRUPTS.deferred():
            yield
    except UnpicklingError as error:
        fault = f"the checkpoint holds something else than numbers that training writes: {one_line(error)}"
        raise TrainingError(f"{fault}; remove it, and --resume goes on from the one before") from None
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:  # a full disk has many names
        checkpoint = checkpoint_of(trainer.args, trainer.state)
        if "DataLoader" in str(error):
            lost = "a process that makes batches was lost, perhaps for want of memory"
            raise TrainingError(f"{lost}; --resume goes on, best with 'dataloader_num_workers: 0'") from None
        if is_out_of_memory(error):
            raise TrainingError(f"step {trainer.state.global_step + 1}: {too_little(recipe)}") from None
        if checkpoint.is_dir() and not (checkpoint / MANIFEST).is_file():
            raise not_written(checkpoint, error) from error
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "close"):  # a progress bar's
                callback.close()


def not_written(unfinished: Path, error: Exception) -> TrainingError:
    """What to say where a folder of a run cannot be written, after removing what there is of it."""
    shutil.rmtree(unfinished, ignore_errors=True)
    free = shutil.disk_usage(unfinished.parent).free
    fault = f"{unfinished} could not be written, with {free / 1e9:.1f} GB free on its disk: {one_line(error)}"
    return TrainingError(f"{fault}; --resume goes on from the checkpoint before")
