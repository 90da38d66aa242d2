"""The main job, through the real command line and `accelerate launch`, on the tiny model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import run_cli, write_jsonl

from rm_recipe.errors import DataError, RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools import pipeline
from rm_recipe.training.checkpoints import fault_of
from rm_recipe.training.train import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama, tiny_data):
    """`rm-recipe run` once, in an ASCII locale with a space, a colon and umlauts in every path.

    The folder it worked in, and what it printed.
    """
    folder = tmp_path_factory.mktemp("job") / "Übung 2: modèles"
    folder.mkdir()
    (folder / "le modèle").symlink_to(tiny_llama)
    (folder / "tiny.yaml").write_text(
        f"model_name_or_path: le modèle\ndataset_name: {tiny_data}\nuse_peft: true\nlora_r: 4\n"
        "max_length: 128\nnum_train_epochs: 2\nlearning_rate: 1e-2\ngradient_checkpointing: false\n"
        "use_cpu: true\nsave_steps: 8\n",
        encoding="utf-8",
    )
    result = run_cli("run", "tiny.yaml", "--seed", "1", cwd=folder, LC_ALL="C")
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_recipe_becomes_a_run_an_evaluation_and_an_export_and_says_where_they_are(finished):
    folder, result = finished[0] / "outputs" / "tiny", finished[1]
    files = {path.name for path in folder.iterdir()}
    assert files >= {"recipe.yaml", "run.json", "data_report.json", "model", "checkpoint-16"}
    assert files >= {"evaluation.json", "predictions.jsonl", "report.html", "export"}
    assert json.loads((folder / "evaluation.json").read_text())["datasets"]["held_out"]["accuracy"] > 0.9
    assert "seed: 1" in (folder / "recipe.yaml").read_text()
    printed = result.stdout
    assert printed.index("[train] tiny.yaml") < printed.index("[evaluate]") < printed.index("[export]")
    said = ("95 % interval", "Target 0.65 reached", "Trained in", "outputs/tiny/export", "rm-recipe score")
    assert all(part in printed[printed.index("Preference accuracy") :] for part in said)
    assert "Traceback" not in result.stderr


def test_a_mixture_of_pairs_and_rankings_with_margins_is_learnt_and_judged(write_recipe, tmp_path, tiny_data):
    """One file of rankings and one of pairs, no test split: held out by prompt."""
    pairs = [json.loads(line) for line in (tiny_data / "train.jsonl").read_text().splitlines()]
    pairs = [row | {"strength": ("better", "much better")[n % 2]} for n, row in enumerate(pairs)]
    replies = {"responses": ["cat good good", "dog bad bad", "no bad bad"], "ranks": [1, 2, 2]}
    rankings = [{"prompt": f"hello {n}", **replies, "strength": "better"} for n in range(40)]
    files = {"pairs": pairs, "rankings": rankings}
    entries = [{"path": str(write_jsonl(tmp_path / f"{name}.jsonl", rows))} for name, rows in files.items()]
    keys = {"dataset_name": "omit", "datasets": entries, "test_split_size": 0.3}
    keys |= {"margin_column": "strength", "margin_map": {"better": 0.5, "much better": 1}}
    train(read_recipe(write_recipe(**keys)))
    figures = evaluate(str(tmp_path / "run"))["datasets"]["held_out"]
    splits = json.loads((tmp_path / "run" / "data_report.json").read_text())["splits"]
    assert splits["train"]["rows"] == 104
    assert splits["train"]["pairs"] > splits["train"]["comparisons"]
    assert figures["n_scored"] == splits["test"]["comparisons"] == 104 - splits["train"]["comparisons"]
    assert figures["accuracy"] > 0.9
    assert set(figures["subsets"]) == {f"{tmp_path.name}/{name}.jsonl" for name in files}


def test_leakage_ends_a_run_before_anything_is_started(finished, tmp_path, tiny_data, monkeypatch):
    monkeypatch.chdir(finished[0])
    for name in ("train", "test"):
        shutil.copy(tiny_data / "train.jsonl", tmp_path / f"{name}.jsonl")
    keys = ["--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "r")]
    with pytest.raises(DataError, match="64 of 64 train comparisons .* have a prompt that is also"):
        pipeline.run(Path("tiny.yaml"), keys)
    assert not (tmp_path / "r").exists()


def test_a_second_run_skips_what_is_finished_and_says_so(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished[0])
    before = Path("outputs/tiny/run.json").stat().st_mtime_ns
    pipeline.run(Path("tiny.yaml"), ["--seed", "1"])
    assert capsys.readouterr().out.count("finished already, skipped") == 3
    assert Path("outputs/tiny/run.json").stat().st_mtime_ns == before


def test_by_another_gate_or_sample_it_is_only_evaluated_and_exported_anew(finished, tmp_path, monkeypatch):
    run_folder = shutil.copytree(finished[0] / "outputs" / "tiny", tmp_path / "run")
    monkeypatch.chdir(finished[0])
    monkeypatch.setattr(pipeline, "launch_training", None)
    monkeypatch.setattr(pipeline, "print_export", lambda _: None)
    exported = []
    monkeypatch.setattr(pipeline, "export", lambda *_, **__: exported.append(1))
    keys = ["--seed", "1", "--output_dir", str(run_folder), "--target_accuracy", "0.999"]
    for more, n in ([], 40), (["--max_eval_samples", "10"], 10):
        pipeline.run(Path("tiny.yaml"), [*keys, *more])
        judged = json.loads((run_folder / "evaluation.json").read_text())
        assert (judged["gate"]["target"], judged["datasets"]["held_out"]["n_scored"]) == (0.999, n)
    assert len(exported) == 2  # a push would upload results that are not those of the run
    evaluate(str(run_folder))  # by the run's own recipe, which says so from now on
    assert json.loads((run_folder / "evaluation.json").read_text()) == judged


def test_a_run_that_is_gone_on_with_on_other_data_is_refused(finished, tmp_path, tiny_data):
    run_folder = shutil.copytree(finished[0] / "outputs" / "tiny", tmp_path / "run")
    rows = (tiny_data / "train.jsonl").read_text().splitlines(keepends=True)
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "train.jsonl").write_text("".join(rows[1:]))
    keys = ["--output_dir", str(run_folder), "--dataset_name", str(data)]
    keys += ["--model_name_or_path", str(finished[0] / "le modèle")]
    recipe = read_recipe(finished[0] / "tiny.yaml", keys)
    with pytest.raises(RecipeError, match="the train comparisons are not those that .* was started with"):
        pipeline.examine_data(recipe, resume=True)
    pipeline.examine_data(recipe, resume=False)


@pytest.mark.parametrize(("keys", "other"), [("--seed 2", "seed"), ("--seed 1 --bf16 false", "bf16")])
def test_a_run_of_another_recipe_is_not_overwritten_unasked(finished, monkeypatch, keys, other):
    """Nor one of another precision, if that is asked for and does not follow from the machine."""
    monkeypatch.chdir(finished[0])
    with pytest.raises(RecipeError, match=rf"holds a run of another recipe \(other {other}\)"):
        pipeline.run(Path("tiny.yaml"), keys.split())


@pytest.mark.usefixtures("as_in_a_terminal")
def test_a_signal_is_passed_on_and_a_second_one_as_well():
    """To a process that answers the first by finishing something long."""
    program = (
        "import signal, sys, time\n"
        "heard = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: heard.append(1) if not heard else sys.exit(7))\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()  # the user's second
        pipeline.pass_on(signal.SIGTERM, process)
        assert process.returncode == 7


def test_where_no_interrupt_can_be_sent_as_on_windows_its_end_is_waited_for(monkeypatch):
    """There the console has given Ctrl-C to the training already, and psutil refuses to."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"]) as process:
        monkeypatch.setattr(pipeline.psutil.Process, "send_signal", Mock(side_effect=ValueError))
        pipeline.pass_on(signal.SIGINT, process)
        assert process.returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_training_saves_and_says_how_to_go_on(finished, tmp_path, number, code):
    folder, _ = finished
    where = ["--output_dir", str(tmp_path / "run")]
    arguments = ["tiny.yaml", *where, "--num_train_epochs", "500", "--save_steps", "100000"]
    command = [sys.executable, "-m", "rm_recipe", "run", *arguments, "--logging_steps", "1"]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **piped)
    for line in process.stdout:
        if line.lstrip("\r").startswith("step "):  # it is at it
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    step = saved.name.rpartition("-")[2]
    assert fault_of(saved) is None
    assert err.count("rm-recipe: finishing this step and saving it; Ctrl-C again stops at once\n") == 1
    assert err[-1000:].endswith(
        f"rm-recipe: interrupted after step {step} of 4000, which is saved in {saved}\n"
        f"rm-recipe: go on with: rm-recipe run {' '.join(arguments)} --logging_steps 1\n"
    )
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "run.json").exists()
