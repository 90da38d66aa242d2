"""The memory plan counts what a real step takes, and decides whether gradients are checkpointed."""

import copy
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import REPOSITORY, make_tokenizer, train_watched
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rm_recipe.data.comparison import Encoded
from rm_recipe.model import cpu_attention, lora, memory
from rm_recipe.model.head import to_float32
from rm_recipe.model.memory import MemoryPlan, fits_in_float32, needs_checkpointing, plan
from rm_recipe.model.shared_prefix import padded_rows, shared_rows
from rm_recipe.recipe.reader import read_recipe

BATCH = [Encoded([5] * 60, [[6] * 20, [7] * 24])] * 4
GB = 1e9


@pytest.fixture
def small(tmp_path):
    """A recipe's parts for a Llama of six layers, by `--key value` overrides."""

    def make(*overrides: str):
        path = tmp_path / "r.yaml"
        path.write_text("model_name_or_path: m/m\ndataset_name: d/d\nuse_peft: true\n")
        precision = [] if "--bf16" in overrides else ["--bf16", "false"]
        recipe = read_recipe(path, ["--use_cpu", "true", *precision, *overrides])
        config = LlamaConfig(
            vocab_size=len(make_tokenizer()), hidden_size=64, intermediate_size=160, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, num_labels=1,
        )  # fmt: skip
        return config, recipe.model, recipe.training, ["score"]

    return make


def test_the_plan_is_of_the_rows_that_a_cpu_computes(small):
    """Each comparison by itself: scores of the whole batch's tokens squared are no part of it."""
    config, *parts = small()
    batch = [Encoded([5] * 120, [[6] * 40, [7] * 48])] * 8
    dense = plan(config, *parts, batch, shared=True, checkpointing=False).step
    config._attn_implementation = cpu_attention.NAME
    by_block = plan(config, *parts, batch, shared=True, checkpointing=False).step
    really_live = really(config, *parts, True, False, batch)[2]
    assert by_block == pytest.approx(really_live, rel=0.03)
    assert by_block < dense


def test_dropout_in_attention_is_planned_as_a_cpu_computes_it(small):
    config, *parts = small()
    config._attn_implementation, config.attention_dropout = cpu_attention.NAME, 0.1
    planned = plan(config, *parts, BATCH, shared=True, checkpointing=False).step
    assert planned == pytest.approx(really(config, *parts, True, False)[2], rel=0.03)


def really(
    config, model_config, training, new, shared: bool, checkpointing: bool, batch=BATCH
) -> tuple[int, int, int]:
    """Bytes of weights, of trained weights, and of the peak beside them, of a step with real tensors."""
    dtype = getattr(torch, model_config.dtype) if model_config.use_peft else torch.float32
    by_block = config._attn_implementation == cpu_attention.NAME
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if by_block:
        model.set_attn_implementation(cpu_attention.NAME)
    model.config.use_cache = False
    to_float32(model, new[0])
    if model_config.use_peft:
        model = lora.add_lora(model, model_config, new, autocast=training.bf16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    rows = shared_rows(batch, 0, by_block) if shared else padded_rows(batch, 0)
    rows.pop("ends", None)
    if by_block:
        cpu_attention.announce_rows(rows["attention_mask"])
    live = memory._LiveBytes()
    for parameter in model.parameters():
        live.count(parameter)
    weights = live.now
    with live, lora.in_one_product(model):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=training.bf16):
                model(**rows).logits.float().sum().backward()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return weights, trained, live.peak - weights


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        ([], True),
        ([], False),
        (["--bf16", "true"], True),
        (["--use_peft", "false"], False),
        (["--use_peft", "false", "--bf16", "true"], False),
        (["--lora_target_modules", r".*layers\.[45]\..*_proj"], True),
    ],
    ids=["fp32", "padded", "bf16", "in full", "in full, bf16", "upper layers"],
)
def test_the_plan_is_what_a_real_step_takes(small, overrides, shared, checkpointing):
    parts = small(*overrides)
    planned = plan(*parts, BATCH, shared=shared, checkpointing=checkpointing)
    weights, trained, step = really(*parts, shared, checkpointing)
    assert planned.weights == weights
    assert planned.optimizer == 8 * trained
    assert planned.step == pytest.approx(step, rel=0.03)


