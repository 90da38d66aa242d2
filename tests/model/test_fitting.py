"""What fits a device is known from a configuration, and what to lower where it does not."""

import re

import pytest
import torch
from conftest import REPOSITORY
from transformers import AutoConfig

from rm_recipe.cli import app
from rm_recipe.errors import RecipeError
from rm_recipe.model import memory
from rm_recipe.model.memory import fit_by_config, read_for, shipped_that_fit, what_to_lower, with_batch_of
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.check import check_memory, parse_bytes

GPU = torch.device("cuda")


@pytest.fixture
def planned(write_recipe):
    """A function: `fit_by_config` of the tiny Llama's recipe on a GPU of so many bytes."""

    def plan(room: float, larger: bool = False, **keys):
        keys = {"gradient_checkpointing": "omit", "per_device_train_batch_size": 8, "max_length": 512, **keys}
        recipe = read_for(write_recipe(**keys), [], GPU)
        return fit_by_config(recipe, GPU, room, larger), recipe

    return plan


def room_for(peak: int) -> float:
    """A device that a step of this peak just fits."""
    return peak / (1 - memory.SPARE) + 1


def test_no_weight_is_read(planned, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "config only").mkdir()
    (tmp_path / "config only" / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    whole, _ = planned(8e9)
    alone, _ = planned(8e9, model_name_or_path=str(tmp_path / "config only"))
    assert alone == whole


@pytest.mark.slow
def test_the_largest_batch_is_the_largest_that_fits(planned):
    one, _ = planned(8e9, per_device_train_batch_size=1, gradient_checkpointing=False)
    for n in (3, 8, 20):
        exactly, _ = planned(8e9, per_device_train_batch_size=n, gradient_checkpointing=False)
        found, _ = planned(room_for(exactly.plan.peak), larger=True, gradient_checkpointing=False)
        assert found.largest == n
        assert found.fits is (n >= 8)
    assert planned(room_for(one.plan.peak) - 100, gradient_checkpointing=False)[0].largest == 0
    assert planned(1e12, larger=True)[0].largest == memory.LARGEST


def test_checkpointing_is_said_to_be_needed_where_only_that_fits(planned):
    without, _ = planned(1e12, gradient_checkpointing=False)
    with_it, _ = planned(1e12, gradient_checkpointing=True)
    assert with_it.plan.peak < without.plan.peak
    assert not planned(room_for(without.plan.peak))[0].checkpointing
    needed, _ = planned(room_for(with_it.plan.peak))
    assert needed.checkpointing
    assert needed.without == without.plan
    assert needed.fits


def test_what_to_lower_is_what_would_fit(planned):
    n_2, _ = planned(1e12, per_device_train_batch_size=2, gradient_checkpointing=True)
    found, recipe = planned(room_for(n_2.plan.peak), gradient_accumulation_steps=4)
    assert not found.fits
    lower = what_to_lower(found, recipe)
    assert lower == "per_device_train_batch_size: 2 with gradient_accumulation_steps: 16 fits"
    told = dict(pair.split(": ") for pair in re.findall(r"\w+: \d+", lower))
    again, _ = planned(room_for(n_2.plan.peak), **{key: int(value) for key, value in told.items()})
    assert again.fits
    nothing, recipe = planned(memory.PROCESS, gradient_checkpointing=False)
    assert what_to_lower(nothing, recipe) == "gradient_checkpointing: true keeps less for the backward"
    nothing, recipe = planned(memory.PROCESS)
    assert (
        what_to_lower(nothing, recipe)
        == "not one comparison fits; try a lower max_length or load_in_4bit: true"
    )


@pytest.mark.parametrize(
    ("batch", "accumulation", "most", "keys"),
    [(8, 1, 5, (4, 2)), (16, 2, 12, (8, 4)), (9, 1, 8, (3, 3)), (1, 4, 3, (2, 2)), (7, 1, 6, (1, 7))],
)
def test_a_smaller_batch_has_as_many_comparisons_a_step_so_that_the_run_can_be_resumed(
    write_recipe, batch, accumulation, most, keys
):
    recipe = read_recipe(
        write_recipe(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    )
    size, steps = keys
    assert with_batch_of(recipe, most) == (
        f"per_device_train_batch_size: {size} with gradient_accumulation_steps: {steps}"
    )
    assert size * steps == batch * accumulation


def test_what_cannot_be_planned_is_one_message(write_recipe, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no such kernel. Really")

    monkeypatch.setattr(memory, "plan", fails)
    with pytest.raises(RecipeError, match="of this llama needs could not be planned: RuntimeError: no such"):
        check_memory(write_recipe(), [], "8GB")


def test_the_plan_for_a_gpu_has_a_gpus_precision_on_any_machine(write_recipe):
    recipe = read_for(write_recipe(bf16="omit", use_cpu="omit"), ["--seed", "1"], GPU)
    assert recipe.training.bf16
    assert recipe.model.dtype == "bfloat16"
    assert recipe.training.seed == 1
    assert read_for(write_recipe(), [], torch.device("cpu")).training.bf16 is False


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8e9), ("8", 8e9), ("7.5 gb", 7.5e9), ("8GiB", 2**33), ("8000MB", 8e9)]
)
def test_a_gpus_memory_is_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 apples", "-8GB", "0GB", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="is not a size such as 8GB"):
        parse_bytes(text)


