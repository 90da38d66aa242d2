"""The memory plan counts what a real step takes, says whether to checkpoint and what to lower."""

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY_DECODER, base_of, make_tokenizer, save_base, train_watched
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from rm_recipe.data.comparison import Encoded
from rm_recipe.errors import RecipeError
from rm_recipe.files import read_json
from rm_recipe.model import lora, memory, row_attention
from rm_recipe.model.memory import MemoryPlan, plan
from rm_recipe.model.reward_model import load_base, outline
from rm_recipe.model.shared_prefix import padded_rows, shared_rows
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe import relations
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.check import check_memory, fit_by_config, read_as_on_gpu
from rm_recipe.training.train import decide_step

BATCH = [Encoded([5] * 60, [[6] * 20, [7] * 24])] * 4
CPU, GPU, GB = torch.device("cpu"), torch.device("cuda"), 1e9


@pytest.fixture
def six_layers(tmp_path):
    """The folder of a Llama of so many."""
    base = base_of(AutoModelForCausalLM, "llama", TINY_DECODER | {"num_hidden_layers": 6})
    return str(save_base(tmp_path / "base", base, make_tokenizer()))


def planned(config, recipe, **keys):
    return plan(config, recipe.model, recipe.training, ["score"], BATCH, **keys)


def really(model, recipe, shared: bool, checkpointing: bool) -> tuple[int, int, int]:
    """Of a step with real tensors: bytes of weights, how many are trained, and bytes of the peak beside."""
    by_block = row_attention.by_block(model)
    if recipe.model.use_peft:
        model = lora.add_lora(model, recipe.model, ["score"], autocast=recipe.training.bf16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    rows = shared_rows(BATCH, 0, by_block) if shared else padded_rows(BATCH, 0)
    if by_block:
        row_attention.announce_rows(rows["attention_mask"])
    live = memory._LiveBytes()
    for parameter in model.parameters():
        live.count(parameter)
    weights = live.now
    with live, lora.in_one_product(model):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.training.bf16):
                model(**rows).logits.float().sum().backward()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return weights, trained, live.peak - weights


@pytest.mark.parametrize(
    ("keys", "shared", "checkpointing", "attention"),
    [
        ({}, True, True, "sdpa"),
        ({}, False, False, "sdpa"),
        ({"bf16": True}, True, False, row_attention.NAME),
        ({"use_peft": False, "bf16": True}, False, True, "sdpa"),
        ({"lora_target_modules": [r".*layers\.[45]\..*_proj"]}, True, False, "sdpa"),
    ],
    ids=["checkpointed", "padded", "bf16 by block", "in full", "upper layers"],
)
def test_the_plan_is_what_a_real_step_takes(six_layers, write_recipe, keys, shared, checkpointing, attention):
    recipe = read_recipe(write_recipe(model_name_or_path=six_layers, **keys))
    model, _ = load_base(recipe.model, load_tokenizer(six_layers), 0)
    model.set_attn_implementation(attention)
    found = planned(model.config, recipe, shared=shared, checkpointing=checkpointing)
    weights, trained, step = really(model, recipe, shared, checkpointing)
    assert found.weights == weights
    assert found.optimizer == 8 * trained
    assert found.step == pytest.approx(step, rel=0.03)


def test_a_gpus_step_is_planned_by_flash_attention_in_half_precision_alone(six_layers, write_recipe):
    """It knows no fp32, which goes by block there, too."""

    def step(device, **keys) -> int:
        recipe = read_recipe(write_recipe(model_name_or_path=six_layers, **keys))
        model, _ = load_base(recipe.model, load_tokenizer(six_layers), 0)
        model.set_attn_implementation(row_attention.NAME)
        return planned(model.config, recipe, shared=True, checkpointing=False, device=device).step

    assert step(GPU) == step(CPU)
    assert step(GPU, bf16=True) != step(CPU, bf16=True)


# Of the bodies' linear layers.
LINEAR = {"llama": 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3), "gpt2": 2 * 32 * 32 * (3 + 1 + 4 + 4)}


