"""What is exported scores like what was evaluated, in plain transformers; or there is no export."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import make_recipe
from peft import LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rm_recipe import RewardModel, scoring
from rm_recipe.errors import ExportError, RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting import export as export_module
from rm_recipe.exporting import verify as proof_module
from rm_recipe.exporting.export import export
from rm_recipe.model import lora
from rm_recipe.model.memory import float32_bytes
from rm_recipe.model.reward_model import load_trained
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

ITEMS = [{"prompt": "hello", "response": "good good"}, {"prompt": "hello", "response": "bad far"}]
SET_UPS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "4-bit": {"bf16": True, "load_in_4bit": True},
    "8-bit": {"bf16": True, "load_in_8bit": True},
    "in full": {"use_peft": False, "learning_rate": 1e-3},
    "encoder": {"use_peft": False, "learning_rate": 1e-3, "max_length": 64},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, tiny_distilbert, tiny_data):
    """A finished and evaluated run of each kind, made once."""
    root = tmp_path_factory.mktemp("trained")

    def run_of(kind):
        folder = root / kind
        if not folder.is_dir():
            folder.mkdir()
            base = tiny_distilbert if kind == "encoder" else tiny_llama
            train(read_recipe(make_recipe(folder, base, tiny_data, num_train_epochs=1, **SET_UPS[kind])))
            evaluate(str(folder / "run"))
        return folder / "run"

    return run_of


@pytest.fixture(scope="module")
def exported(trained):
    """The proof of such a run's export and the run, exported once, to be looked at only."""
    proofs = {}

    def proof_of(kind):
        if kind not in proofs:
            proofs[kind] = export(trained(kind))
        return proofs[kind], trained(kind)

    return proof_of


@pytest.fixture
def run(trained, tmp_path, request):
    """A copy of one, of the kind that the test asks for."""
    made, copy = trained(getattr(request, "param", "fp32")), tmp_path / "run"
    shutil.copytree(made, copy, ignore=shutil.ignore_patterns("export"))
    return copy


def of_kind(*kinds):
    return pytest.mark.parametrize("run", kinds, indirect=True)