@pytest.fixture
def hub(monkeypatch, tiny_llama):
    """A function that lets every configuration be the tiny Llama's, or none be had; what was asked for."""
    asked = []

    def answers(reachable: bool) -> list[str]:
        def load_config(name, *_):
            asked.append(name)
            if reachable:
                return AutoConfig.from_pretrained(tiny_llama)
            raise RecipeError("the Hub cannot be reached")

        monkeypatch.setattr(memory.source, "load_config", load_config)
        monkeypatch.setattr(memory.tokenizer, "check_lengths", lambda *_: None)
        monkeypatch.chdir(REPOSITORY / "tests")  # where no offline model lies
        return asked

    return answers


RECIPES = sorted(path.stem for path in memory.SHIPPED.glob("*.yaml"))


@pytest.mark.parametrize(("room", "fits"), [(1e12, True), (memory.PROCESS, False)])
def test_recipes_that_fit_are_named_and_one_that_cannot_be_planned_is_no_hindrance(hub, room, fits):
    """The tiny Llama has no upper half of 30 layers, as `smollm2_offline` wants to adapt."""
    hub(reachable=True)
    others = [name for name in RECIPES if name != "smollm2_offline"]
    assert shipped_that_fit(GPU, room) == (others * fits, ["smollm2_offline"])


def test_recipes_without_a_configuration_are_named_and_the_hub_is_asked_once(hub):
    asked = hub(reachable=False)
    assert shipped_that_fit(GPU, 1e12) == ([], RECIPES)
    assert len(asked) == 1


def test_the_table_has_every_part_and_sums_up(write_recipe, capsys):
    path = write_recipe(gradient_checkpointing="omit", max_length=512)
    assert check_memory(path, [], "8GB")
    out = capsys.readouterr().out
    sizes = [float(size) for size in re.findall(r"(\d+\.\d\d) GB", out)]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.03)
    for part in ("base ", "adapters and head", "optimizer", "activations and gradients of 8", "fits 8.0 GB"):
        assert part in out
    assert "gradient checkpointing: not needed\nlargest per_device_train_batch_size that fits: " in out
    assert re.search(r"\nevaluation: about [12]\.\d GB\nexport, verified in fp32: about [12]\.\d GB\n", out)
    assert max(map(len, out.splitlines())) <= 80


def test_a_plan_that_does_not_fit_says_what_would(write_recipe, capsys, monkeypatch):
    monkeypatch.setattr("rm_recipe.tools.check.shipped_that_fit", lambda *_: (["tiny"], ["far_away"]))
    assert not check_memory(write_recipe(gradient_checkpointing="omit"), [], "700 MB")
    out = capsys.readouterr().out
    assert "does not fit 0.7 GB" in out
    assert "instead: not one comparison fits; try a lower max_length or load_in_4bit: true\n" in out
    assert (
        "recipes that fit:\n  tiny\nnot known, as their base's config.json is not to be had:\n  far_away\n"
        in out
    )
    assert max(map(len, out.splitlines())) <= 80


def test_gpu_memory_without_a_plan_is_refused(write_recipe):
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["check", str(write_recipe()), "--gpu-memory", "8GB"])
    assert result.exit_code == 2
    assert "--gpu-memory is for --plan" in result.output


def test_reading_a_recipe_for_a_gpu_leaves_what_the_command_line_says(write_recipe):
    assert read_recipe(write_recipe()).training.bf16 is False
    assert read_for(write_recipe(bf16="omit"), ["--bf16=false"], GPU).training.bf16 is False
