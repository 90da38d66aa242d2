"""Batches made by a process of their own, as a GPU gets them."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import logged
from torch.utils.data import get_worker_info

from rm_recipe.errors import TrainingError
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.recipe.relations import resolve
from rm_recipe.training.train import train
from rm_recipe.training.trainer import RowCollator


def test_a_worker_makes_the_same_batches_and_a_gpu_gets_one(write_recipe, tmp_path, monkeypatch):
    found = {}
    for workers in (0, 1):
        keys = {"dataloader_num_workers": workers, "logging_steps": 1, "max_steps": 4}
        train(read_recipe(write_recipe(**keys)), overwrite=True)
        found[workers] = logged(tmp_path / "run", "loss"), logged(tmp_path / "run", "num_tokens")
    assert found[0] == found[1]
    assert len(found[1][0]) == 4
    resolved = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr("rm_recipe.recipe.relations.device_of", lambda values, kind=device: kind)
        resolved[device] = resolve({"bf16": False, "fp16": False})
    assert [resolved[device]["dataloader_num_workers"] for device in ("cpu", "cuda")] == [0, 1]
    assert [resolved[device]["dataloader_pin_memory"] for device in ("cpu", "cuda")] == [False, True]


def test_a_worker_that_is_lost_ends_the_run_with_one_message(write_recipe, monkeypatch):
    micro_batch = RowCollator.micro_batch

    def killed(self, examples):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return micro_batch(self, examples)

    monkeypatch.setattr(RowCollator, "micro_batch", killed)
    with pytest.raises(TrainingError, match="a process that makes batches was lost"):
        train(read_recipe(write_recipe(dataloader_num_workers=1)))


def test_a_job_that_is_ended_with_all_its_processes_is_saved_all_the_same(write_recipe, tmp_path):
    """As `timeout`, Slurm and torch's launcher do: SIGTERM to the group, which the worker is of."""
    recipe = write_recipe(dataloader_num_workers=1, num_train_epochs=100, logging_steps=1)
    command, pipe = [sys.executable, "-m", "rm_recipe", "train", str(recipe)], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, text=True, start_new_session=True) as process:
        for line in process.stdout:
            if "'loss'" in line:  # the worker has made a batch
                os.killpg(process.pid, signal.SIGTERM)
                break
        process.stdout.read()
        assert process.wait(120) == 128 + signal.SIGTERM
    assert list((tmp_path / "run").glob("checkpoint-*/manifest.json"))