def saved(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "drift"),
    # What half precision does to one reply differs between kinds of CPU; rewards lie 1.2 apart.
    [("fp32", 1e-5), ("bf16", 0.2), ("4-bit", 0.2), ("8-bit", 0.2), ("in full", 1e-5), ("encoder", 1e-5)],
)
def test_plain_transformers_gives_the_rewards_of_the_run(exported, kind, drift):
    _, run = exported(kind)
    folder = run / "export"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert model.config.problem_type == "regression"
    assert model.dtype == torch.float32
    judge = pipeline("text-classification", model=str(folder), device="cpu")
    trained = RewardModel.from_pretrained(run).score(ITEMS)
    assert abs(trained[0] - trained[1]) > 1e-4
    for item, reward in zip(ITEMS, trained, strict=True):
        messages = [
            {"role": "user", "content": item["prompt"]},
            {"role": "assistant", "content": item["response"]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        with torch.no_grad():
            plain = model(**tokenizer(text, return_tensors="pt")).logits.item()
        assert plain == pytest.approx(reward, abs=drift)
        piped = judge(text)[0]
        assert piped["label"] == "reward"
        assert piped["score"] == pytest.approx(plain, abs=1e-6)
    assert RewardModel.from_pretrained(folder).score(ITEMS) == pytest.approx(trained, abs=drift)


@pytest.mark.parametrize("kind", SET_UPS)
def test_every_kind_of_run_passes_the_whole_proof(exported, kind):
    proof, run = exported(kind)
    assert proof == json.loads((run / "export" / "proof.json").read_text())
    assert proof["passed"] is True
    assert proof["n_sequences"] == 64
    assert proof["contracts"] == {
        "transformers": True,
        "pipeline": True,
        "trl_reward_funcs": True,
        "ppo": None if kind == "encoder" else True,
    }
    assert (proof["ppo_reason"] is None) == (kind != "encoder")
    moved = proof["max_abs_diff"]
    assert (moved["padding_side"] is None) == (kind == "encoder")
    for name in ("fresh_process", "batch_size", "padding_side"):
        assert moved[name] is None or moved[name] <= 1e-5
    assert moved["merged"] <= proof["tolerance"]
    assert proof["steps"]["recorded"] <= proof["tolerance"]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert json.loads((run / "export" / "evaluation.json").read_text()) == evaluation
    assert abs(proof["accuracy"]["adapter"] - proof["accuracy"]["merged"]) <= 1 / 32


@pytest.mark.parametrize("kind", ["fp32", "in full", "encoder"])
def test_without_half_precision_the_tolerance_is_fp32s(exported, kind):
    proof, _ = exported(kind)
    assert 1e-5 <= proof["tolerance"] == proof["tolerance_float32"] < 1e-4  # by how sensitive the model is


def test_sentence_transformers_applies_no_sigmoid(exported):
    _, run = exported("fp32")
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}


def test_a_bos_that_nothing_adds_is_not_named(exported):
    """Verl would cut it from the text."""
    _, run = exported("fp32")
    assert AutoTokenizer.from_pretrained(run / "model").bos_token == "<s>"
    assert AutoTokenizer.from_pretrained(run / "export").bos_token is None


def test_a_bos_that_the_template_writes_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    export_module.leave_out_bos(tmp_path, "{{ bos_token }}{{ messages }}")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<s>"


def test_a_template_that_begins_a_reply_otherwise_than_it_asks_is_not_for_ppo(run):
    """Thinking templates: what a policy generates begins with what the whole conversation does not show."""
    template = run / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    proof = export(run)
    assert proof["passed"] is True
    assert proof["contracts"]["ppo"] is None
    assert proof["ppo_reason"]
    card = " ".join((run / "export" / "README.md").read_text().split())
    assert "**Not for PPO trainers** (TRL's to 1.12, OpenRLHF, verl)" in card


def test_rewards_that_ppo_would_not_get_are_refused(run, monkeypatch):
    ask = proof_module._score_anew

    def otherwise(request):
        answer = ask(request)
        answer["ppo"][0] += 0.1
        return answer

    monkeypatch.setattr(proof_module, "_score_anew", otherwise)
    with pytest.raises(ExportError, match="a PPO trainer does not get the model's rewards"):
        export(run)


def test_the_body_keeps_bf16_and_the_head_fp32(exported):
    _, run = exported("bf16")
    weights = saved(run / "export")
    assert weights["score.weight"].dtype == torch.float32
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


@of_kind("fp32", "bf16", "in full")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_that_of_all_weights_and_of_what_is_proven(run, dtype):
    proof = export(run, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {weight.dtype for weight in saved(run / "export").values()} == {wanted}
    model = AutoModelForSequenceClassification.from_pretrained(run / "export")
    assert model.dtype == wanted
    assert proof["dtype"] == dtype
    assert proof["max_abs_diff"]["merged"] <= proof["tolerance"]
    assert (proof["max_abs_diff"]["fresh_process"] > 1e-5) == (dtype == "bfloat16")
    if dtype == "float32":
        assert proof["steps"]["rounding"] == 0


def test_rounding_is_measured_before_it_is_judged(exported):
    """What weights moved at random do to the rewards says what weights rounded to bf16 will do."""
    proof, _ = exported("bf16")
    bound = proof["tolerance"] - proof["tolerance_float32"] - proof["steps"]["precision"]
    assert bound / 30 < proof["steps"]["rounding"] < bound
    assert proof["max_abs_diff"]["merged"] > 10 * proof["steps"]["merge"]


def test_the_two_bases_of_a_4_bit_run_are_told_apart_and_measured(exported, tiny_llama, tmp_path):
    dequantized, run = exported("4-bit")
    original = export(run, tmp_path / "original", merge_base="original")
    assert (dequantized["merge_base"], original["merge_base"]) == ("dequantized", "original")
    assert dequantized["steps"]["base"] <= 1e-5
    assert original["steps"]["base"] > 100 * dequantized["steps"]["base"]
    assert original["max_abs_diff"]["merged"] > original["steps"]["base"] / 2
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = load_file(run / "model" / "adapter_model.safetensors")
    up, down = (
        adapter[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"] for side in "BA"
    )
    scale = json.loads((run / "model" / "adapter_config.json").read_text())
    update = up @ down * scale["lora_alpha"] / scale["r"]
    merged = saved(tmp_path / "original")[name].float()
    assert (merged - base[name] - update).abs().max() < 1e-3  # bf16
    assert (saved(run / "export")[name].float() - base[name] - update).abs().max() > 2e-3  # 4 bits


@of_kind("4-bit", "8-bit")
def test_a_model_is_gone_before_the_next_is_loaded(run, monkeypatch):
    """Two of them in fp32 would not fit the GPU that the run was trained on."""
    load, ask, models = scoring.load_trained, proof_module._score_anew, []

    def load_alone(*args, **kwargs):
        assert not [model for model in models if model() is not None]
        model = load(*args, **kwargs)
        models.append(weakref.ref(model))
        return model

    def ask_alone(request):
        assert not [model for model in models if model() is not None]
        return ask(request)

    for module in (scoring, export_module):
        monkeypatch.setattr(module, "load_trained", load_alone)
    monkeypatch.setattr(proof_module, "_score_anew", ask_alone)
    export(run)
    assert len(models) == 2


def test_a_model_that_does_not_fit_its_device_in_fp32_is_verified_on_the_cpu(trained, monkeypatch, capsys):
    model = RewardModel.from_pretrained(trained("fp32")).model
    assert export_module.float32_device(model) == torch.device("cpu")
    model = model.to("meta")  # stands for a GPU
    monkeypatch.setattr(export_module, "device_memory", lambda _: 100e9)
    assert export_module.float32_device(model) == torch.device("meta")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(export_module, "device_memory", lambda _: 0.5e9)
    assert export_module.float32_device(model) == torch.device("cpu")
    assert "has 0.5 GB free: it is verified on the CPU, which takes longer" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_what_a_quantised_model_takes_in_fp32_is_known_before(trained, kind):
    run = trained(kind)
    judge = RewardModel.from_pretrained(run)
    exact = load_trained(str(run / "model"), judge.tokenizer, base="dequantized").float()
    taken = sum(parameter.numel() * parameter.element_size() for parameter in exact.parameters())
    assert float32_bytes(judge.model) == float32_bytes(exact) == taken


@of_kind("fp32")
def test_a_run_that_is_not_quantised_has_one_base(run):
    assert export(run, merge_base="original")["merge_base"] is None


@of_kind("4-bit")
def test_an_original_base_that_gives_other_rewards_is_refused(run, monkeypatch):
    monkeypatch.setattr(export_module, "DRIFT", 1e-4)
    with pytest.raises(ExportError, match="on the original base rewards move by .* --merge-base dequantized"):
        export(run, merge_base="original")
    assert not (run / "export").exists()


def test_an_export_that_scores_otherwise_is_not_put_in_place(run, monkeypatch):
    """The file itself is changed before it is read back."""
    export(run)
    before = (run / "export" / "model.safetensors").read_bytes()
    save = export_module.save

    def save_otherwise(judge, folder, *rest):
        save(judge, folder, *rest)
        weights = saved(folder)
        weights["score.weight"] = weights["score.weight"] * 1.01
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export_module, "save", save_otherwise)
    claim = (
        r"the files do not give .* comparison \d+, response \d .best first., went from .* by .* is allowed"
    )
    with pytest.raises(ExportError, match=claim):
        export(run, overwrite=True)
    assert (run / "export" / "model.safetensors").read_bytes() == before
    assert not [path for path in run.iterdir() if path.name.startswith(".export")]


@pytest.mark.parametrize(
    ("file", "change", "claim"),
    [
        ("config.json", lambda config: config.pop("problem_type"), "transformers' pipeline does not get"),
        ("config.json", lambda config: config.update(pad_token_id=None), "plain transformers cannot use"),
        ("config.json", lambda config: config.update(pad_token_id=2), "scores? otherwise|do not give"),
        ("config.json", lambda config: config.update(id2label={"0": "LABEL_0"}), "calls the reward LABEL_0"),
        (
            "tokenizer.json",
            lambda tokenizer: tokenizer.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<s>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"Sequence": {"id": "B", "type_id": 1}},
                    ],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
                }
            ),
            "adds special tokens",
        ),
    ],
    ids=["sigmoid", "no pad token", "pad is EOS", "label", "special tokens"],
)
def test_what_would_be_served_otherwise_is_refused(run, monkeypatch, file, change, claim):
    save = export_module.save

    def save_otherwise(judge, folder, *rest):
        save(judge, folder, *rest)
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    monkeypatch.setattr(export_module, "save", save_otherwise)
    with pytest.raises(ExportError, match=claim):
        export(run)
    assert not (run / "export").exists()