@pytest.mark.parametrize("name", LINEAR)
def test_four_and_eight_bits_are_counted_as_they_are_stored(tiny_base, write_recipe, name):
    """Also where a base comes in them."""
    base = str(tiny_base(name))

    def weights(comes: dict | None = None, **keys) -> int:
        recipe = read_recipe(write_recipe(model_name_or_path=base, dtype="bfloat16", **keys))
        config = outline(lora.load_config(base), base).config
        config.pad_token_id = 0
        if comes:
            config.quantization_config = comes
        return planned(config, recipe, shared=True, checkpointing=False).weights

    whole = weights()
    for bits, each in ((8, 1.0), (4, 0.5 + 4 / 64)):
        quantised = {f"load_in_{bits}bit": True}
        expected = whole - LINEAR[name] * (2 - each)
        assert weights(**quantised) == pytest.approx(expected, abs=1)
        assert weights({"quant_method": "bitsandbytes", **quantised}) == pytest.approx(expected, abs=1)


SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_labels": 1}
TINYLLAMA = LlamaConfig(**SIZES, num_attention_heads=32, num_key_value_heads=4, pad_token_id=0)


@pytest.mark.parametrize(("name", "room"), [("tinyllama_hh_lora", 8 * GB), ("tinyllama_hh_qlora", 6 * GB)])
def test_the_tinyllama_recipes_fit_the_gpus_they_name_at_their_max_length(name, room):
    """By the plan; with conversations of 1,024 tokens that share nothing."""
    recipe = read_as_on_gpu(REPOSITORY / "recipes" / f"{name}.yaml", [])
    assert recipe.training.max_length == 1024
    batch = [Encoded([5], [[6] * 1023] * 2)] * 4  # as large a micro-batch as is worth the name
    parts = (TINYLLAMA, recipe.model, recipe.training, ["score"], batch)
    found = plan(*parts, shared=True, checkpointing=True, device=GPU)
    assert found.fits(room)
    assert found.weights > 0.5 * GB


def test_ligers_kernels_are_planned_as_they_were_measured_on_a_gpu():
    """34.5 and 26.6 GB (recipes/README.md)."""
    recipe = read_as_on_gpu(REPOSITORY / "recipes" / "tinyllama_hh_lora.yaml", ["--dtype", "bfloat16"])
    config = copy.deepcopy(TINYLLAMA)
    config._attn_implementation = row_attention.NAME
    parts = (config, recipe.model, recipe.training, ["score"], [Encoded([5] * 560, [[6] * 280] * 2)] * 16)
    without, fused = (
        plan(*parts, shared=True, checkpointing=False, device=GPU).peak - memory.PROCESS
        for recipe.training.use_liger_kernel in (False, True)
    )
    assert without == pytest.approx(34.5 * GB, rel=0.03)
    assert fused == pytest.approx(26.6 * GB, rel=0.03)


# --- what fits ------------------------------------------------------------------------------------


@pytest.fixture
def fitted(write_recipe, monkeypatch):
    """A function: what fits a GPU of so many GB, if a comparison takes one, or half with checkpointing."""

    def make(room: float, **keys):
        keys = {"gradient_checkpointing": "omit", "per_device_train_batch_size": 8} | keys
        recipe = read_as_on_gpu(write_recipe(**keys), [])
        with monkeypatch.context() as patch:
            patch.setattr(memory, "plan", step)
            return fit_by_config(recipe, GPU, (room * GB + memory.PROCESS) / (1 - memory.SPARE) + 1)

    def step(config, model, training, new, batch, *, checkpointing, **_):
        return MemoryPlan(0, 0, round(len(batch) * GB * (0.5 if checkpointing else 1)))

    return make


@pytest.mark.parametrize(
    ("room", "keys", "fits", "checkpointing", "largest"),
    [
        (20, {}, True, False, 20),
        (4, {}, True, False, 4),
        (0.6, {}, True, True, 1),
        (4, {"gradient_checkpointing": True}, True, True, 8),
        (0.6, {"gradient_checkpointing": False}, False, False, 0),
        (0.4, {}, False, True, 0),
        (1e3, {}, True, False, memory.LARGEST),
    ],
)
def test_checkpointing_is_used_where_only_that_fits_and_the_largest_batch_is_found(
    fitted, room, keys, fits, checkpointing, largest
):
    found = fitted(room, **keys)
    assert (found.fits, found.checkpointing, found.largest) == (fits, checkpointing, largest)


