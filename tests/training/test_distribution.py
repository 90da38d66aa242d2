"""Several processes learn what one does, score each comparison once, and get what was asked for.

What is launched is `accelerate launch` with the files of `accelerate_configs/`, two processes over gloo.
"""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from accelerate.utils.other import get_free_port
from conftest import REPOSITORY, logged, make_recipe, make_rows, weights, write_splits

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.evaluation.findings import HELD_OUT
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.scoring import RewardModel
from rm_recipe.training.checkpoints import fault_of
from rm_recipe.training.train import check_sharding, train
from rm_recipe.training.trainer import keep_precision

CONFIGS = {path.stem: path for path in (REPOSITORY / "accelerate_configs").glob("*.yaml")}
SHARDED = Path(__file__).parent / "two_ranks_sharded.py"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed")

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
PIPED = {"text": True, "cwd": REPOSITORY, "env": ENVIRONMENT}


def start(config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with one of the configurations; options of its own come first."""
    command = [*LAUNCH, str(CONFIGS[config]), *arguments]
    return subprocess.run(command, capture_output=True, check=False, timeout=200, **PIPED)


def launch(config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`start` that has to end well."""
    result = start(config, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def assert_same(ours: Path, theirs: Path, keys: tuple[str, ...], tolerance: float) -> None:
    for key in keys:
        assert logged(ours, key) == pytest.approx(logged(theirs, key), abs=tolerance), key


def difference(a: Path, b: Path) -> float:
    """The largest one between two runs' adapters and heads."""
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert {value.dtype for value in ours.values()} == {torch.float32}
    return max((ours[key] - theirs[key]).abs().max().item() for key in ours)


class Runs:
    """Trainings of one recipe: 64 comparisons at 8 a step, 39 held out, in fp32 unless said otherwise."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.data = write_splits(folder / "data", make_rows(64, seed=1), make_rows(39, seed=2))

    def recipe(self, name: str, **keys) -> Path:
        (self.folder / name).mkdir()
        keys = {"num_train_epochs": 1, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4, **keys}
        return make_recipe(self.folder / name, self.model, self.data, **keys)

    def alone(self, name: str, **keys) -> Path:
        """The run folder of one process."""
        train(read_recipe(self.recipe(name, **keys)))
        return self.folder / name / "run"

    def sharded(self, name: str, config: str, **keys) -> tuple[Path, list[dict]]:
        """The run folder of two processes under FSDP2 or DeepSpeed, and what each found its model to be."""
        recipe = self.recipe(name, per_device_train_batch_size=4, **keys)
        launch(config, "--num_processes", "2", str(SHARDED), str(recipe))
        found = [torch.load(self.folder / name / f"rank-{rank}.pt") for rank in (0, 1)]
        return self.folder / name / "run", found


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama):
    return Runs(tmp_path_factory.mktemp("runs"), tiny_llama)


@pytest.fixture(scope="module")
def one(runs):
    return runs.alone("one")


@pytest.fixture(scope="module")
def two(runs):
    """The run folder of two processes under DDP, which have said each line once."""
    recipe = runs.recipe("two", per_device_train_batch_size=4)
    said = launch("cpu_two_processes", "-m", "rm_recipe", "train", str(recipe)).stdout
    for line in ("prefix sharing: on", "preflight: loss", "duplicates: exact"):
        assert said.count(line) == 1, line
    return recipe.parent / "run"


# --- accelerate_configs/ -------------------------------------------------------------------------


def parsed(name: str):
    """A configuration as Accelerate's launcher has checked it."""
    command = ["--config_file", str(CONFIGS[name]), "-m", "rm_recipe", "train", "x.yaml"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    return args


STARTED = {  # processes, machines, and what Accelerate makes of them
    "cpu": (1, 1, "NO"),
    "cpu_two_processes": (2, 1, "MULTI_GPU"),
    "single_gpu": (1, 1, "NO"),
    "multi_gpu": (8, 1, "MULTI_GPU"),
    "fsdp": (8, 1, "FSDP"),
    "deepspeed_zero3": (8, 1, "DEEPSPEED"),
    "multi_node": (16, 2, "MULTI_GPU"),
}


def test_each_configuration_is_in_the_docs_and_starts_the_processes_that_its_name_says(monkeypatch):
    page = (REPOSITORY / "docs" / "your-gpu.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)\.yaml` \|", page, re.MULTILINE)) == set(CONFIGS) == set(STARTED)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    for name, (processes, machines, kind) in STARTED.items():
        file = load_config_from_file(str(CONFIGS[name]))
        assert file.distributed_type.value == kind
        assert file.use_cpu is name.startswith("cpu")
        assert file.mixed_precision == "no"  # the recipe decides
        args = parsed(name)
        assert (args.num_processes, args.num_machines) == (processes, machines)


def test_the_command_in_each_header_names_the_file_and_a_recipe_that_parses():
    for name, path in CONFIGS.items():
        commands = re.findall(r"^#   (accelerate launch .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(commands) == (2 if name == "multi_node" else 1)
        for command in commands:
            words = shlex.split(command)[2:]
            assert words[:2] == ["--config_file", f"accelerate_configs/{name}.yaml"]
            verb = words.index("rm_recipe")
            launch_command_parser().parse_args([*words[: verb + 1], "train"])
            read_recipe(REPOSITORY / words[verb + 2], words[verb + 3 :], check_inputs=False)


def test_deepspeed_is_zero3_with_autocast_in_place_of_a_bf16_model(monkeypatch):
    args = parsed("deepspeed_zero3")
    args.deepspeed_fields_from_accelerate_config = ""
    for key, value in prepare_deepspeed_cmd_env(args)[1].items():
        if "DEEPSPEED" in key:
            monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    assert not plugin.zero3_init_flag
    assert plugin.deepspeed_config["bf16"] == {"enabled": True}
    state = SimpleNamespace(deepspeed_plugin=plugin)
    assert keep_precision(SimpleNamespace(state=state), SimpleNamespace(bf16=True, fp16=False))
    config = plugin.deepspeed_config
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert config["torch_autocast"]["dtype"] == "bfloat16"
    assert not config["bf16"]["enabled"]


def test_fsdp1_is_refused_in_one_message():
    """It is Accelerate's default, and fails once the model is loaded."""
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with pytest.raises(RecipeError, match=r"FSDP1 .* set 'fsdp_version: 2'"):
        keep_precision(SimpleNamespace(state=state), SimpleNamespace(bf16=True, fp16=False))


# --- training ------------------------------------------------------------------------------------


def test_two_processes_learn_what_one_does_at_the_same_batch(one, two):
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    assert len(logged(two, "loss")) == 8
    assert_same(two, one, ("loss", "accuracy", "margin", "num_tokens"), 1e-5)
    # Accelerate fills the last batch up with repeated ones: 39 held-out comparisons are given out as 40.
    assert_same(two, one, ("eval_loss", "eval_accuracy", "eval_margin"), 1e-5)
    assert difference(two, one) <= 1e-5


ONE_SMALL_GPU = """
import sys, torch
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train
from rm_recipe.training.trainer import SharedPrefixRewardTrainer as Trainer

compute = Trainer.compute_loss

def compute_loss(self, model, inputs, *args, **kwargs):
    if self.args.process_index == 0 and len(inputs.get("names", [])) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return compute(self, model, inputs, *args, **kwargs)

Trainer.compute_loss = compute_loss
train(read_recipe(sys.argv[1]))
"""


def test_where_one_process_alone_is_out_of_memory_both_halve_their_micro_batches(runs, two):
    recipe = runs.recipe("halved", per_device_train_batch_size=4)
    (script := recipe.parent / "one_small_gpu.py").write_text(ONE_SMALL_GPU)
    launch("cpu_two_processes", str(script), str(recipe))
    run = recipe.parent / "run"
    assert json.loads((run / "run.json").read_text())["micro_batch_tokens"] > 0
    assert_same(run, two, ("loss", "accuracy", "eval_loss"), 1e-4)


def test_two_processes_that_fail_in_training_end_with_one_message(runs):
    """Both have the loss of both, so both stop; neither waits for the other."""
    recipe = runs.recipe("failing", per_device_train_batch_size=4, learning_rate=1e30, max_grad_norm=0)
    result = start("cpu_two_processes", "-m", "rm_recipe", "train", str(recipe))
    assert result.returncode != 0
    assert result.stderr.count("rm-recipe: the loss is not a finite number in step") == 1


def test_a_bad_recipe_under_accelerate_launch_is_told_once(runs):
    result = start("cpu", "-m", "rm_recipe", "train", str(runs.recipe("misspelt", lerning_rate=1)))
    assert result.returncode != 0
    assert result.stderr.count("unknown key 'lerning_rate'") == 1


def stop(recipe: Path, signalled: str) -> tuple[float, int, str]:
    """Two processes at work are told to stop: seconds until they have, the launcher's code, what was said.

    Args:
        signalled: `launcher`, or the rank that alone hears of it.
    """
    command = [*LAUNCH, str(CONFIGS["cpu_two_processes"]), "-m", "rm_recipe", "train", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **PIPED) as process:
        for line in process.stdout:
            if line.startswith("{'loss'"):
                break
        launcher = psutil.Process(process.pid)
        ranks = {child.environ().get("RANK"): child for child in launcher.children()}
        ranks.get(signalled, launcher).send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, err = process.communicate(timeout=60)
        return time.monotonic() - began, process.returncode, err


UNWATCHED = {"eval_strategy": "no", "eval_steps": "omit"}
LONG = {"per_device_train_batch_size": 4, "num_train_epochs": 60, **UNWATCHED}


def test_two_processes_one_of_which_is_told_to_stop_save_once_and_leave_together(runs):
    """A launcher kills after 30 seconds what has not ended."""
    recipe = runs.recipe("stopped", **LONG)
    seconds, code, err = stop(recipe, "1")
    assert code != 0
    assert seconds < 30
    (saved,) = (recipe.parent / "run").glob("checkpoint-*")
    assert fault_of(saved) is None
    assert {path.name for path in saved.glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    said = f"rm-recipe: interrupted after step {saved.name[11:]} of 480, which is saved in {saved}\n"
    assert err.count(said + "go on with the same `accelerate launch` and --resume\n") == 1


@pytest.mark.slow
def test_two_processes_that_their_launcher_stopped_go_on_as_if_they_had_not_been(runs):
    recipe, whole = runs.recipe("resumed", **LONG), runs.recipe("whole", **LONG)
    stop(recipe, "launcher")
    launch("cpu_two_processes", "-m", "rm_recipe", "train", str(recipe), "--resume")
    launch("cpu_two_processes", "-m", "rm_recipe", "train", str(whole))
    ours, theirs = recipe.parent / "run", whole.parent / "run"
    assert difference(ours, theirs) == 0
    assert_same(ours, theirs, ("loss", "accuracy", "margin", "num_tokens"), 0)


@pytest.mark.slow
def test_two_machines_that_meet_learn_what_one_process_does(runs, one):
    """Two launchers on this machine, one process each, that find each other by the first one's port."""
    recipe = runs.recipe("nodes", per_device_train_batch_size=4)
    port = str(get_free_port())

    def node(rank: int):
        here = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        command = ["--machine_rank", str(rank), "--num_processes", "2", *here]
        return launch("multi_node", *command, "-m", "rm_recipe", "train", str(recipe))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(node, (0, 1))
    run = runs.folder / "nodes" / "run"
    assert "prefix sharing: on" in first.stdout
    assert "prefix sharing" not in second.stdout
    assert_same(run, one, ("loss", "eval_loss"), 1e-5)
    assert difference(run, one) <= 1e-5


# --- sharded -------------------------------------------------------------------------------------


def assert_sharded(found: list[dict], engine: str, base: torch.dtype) -> None:
    """Each rank has half of every layer, each parameter in its own precision, and gets rewards in fp32."""
    for rank in found:
        assert engine in rank["engine"]
        assert rank["rewards"] == torch.float32
        parameters = rank["parameters"]
        trained = {name for name, (_, requires_grad, _) in parameters.items() if requires_grad}
        assert any("score" in name for name in trained)
        for name, (dtype, _, share) in parameters.items():
            wanted = torch.float32 if name in trained or "score" in name else base
            assert dtype == wanted, name
            if ".layers." in name:  # what comes after them stays whole after an evaluation
                assert share == 0.5, name


ENGINES = {"fsdp": "FSDP", "deepspeed_zero3": "DeepSpeedEngine"}
SHARDED_BY = ["fsdp", pytest.param("deepspeed_zero3", marks=needs_deepspeed)]


@pytest.mark.slow
@pytest.mark.parametrize("config", SHARDED_BY)
def test_sharded_over_two_processes_a_model_learns_and_saves_what_one_process_does(runs, one, config):
    run, found = runs.sharded(config, config)
    assert_sharded(found, ENGINES[config], torch.float32)
    assert_same(run, one, ("loss", "eval_loss", "eval_accuracy"), 1e-5)
    assert logged(run, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-4)
    assert difference(run, one) <= 1e-5
    item = {"prompt": "hello", "response": "good"}
    ours, theirs = (RewardModel.from_pretrained(path).score([item])[0] for path in (run, one))
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", SHARDED_BY)
def test_sharded_adapters_and_head_stay_fp32_on_a_bf16_base(runs, config):
    """Left alone, Accelerate would have rewards computed in bf16, and what DeepSpeed saves be bf16 too."""
    keys = {"bf16": True, "dtype": "bfloat16", **UNWATCHED, "gradient_checkpointing": True}
    run, found = runs.sharded(f"{config}-bf16", config, **keys)
    assert_sharded(found, ENGINES[config], torch.bfloat16)
    alone = runs.alone(f"{config}-alone", **keys)
    assert logged(run, "loss")[0] == pytest.approx(logged(alone, "loss")[0], abs=1e-6)
    assert logged(run, "loss") == pytest.approx(logged(alone, "loss"), abs=0.1)  # bf16 sums differ by batch
    assert {value.dtype for value in weights(run).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharding_that_one_process_would_not_get_is_refused(write_recipe, monkeypatch, name):
    """Accelerate would leave the model whole."""
    recipe = read_recipe(write_recipe())
    check_sharding(recipe)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(RecipeError, match=rf"{name} was asked for .* here are 1 process\(es\) on cpu"):
        check_sharding(recipe)


# --- evaluation ----------------------------------------------------------------------------------


def test_two_processes_evaluate_each_comparison_once_and_print_one_table(two):
    evaluate(str(two))
    alone = json.loads((two / "evaluation.json").read_text())["datasets"][HELD_OUT]
    lines = [json.loads(line) for line in (two / "predictions.jsonl").open()]
    (two / "evaluation.json").unlink()
    (two / "predictions.jsonl").unlink()
    result = launch("cpu_two_processes", "-m", "rm_recipe", "evaluate", str(two))
    assert result.stdout.count("Preference accuracy") == 1
    together = json.loads((two / "evaluation.json").read_text())["datasets"][HELD_OUT]
    assert together["n_scored"] == 39
    assert together["accuracy"] == alone["accuracy"]
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-6)
    shared = [json.loads(line) for line in (two / "predictions.jsonl").open()]
    assert [line["index"] for line in shared] == list(range(39))
    for ours, theirs in zip(shared, lines, strict=True):
        assert ours["rewards"] == pytest.approx(theirs["rewards"], abs=1e-6)