def test_ctrl_c_leaves_no_half_written_export(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(proof_module, "_score_anew", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(run)
    assert not [path for path in run.iterdir() if "export" in path.name]


def test_an_export_is_replaced_only_when_asked(run):
    export(run)
    with pytest.raises(RecipeError, match="add --overwrite to replace it"):
        export(run)
    (run / "export" / "model.safetensors").write_text("damaged")
    export(run, overwrite=True)
    assert len(saved(run / "export")) > 1


def test_a_full_disk_costs_the_new_export_and_not_the_old_one(run):
    """Files may not grow beyond 40 kB: what a full disk does, without one."""
    export(run)
    before = (run / "export" / "model.safetensors").read_bytes()
    assert len(before) > 40_000

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    command = [sys.executable, "-m", "rm_recipe", "export", str(run), "--overwrite"]
    result = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limit, check=False, env={**os.environ}
    )
    assert result.returncode == 1
    assert "the export cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert (run / "export" / "model.safetensors").read_bytes() == before
    assert not [path for path in run.iterdir() if path.name.startswith(".export")]


def test_a_merge_that_moves_the_rewards_is_refused(run, monkeypatch):
    """peft#1836: 0.965 before the merge, 0.496 after."""
    merge = LoraModel.merge_and_unload

    def lose_head(model, **kwargs):
        merged = merge(model, **kwargs)
        torch.nn.init.normal_(merged.score.weight)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", lose_head)
    with pytest.raises(ExportError, match="merging changed the rewards: held-out comparison"):
        export(run)
    assert not (run / "export").exists()


@of_kind("4-bit", "8-bit")
def test_a_base_that_is_de_quantised_wrongly_is_refused(run, monkeypatch):
    """It is loaded anew, so the merge alone would be exact: peft#1836 again."""
    right = lora.dequantize

    def wrongly(model, device):
        right(model, device)
        for parameter in model.base_model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)

    monkeypatch.setattr(lora, "dequantize", wrongly)
    with pytest.raises(ExportError, match=r"de-quantis(ing|ed) .*: held-out comparison"):
        export(run)
    assert not (run / "export").exists()