def test_what_to_lower_where_not_one_comparison_fits(fitted):
    assert "gradient_checkpointing: true" in fitted(0.6, gradient_checkpointing=False).lower
    assert "a lower max_length or load_in_4bit: true" in fitted(0.4).lower


def test_what_is_advised_out_of_memory_is_accepted_and_changes_no_step(write_recipe):
    path = write_recipe(per_device_train_batch_size="auto", comparisons_per_step=12)
    advised = dict(re.findall(r"(\w+): (\d+)", memory.too_little(read_recipe(path))))
    assert advised == {"per_device_train_batch_size": "6"}
    after = read_recipe(path, [f"--{key}={value}" for key, value in advised.items()]).training
    assert after.per_device_train_batch_size * after.gradient_accumulation_steps == 12
    divided = read_recipe(path, ["--micro_batch_tokens", "900"])
    assert "take micro_batch_tokens: 450;" in memory.too_little(divided)
    one = write_recipe(per_device_train_batch_size=1, gradient_checkpointing=True)
    assert "take a lower max_length;" in memory.too_little(read_recipe(one))


def test_no_weight_is_read(write_recipe, tiny_llama, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    recipe = read_recipe(write_recipe(model_name_or_path=str(tmp_path / "base")))
    assert fit_by_config(recipe, CPU, 8e9, larger=False).plan.weights > 0


def test_the_plan_for_a_gpu_has_a_gpus_precision_on_any_machine(write_recipe):
    recipe = read_as_on_gpu(write_recipe(bf16="omit", use_cpu="omit"), ["--seed", "1"])
    assert recipe.training.bf16
    assert recipe.model.dtype == "bfloat16"
    assert recipe.training.seed == 1
    assert read_as_on_gpu(write_recipe(bf16="omit"), ["--bf16=false"]).training.bf16 is False


def test_the_table_has_every_part_and_sums_up(write_recipe, capsys, monkeypatch):
    monkeypatch.setattr(memory, "LARGEST", 8)  # no search for the largest batch
    assert check_memory(write_recipe(gradient_checkpointing="omit", max_length=512), [], "8GB")
    out = capsys.readouterr().out
    sizes = [float(size) for size in re.findall(r"(\d+\.\d\d) GB", out)]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.03)
    assert "fits 8.0 GB" in out
    assert "largest per_device_train_batch_size that fits: 8" in out
    smaller = write_recipe(gradient_checkpointing="omit", per_device_train_batch_size=1)
    assert not check_memory(smaller, [], "0.7 GB")
    out = capsys.readouterr().out
    assert "does not fit 0.7 GB" in out
    assert "instead: a lower max_length or load_in_4bit: true" in out


@pytest.mark.parametrize(("use_cpu", "kind"), [("omit", "CUDA"), (True, "CPU")])
def test_unless_told_of_a_gpu_the_plan_is_for_this_machine(write_recipe, capsys, monkeypatch, use_cpu, kind):
    """One with a GPU, which a recipe may leave alone."""
    device = property(lambda training: CPU if training.use_cpu else GPU)
    monkeypatch.setattr(TrainingArguments, "device", device)
    kinds = {None: "cuda", True: "cpu"}
    monkeypatch.setattr(relations, "device_of", lambda values: kinds[values.get("use_cpu")])
    monkeypatch.setattr("rm_recipe.tools.check.device_memory", lambda _: 12e9)
    monkeypatch.setattr(memory, "plan", lambda *_, **__: MemoryPlan(0, 0, 0))  # the real one takes seconds
    assert check_memory(write_recipe(use_cpu=use_cpu, per_device_train_batch_size=1), [])
    out = capsys.readouterr().out
    assert f"a training step on {kind}, " in out
    assert "fits 12.0 GB" in out