def test_four_and_eight_bits_are_counted_as_they_are_stored(small):
    def weights(*overrides: str) -> int:
        return plan(*small(*overrides), BATCH, shared=True, checkpointing=False).weights

    whole = weights("--dtype", "bfloat16")
    linear = 6 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 160 * 3)
    for keys, each in (
        (["--load_in_8bit", "true"], 1.0),
        (["--load_in_4bit", "true"], 0.5 + 4 / 64),
        (["--load_in_4bit", "true", "--use_bnb_nested_quant", "true"], 0.5 + 1 / 64 + 4 / 64 / 256),
    ):
        assert weights("--dtype", "bfloat16", *keys) == pytest.approx(whole - linear * (2 - each), abs=1)


TINYLLAMA = LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, num_labels=1, pad_token_id=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "memory_of_gpu"), [("tinyllama_hh_lora", 8 * GB), ("tinyllama_hh_qlora", 6 * GB)]
)
def test_the_tinyllama_recipes_fit_the_gpus_they_name_at_their_max_length(monkeypatch, name, memory_of_gpu):
    """By the plan; with conversations of 1,024 tokens that share nothing. Nothing was run on such a GPU."""
    path = REPOSITORY / "recipes" / f"{name}.yaml"
    assert "gradient_checkpointing" not in yaml.safe_load(path.read_text())
    recipe = read_recipe(path, ["--use_cpu", "true", "--bf16", "true"])
    assert recipe.training.max_length == 1024
    monkeypatch.setattr(memory, "HEAP_ON_CPU", (1.0, 1.0))
    batch = [Encoded([5], [[6] * 1023] * 2)] * recipe.training.per_device_train_batch_size
    parts = (copy.deepcopy(TINYLLAMA), recipe.model, recipe.training, ["score"], batch)
    with_it = plan(*parts, shared=True, checkpointing=True)
    assert with_it.fits(memory_of_gpu)
    assert with_it.weights > 0.5 * GB
    monkeypatch.setattr(memory, "device_memory", lambda _: memory_of_gpu)
    needed, reason = needs_checkpointing(*parts, shared=True)
    assert needed
    assert f"the largest batch needs about {with_it.peak / GB:.1f} of {memory_of_gpu / GB:.1f} GB" in reason


def test_checkpointing_is_used_where_a_step_fits_only_with_it(small, monkeypatch):
    parts = (*small(), BATCH)
    without, with_it = (plan(*parts, shared=True, checkpointing=c).peak for c in (False, True))
    assert with_it < without
    answers = []
    for room in (without, with_it, with_it - memory.PROCESS):
        monkeypatch.setattr(memory, "device_memory", lambda _, room=room: room / (1 - memory.SPARE) + 1)
        answers.append(needs_checkpointing(*parts, shared=True))
    assert [needed for needed, _ in answers] == [False, True, True]
    assert answers[1][1].endswith(f", without it {without / GB:.1f}")
    assert answers[2][1].endswith("even so: lower per_device_train_batch_size or max_length")


def test_what_cannot_be_planned_is_checkpointed(small, monkeypatch):
    monkeypatch.setattr(memory, "_measure_step", lambda *_: {}["gone"])
    needed, reason = needs_checkpointing(*small(), BATCH, shared=True)
    assert needed
    assert reason == "what a step needs could not be planned: KeyError: 'gone'"


def test_a_plan_fits_with_a_tenth_to_spare():
    needed = MemoryPlan(weights=1_000_000, optimizer=0, step=0)
    assert needed.fits(needed.peak / 0.9 + 1)
    assert not needed.fits(needed.peak / 0.9 - 1)