@of_kind("fp32", "bf16")
def test_weights_that_are_rounded_too_coarsely_are_refused(run, monkeypatch):
    save = export_module.save

    def coarsely(judge, *rest):
        for parameter in judge.model.parameters():
            parameter.data = (parameter.data * 8).round() / 8
        save(judge, *rest)

    monkeypatch.setattr(export_module, "save", coarsely)
    with pytest.raises(ExportError, match="rounding the merged weights .* changed the rewards"):
        export(run)
    assert not (run / "export").exists()


@pytest.mark.parametrize("name", [".", "other"])
def test_overwriting_never_removes_what_is_no_export(run, tmp_path, name):
    target = run if name == "." else tmp_path / name
    target.mkdir(exist_ok=True)
    (target / "thesis.tex").write_text("kept")
    with pytest.raises(RecipeError, match="is not an export; choose another --output"):
        export(run, target, overwrite=True)
    assert (target / "thesis.tex").read_text() == "kept"


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RecipeError, match="is not a run folder"):
        export(tmp_path)


def test_a_run_without_its_head_is_named(run):
    path = run / "model" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "score" not in key}, path)
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    (run / "model" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None}))
    with pytest.raises(RecipeError, match="has no trained score"):
        export(run)


def own_base(run, tiny_llama, tmp_path):
    """Lets the run's adapter look for a copy of its base, which the test may change."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    path = run / "model" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")}))
    return tmp_path / "base"


def test_a_base_that_is_gone_is_named(run, tiny_llama, tmp_path):
    shutil.rmtree(own_base(run, tiny_llama, tmp_path))
    with pytest.raises(RecipeError, match="base' cannot be loaded"):
        export(run)


def test_a_base_that_has_become_another_one_is_refused(run, tiny_llama, tmp_path):
    base = own_base(run, tiny_llama, tmp_path)
    weights = load_file(base / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {key: weights[key].flip(0) * 5}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"no longer gives the rewards of its predictions.jsonl"):
        export(run)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(500)
    model.save_pretrained(base)
    with pytest.raises(RecipeError, match=r"was trained on a base with \d+ embeddings, and .* has 500"):
        export(run)
