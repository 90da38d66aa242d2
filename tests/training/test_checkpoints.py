"""What is killed goes on from the newest whole checkpoint, and ends with the same bits."""

import errno
import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from transformers import TrainerCallback

import rm_recipe.training.train
from rm_recipe import cli
from rm_recipe.data import dataset
from rm_recipe.errors import Interrupted, RecipeError, TrainingError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.files import tidy
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training import checkpoints as checkpoints_module
from rm_recipe.training.checkpoints import MANIFEST, checkpoints, fault_of, newest_whole
from rm_recipe.training.run_folder import check_identity
from rm_recipe.training.train import train

KEYS = {
    # Two epochs of 11 steps; a step's dropout, order and schedule all depend on where it is.
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "lora_dropout": 0.1,
    "disable_dropout": False, "lr_scheduler_type": "cosine", "warmup_steps": 3,
    "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "logging_steps": 5,
}  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "adapter_model.safetensors")


def losses(run: Path) -> list[dict[str, float]]:
    """What was logged, without what a clock has counted."""
    log = json.loads((run / "run.json").read_text())["log"]
    return [
        {key: value for key, value in entry.items() if not key.endswith(("_runtime", "_per_second"))}
        for entry in log
        if "train_runtime" not in entry
    ]


def same(run: Path, other: Path) -> bool:
    """Whether two runs have the same weights, bit for bit, and the same log."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    return losses(run) == losses(other) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def kill(folder: Path, recipe: Path, times: int, writes: str, seed: int = 0) -> dict:
    """What `killed.py` did; its runs are `whole` and `finished-N`."""
    command = [sys.executable, "tests/killed.py", str(folder), str(recipe), str(seed), str(times), writes]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=REPOSITORY, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    for number, left in enumerate(report["states"], 1):
        assert same(folder / f"finished-{number}", folder / "whole"), report["kills"][number - 1]
        assert left == sorted(path.name for path in (folder / "whole").iterdir())
    return report


BEST = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_accuracy"}  # fmt: skip


@pytest.mark.parametrize(("keys", "writes"), [({}, "12,40"), (BEST, "60")])
def test_a_run_that_was_killed_ends_with_the_same_bits_and_losses(write_recipe, tmp_path, keys, writes):
    """At a random moment, amid a checkpoint's files, and before a manifest."""
    report = kill(tmp_path, write_recipe(**KEYS | keys), times=1, writes=writes)
    assert len(report["kills"]) >= 1 + len(writes.split(","))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, BEST])
def test_no_kill_at_any_change_of_the_run_folder_or_at_random_moments_loses_anything(
    write_recipe, tmp_path, keys
):
    report = kill(tmp_path, write_recipe(**KEYS | keys), times=24, writes="all")
    assert len(report["kills"]) >= report["changes"] + 24 - 1  # the last change may follow run.json
    print(json.dumps({key: report[key] for key in ("changes", "seconds")}), len(report["kills"]))