@pytest.mark.parametrize(("room", "expected"), [(1e12, False), (1.0, True)])
def test_a_run_records_the_decision_and_learns_the_same(
    write_recipe, tmp_path, monkeypatch, capsys, room, expected
):
    monkeypatch.setattr(memory, "device_memory", lambda _: room)
    decided = train_watched(write_recipe(gradient_checkpointing="omit", max_steps=2))
    said = "on" if expected else "off"
    assert f"gradient checkpointing: {said} (the largest batch needs about 0.7 of " in capsys.readouterr().out
    assert decided.model.is_gradient_checkpointing is expected
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["gradient_checkpointing"] is saved["activation_checkpointing"] is expected
    told = train_watched(
        write_recipe(gradient_checkpointing=not expected, max_steps=2, output_dir=str(tmp_path / "2"))
    )
    assert told.model.is_gradient_checkpointing is not expected
    learnt, other = decided.saved(), told.saved()
    assert all(torch.allclose(learnt[key], other[key], atol=1e-6) for key in learnt)


def test_what_the_recipe_says_by_either_name_is_done(write_recipe, capsys):
    keys = {"gradient_checkpointing": "omit", "activation_checkpointing": True, "max_steps": 1}
    assert train_watched(write_recipe(**keys)).model.is_gradient_checkpointing
    assert "gradient checkpointing" not in capsys.readouterr().out


def test_scoring_in_fp32_needs_more_than_the_weights():
    """TinyLlama's: 4.4 GB, on GPUs with 8 and 6 GB."""
    assert fits_in_float32(int(4.4e9), 7.5e9)
    assert not fits_in_float32(int(4.4e9), 5.5e9)


CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function: a machine with so much free, whose files say what cgroups leave, and 1 GB of ours."""

    def make(free: float, membership: str, files: dict[str, str]) -> None:
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free)))
        own = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=int(GB)))
        monkeypatch.setattr(memory.psutil, "Process", lambda: own)
        (tmp_path / "membership").write_text(membership)
        for name, content in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(content)
        monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
        monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    return make


def of_version_2(folder: str, limit: str) -> dict[str, str]:
    stat = "anon 1\ninactive_file 500000000\n"
    at = f"{folder}memory"
    return {f"{at}.max": limit, f"{at}.current": "2500000000", f"{at}.stat": stat}


def of_version_1(folder: str, limit: str) -> dict[str, str]:
    at = f"memory/{folder}memory"
    stat = "total_inactive_file 1000000000\n"
    return {f"{at}.limit_in_bytes": limit, f"{at}.usage_in_bytes": "3000000000", f"{at}.stat": stat}


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        ("0::/\n", {}, 20),  # what other processes have is not counted
        ("0::/\n", of_version_2("", "8000000000\n"), 6),
        ("0::/job/1\n", of_version_2("job/", "8000000000\n") | of_version_2("job/1/", "max\n"), 6),
        ("0::/seen/from/the/host\n", of_version_2("", "8000000000\n"), 6),
        ("0::/\n", of_version_2("", "max\n"), 20),
        ("3:cpu:/\n4:memory:/docker/abc\n0::/\n", of_version_1("", "8000000000\n"), 6),
        ("4:memory:/job\n", of_version_1("job/", "9223372036854771712\n"), 20),
        ("4:memory:/job\n", of_version_1("job/", "1000000000\n"), 0),
    ],
)
def test_memory_is_what_is_free_and_what_a_container_allows(machine, monkeypatch, membership, files, free):
    machine(20 * GB, membership, files)
    assert memory.device_memory(CPU) == (free + 1) * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.device_memory(CPU) == (free / 2 + 1) * GB


def test_where_nobody_says_what_is_allowed_all_that_is_free_may_be_had(machine, monkeypatch, tmp_path):
    machine(20 * GB, "", {})
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "none")
    assert memory.device_memory(CPU) == 21 * GB


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_of_an_accelerator_it_is_what_others_leave_and_what_we_have(monkeypatch, kind):
    device = torch.device(kind, 3)
    info, reserved = {device: (5_000, 80_000)}, {device: 700}
    monkeypatch.setattr(torch.accelerator, "get_memory_info", info.get)
    monkeypatch.setattr(torch.accelerator, "memory_reserved", reserved.get)
    assert memory.device_memory(device) == 5_700