def test_what_cannot_be_planned_is_one_message_and_is_checkpointed(write_recipe, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no such kernel. Really")

    monkeypatch.setattr(memory, "plan", fails)
    said = "of this llama needs could not be planned: RuntimeError: no such kernel"
    with pytest.raises(RecipeError, match=said):
        check_memory(write_recipe(), [], "8GB")
    recipe, split = read_recipe(write_recipe(gradient_checkpointing="omit")), SimpleNamespace(longest=None)
    split.longest = lambda n, shared: BATCH[:n]
    decide_step(recipe, SimpleNamespace(config=LlamaConfig()), ["score"], split, shared=True)
    assert recipe.training.gradient_checkpointing
    assert re.search(said, capsys.readouterr().out)


def test_what_is_decided_is_said_and_recorded_and_changes_nothing_that_is_learnt(
    write_recipe, tmp_path, monkeypatch, capsys
):
    """Checkpointing is for a device on which not even the longest comparison fits without it."""
    keys = {"gradient_checkpointing": "omit", "max_steps": 4, "optim": "sgd"}

    def run(name: str):
        result = train_watched(write_recipe(**keys, output_dir=str(tmp_path / name)))
        return result, capsys.readouterr().out

    whole, said = run("whole")
    assert "micro-batches" not in said
    with monkeypatch.context() as patch:
        patch.setattr(memory, "device_memory", lambda _: 1.0)
        checkpointed, said = run("checkpointed")
    assert "gradient checkpointing: on, micro-batches of up to " in said
    assert checkpointed.model.is_gradient_checkpointing
    saved = yaml.safe_load((checkpointed.run / "recipe.yaml").read_text())
    assert saved["gradient_checkpointing"] is saved["activation_checkpointing"] is True

    def at_most_three(*args, **more):
        return replace(plan(*args, **more), optimizer=10**15 * (len(args[4]) > 3))

    monkeypatch.setattr(memory, "plan", at_most_three)
    divided, said = run("divided")
    tokens = read_json(divided.run / "run.json")["micro_batch_tokens"]
    assert f"off, micro-batches of up to {tokens} tokens (the largest" in said
    assert not divided.model.is_gradient_checkpointing
    for other in (checkpointed.saved(), divided.saved()):
        assert all(torch.allclose(other[key], value, atol=1e-6) for key, value in whole.saved().items())


# --- what a device has ------------------------------------------------------------------------------


def cgroup(folder: str, limit: str) -> dict[str, str]:
    """The files of a cgroup that uses 2.5 GB, half of one in cached files."""
    used = {"max": limit, "current": "2500000000", "stat": "anon 1\ninactive_file 500000000\n"}
    return {f"{folder}memory.{name}": content for name, content in used.items()}


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        ("0::/\n", {}, 20),
        ("3:cpu:/a\n0::/job/1\n", cgroup("job/", "8000000000\n") | cgroup("job/1/", "max\n"), 6),
        ("0::/seen/from/the/host\n", cgroup("", "8000000000\n"), 6),
    ],
)
def test_memory_is_what_is_free_and_what_a_container_allows(monkeypatch, tmp_path, membership, files, free):
    own = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=int(GB)))
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(20 * GB)))
    monkeypatch.setattr(memory.psutil, "Process", lambda: own)
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(content)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    assert memory.device_memory(CPU) == (free + 1) * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.device_memory(CPU) == (free / 2 + 1) * GB


def test_what_a_gpu_beside_it_takes_is_not_the_peak_of_a_training_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: GPU)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 0)
    memory.reset_peak_memory()
    assert memory.peak_memory() > 1e8
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 5)
    assert memory.peak_memory() == 5


def test_apples_memory_which_torch_has_no_such_count_of_is_left_alone(monkeypatch):
    """torch to 2.12 fails there: 'Allocator for mps is not a DeviceAllocator'."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    asked = []
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: asked.append("mps"))
    memory.free_unused()
    assert not asked
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: GPU)
    memory.free_unused()
    assert asked