class SignalAt(TrainerCallback):
    """Ctrl-C amid a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step - 1:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def with_callback(monkeypatch):
    """A function that gives the next trainer a callback."""
    make = rm_recipe.training.train.make_trainer

    def give(callback: TrainerCallback) -> None:
        def make_with(*args):
            trainer = make(*args)
            trainer.add_callback(callback)
            monkeypatch.setattr(rm_recipe.training.train, "make_trainer", make)
            return trainer

        monkeypatch.setattr(rm_recipe.training.train, "make_trainer", make_with)

    return give


BY_EPOCH = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_steps": "omit",
    "logging_steps": "omit",
}


@pytest.mark.parametrize(
    ("step", "keys"),
    [
        (1, {}),
        (7, {}),
        (11, BY_EPOCH),  # an epoch's last, whose evaluation a resumed run would not make up for
        (14, BY_EPOCH),
        (14, BEST),
        (13, {"max_steps": 13}),  # the last, amid an epoch: there is no step to be made after it
    ],
)
def test_ctrl_c_finishes_the_step_saves_it_and_the_resumed_run_is_the_same(
    write_recipe, tmp_path, with_callback, capfd, step, keys
):
    train(read_recipe(write_recipe(**KEYS | keys, output_dir=str(tmp_path / "whole"))))
    other = read_recipe(write_recipe(**KEYS | keys, output_dir=str(tmp_path / "resumed")))
    with_callback(SignalAt(step))
    with pytest.raises(
        Interrupted, match=rf"after step {step} of \d+, which is saved in .*-{step}$"
    ) as caught:
        train(other)
    assert caught.value.exit_code == 130
    assert "finishing this step and saving it" in capfd.readouterr().err
    assert fault_of(tmp_path / "resumed" / f"checkpoint-{step}") is None
    assert not (tmp_path / "resumed" / "model").exists()
    train(other, resume=True)
    assert same(tmp_path / "resumed", tmp_path / "whole")
    record = json.loads((tmp_path / "resumed" / "run.json").read_text())
    assert record["resumed_from_step"] == step
    assert record["steps"] == json.loads((tmp_path / "whole" / "run.json").read_text())["steps"]


@pytest.fixture
def interrupted(write_recipe, tmp_path, with_callback):
    """A run that stands at step 8, with the checkpoints 6 and 8, and its recipe."""
    recipe = write_recipe(**KEYS)
    with_callback(SignalAt(8))
    with pytest.raises(Interrupted):
        train(read_recipe(recipe))
    return tmp_path / "run", recipe


def spoil(path: Path) -> None:
    """Another byte in the middle, as a disk may give one."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "it was not finished"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "its manifest.json cannot be read"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: spoil(folder / "optimizer.pt"), "optimizer.pt is not as it was written"),
        (lambda folder: spoil(folder / "trainer_state.json"), "trainer_state.json is not as it was written"),
        (lambda folder: os.truncate(folder / "scheduler.pt", 9), "scheduler.pt is not as it was written"),
    ],
)
def test_a_checkpoint_that_is_not_as_it_was_finished_is_named_and_the_one_before_is_used(
    interrupted, capsys, damage, fault
):
    run, recipe = interrupted
    damage(run / "checkpoint-8")
    assert newest_whole(run) == (run / "checkpoint-6", {run / "checkpoint-8": fault})
    train(read_recipe(recipe), resume=True)
    printed = capsys.readouterr().out
    assert f"warning: {run / 'checkpoint-8'} does not count: {fault}\n" in printed
    assert f"resuming from {run / 'checkpoint-6'}\n" in printed
    again = run.with_name("whole")
    train(read_recipe(recipe, ["--output_dir", str(again)]))
    assert same(run, again)
    assert [path.name for path in checkpoints(run)] == [path.name for path in checkpoints(again)]


def test_with_no_whole_checkpoint_it_starts_anew_and_says_so(interrupted, capsys):
    run, recipe = interrupted
    for folder in checkpoints(run):
        (folder / MANIFEST).unlink()
    train(read_recipe(recipe), resume=True)
    assert "no checkpoint to resume from: starting anew" in capsys.readouterr().out


def test_other_data_and_another_number_of_processes_are_refused(interrupted, tmp_path, tiny_data):
    run, recipe = interrupted
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    copy = shutil.copytree(tiny_data, tmp_path / "data")
    text = recipe.read_text().replace(str(tiny_data), str(copy))
    recipe.write_text(text)
    saved = (run / "recipe.yaml").read_text().replace(str(tiny_data), str(copy))
    (run / "recipe.yaml").write_text(saved)
    rows = (copy / "train.jsonl").read_text().splitlines(keepends=True)
    (copy / "train.jsonl").write_text("".join(rows[::-1]))
    with pytest.raises(RecipeError, match="the train comparisons are not those that .*run was started with"):
        train(read_recipe(recipe), resume=True)
    manifest = json.loads((run / "checkpoint-8" / MANIFEST).read_text())
    with pytest.raises(RecipeError, match=r"run was started with 1 process\(es\), and here are 2"):
        check_identity(run, manifest, {**manifest, "processes": 2})
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {**before, run / "recipe.yaml": saved.encode()} == after


def test_a_reworded_comment_in_our_code_and_a_copy_of_the_data_are_no_other_data(
    interrupted, tmp_path, tiny_data, monkeypatch
):
    run, recipe = interrupted
    copy = shutil.copytree(tiny_data, tmp_path / "data")
    for path in (recipe, run / "recipe.yaml"):
        path.write_text(path.read_text().replace(str(tiny_data), str(copy)))

    def reworded(module):
        return f"{inspect.getsource(module)}# as it was, in other words\n"

    monkeypatch.setattr(dataset, "inspect", SimpleNamespace(getsource=reworded))
    train(read_recipe(recipe), resume=True)
    assert (run / "run.json").is_file()


def test_another_tokenizer_under_the_same_name_is_refused(interrupted):
    run, _ = interrupted
    manifest = json.loads((run / "checkpoint-8" / MANIFEST).read_text())
    with pytest.raises(RecipeError, match="tokenizer or chat template gives other token ids"):
        check_identity(run, manifest, {**manifest, "tokens": "0" * 64})


def test_a_resumed_run_counts_time_speed_and_memory_of_the_whole_run(interrupted):
    run, recipe = interrupted
    path = run / "checkpoint-8" / MANIFEST
    manifest = json.loads(path.read_text())
    assert 0 < manifest["cost"]["train_seconds"] < 100
    path.write_text(json.dumps({**manifest, "cost": {"train_seconds": 1e4, "peak_memory_bytes": 10**15}}))
    train(read_recipe(recipe), resume=True)
    record = json.loads((run / "run.json").read_text())
    assert 1e4 < record["train_seconds"] < 1.1e4
    assert record["peak_memory_bytes"] == 10**15
    of_both = {"comparisons_per_s": 2 * 64, "tokens_per_s": record["log"][-1]["num_tokens"]}
    for name, count in of_both.items():
        assert record[name] == pytest.approx(count / record["train_seconds"])


class FullDiskAt(TrainerCallback):
    """Files may not grow past a few bytes from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))


@pytest.mark.parametrize("step", [3, 6])
def test_a_full_disk_ends_with_one_message_and_the_checkpoint_before(
    write_recipe, tmp_path, with_callback, step
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    recipe, run = write_recipe(**KEYS), tmp_path / "run"
    with_callback(FullDiskAt(step))
    try:
        with pytest.raises(TrainingError) as caught:
            train(read_recipe(recipe))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert f"{run}/checkpoint-{step} could not be written, with " in message
    whole = f"{run}/checkpoint-3 is whole, --resume goes on from it"
    assert (whole if step == 6 else "there is no other checkpoint") in message
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3"] * (step == 6)
    train(read_recipe(recipe), resume=True)
    train(read_recipe(recipe, ["--output_dir", str(tmp_path / "whole")]))
    assert same(run, tmp_path / "whole")


@pytest.mark.parametrize("keys", [KEYS, KEYS | BEST])
def test_until_a_checkpoint_is_whole_the_one_before_is_there(write_recipe, monkeypatch, keys):
    """Though `save_total_limit` is 2, and the best one is kept besides."""
    there, write = [], checkpoints_module.write_manifest

    def watch(checkpoint, content):
        there.append([fault_of(path) is None for path in checkpoints(checkpoint.parent)])
        write(checkpoint, content)

    monkeypatch.setattr(checkpoints_module, "write_manifest", watch)
    train(read_recipe(write_recipe(**keys)))
    assert len(there) == 8
    assert there[0] == [False]
    assert all(whole[:2] == [False, True] and len(whole) <= 4 for whole in there[1:])


def test_a_kill_before_the_last_rotation_leaves_no_more_checkpoints_than_a_whole_run(
    write_recipe, tmp_path, monkeypatch
):
    class KilledError(Exception):
        pass

    def rotate(*args, **keys):
        if (tmp_path / "run" / "checkpoint-22" / MANIFEST).is_file():
            raise KilledError
        real(*args, **keys)

    real, recipe = checkpoints_module.rotate_checkpoints, read_recipe(write_recipe(**KEYS))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "rotate_checkpoints", rotate)
        with pytest.raises(KilledError):
            train(recipe)
    assert len(checkpoints(tmp_path / "run")) == 3
    train(recipe, resume=True)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-22", "checkpoint-21"]


def test_a_manifest_that_finds_no_room_says_what_is_whole(write_recipe, tmp_path, monkeypatch):
    write = checkpoints_module.write_json

    def full(path, content):
        if path.parent.name == "checkpoint-6":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(checkpoints_module, "write_json", full)
    with pytest.raises(TrainingError, match=r"checkpoint-6 could not be written, .*checkpoint-3 is whole"):
        train(read_recipe(write_recipe(**KEYS)))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3"]


class FullDiskAtTheEnd(TrainerCallback):
    """From the last step on."""

    def on_train_end(self, args, state, control, **_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("keys", [{}, {"use_peft": False}])
def test_a_disk_that_is_full_at_the_end_loses_no_training(write_recipe, tmp_path, with_callback, keys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    recipe, run = write_recipe(**KEYS | keys), tmp_path / "run"
    with_callback(FullDiskAtTheEnd())
    try:
        with pytest.raises(TrainingError, match=r"run/model could not be written, .*checkpoint-22 is whole"):
            train(read_recipe(recipe))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml", "data_report.json", "checkpoint-21", "checkpoint-22"
    }  # fmt: skip
    train(read_recipe(recipe), resume=True)
    assert (run / "model" / "config.json").is_file()


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(interrupted, monkeypatch):
    """As a network's disk may be away for a while; nothing is removed."""
    run, recipe = interrupted

    def away(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoints_module, "sha256", away)
    before = sorted(run.rglob("*"))
    with pytest.raises(
        RecipeError, match=r"cannot be read \(Input/output error\); the checkpoint may be sound"
    ):
        train(read_recipe(recipe), resume=True)
    assert sorted(run.rglob("*")) == before


def test_a_best_checkpoint_that_is_damaged_is_not_taken_for_the_model(
    write_recipe, tmp_path, with_callback, capsys
):
    class Spoil(TrainerCallback):
        """The best one, before it is read at the end."""

        def on_step_end(self, args, state, control, **_):
            if state.global_step == state.max_steps:
                spoil(Path(state.best_model_checkpoint) / "adapter_model.safetensors")

    with_callback(Spoil())
    train(read_recipe(write_recipe(**KEYS | BEST)))
    printed = capsys.readouterr().out
    assert "the best, does not count: adapter_model.safetensors is not as it was written" in printed
    train(read_recipe(write_recipe(**KEYS, output_dir=str(tmp_path / "last"))))
    ours, last = weights(tmp_path / "run"), weights(tmp_path / "last")
    assert all(torch.equal(ours[key], last[key]) for key in last)


def test_how_often_is_evaluated_changes_nothing(write_recipe, tmp_path):
    """With dropout: an evaluation takes no random number from training."""
    for name, keys in {"never": {}, "often": {"eval_strategy": "steps", "eval_steps": 2}}.items():
        train(read_recipe(write_recipe(**KEYS | keys, output_dir=str(tmp_path / name))))
    never, often = weights(tmp_path / "never"), weights(tmp_path / "often")
    assert all(torch.equal(never[key], often[key]) for key in never)


class NotANumberAt(TrainerCallback):
    """Weights that overflow in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def test_a_loss_that_is_no_number_names_step_and_rows_and_leaves_the_checkpoint_before(
    write_recipe, tmp_path, with_callback
):
    recipe, run = write_recipe(**KEYS), tmp_path / "run"
    with_callback(NotANumberAt(4))
    with pytest.raises(
        TrainingError, match=r"the loss is not a finite number in step 5, of row \d+, \d+, \d+; "
    ):
        train(read_recipe(recipe))
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3"]
    train(read_recipe(recipe), resume=True)
    train(read_recipe(recipe, ["--output_dir", str(tmp_path / "whole")]))
    assert same(run, tmp_path / "whole")


@pytest.mark.parametrize("room", [0, 3000, 30000])
def test_a_disk_that_fills_up_in_an_evaluation_leaves_the_one_before(
    write_recipe, tmp_path, monkeypatch, capsys, room
):
    """Wherever it strikes: predictions, figures or the report."""
    train(read_recipe(write_recipe(max_steps=2)))
    run = tmp_path / "run"
    evaluate(str(run))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    kept = json.loads((run / "evaluation.json").read_text())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "argv", ["rm-recipe", "evaluate", str(run)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == 1
    assert "rm-recipe: File too large" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert before[run / "model" / "config.json"] == after[run / "model" / "config.json"]
    assert json.loads((run / "evaluation.json").read_text()) == kept


def test_what_a_kill_left_unfinished_is_removed_and_what_was_about_to_be_replaced_is_put_back(tmp_path):
    (tmp_path / ".run.json.part").write_text("{")
    (tmp_path / ".model-x1.part" / "old").mkdir(parents=True)
    (tmp_path / ".model-x1.part" / "old" / "weights").write_text("trained")
    (tmp_path / ".export-x2.part" / "new").mkdir(parents=True)
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "trained"
