"""What is exported scores like what was evaluated, in plain transformers; or there is no export."""

import json
import re
import shlex
import shutil
import weakref
from unittest.mock import Mock

import pytest
import torch
from conftest import filling_up, make_recipe, make_tokenizer, set_keys
from huggingface_hub import ModelCard
from made_up_export import blocks
from peft import LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rm_recipe import RewardModel, scoring
from rm_recipe.data.comparison import conversation
from rm_recipe.errors import ExportError, RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting import export as export_module
from rm_recipe.exporting import verify
from rm_recipe.exporting.export import export
from rm_recipe.model import lora
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

LOADERS = (scoring, "load_trained"), (export_module, "load_trained"), (verify, "_score_anew")
ITEMS = [{"prompt": "hello", "response": "good good"}, {"prompt": "hello", "response": "bad far"}]
IN_FULL = {"use_peft": False, "learning_rate": 1e-3}
SET_UPS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "4-bit": {"bf16": True, "load_in_4bit": True},
    "8-bit": {"bf16": True, "load_in_8bit": True},
    "in full": IN_FULL,
    "encoder": {**IN_FULL, "max_length": 64},
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
    """The proof of such a run's export and the run, exported once, to be looked at only.

    No model may be left when the next is loaded: the GPU of the run may not hold two in fp32.
    """
    proofs, models = {}, []

    def alone(function):
        def watched(*args, **kwargs):
            assert not [model for model in models if model() is not None]
            made = function(*args, **kwargs)
            models.extend([weakref.ref(made)] if isinstance(made, torch.nn.Module) else [])
            return made

        return watched

    def proof_of(kind):
        if kind not in proofs:
            run = trained(kind)
            models.clear()  # another export's last, which the first loader of this one frees
            with pytest.MonkeyPatch.context() as patch:
                for module, name in LOADERS:
                    patch.setattr(module, name, alone(getattr(module, name)))
                proofs[kind] = export(run)
        return proofs[kind], trained(kind)

    return proof_of


@pytest.fixture
def run(trained, tmp_path, request):
    """A copy of one, of the kind that the test asks for."""
    made, copy = trained(getattr(request, "param", "fp32")), tmp_path / "run"
    shutil.copytree(made, copy, ignore=shutil.ignore_patterns("export"))
    return copy


def saved(folder):
    return load_file(folder / "model.safetensors")


def refused(claim, run):
    """What was there is kept, and nothing else is left."""
    (run / "export").mkdir()
    (old := run / "export" / "proof.json").write_text("{}")
    with pytest.raises(ExportError, match=claim):
        export(run, overwrite=True)
    assert [*old.parent.iterdir()] == [old]
    assert not [path for path in run.iterdir() if path.name.startswith(".export")]


# What comes out


@pytest.mark.parametrize("kind", SET_UPS)
def test_plain_transformers_gives_the_rewards_of_the_run(exported, kind):
    proof, run = exported(kind)
    # What half precision does to one reply differs between kinds of CPU; rewards lie 1.2 apart.
    drift = 0.2 if kind in ("bf16", "4-bit", "8-bit") else 1e-5
    model = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert model.dtype == torch.float32
    reward_model = pipeline("text-classification", model=str(run / "export"), device="cpu")
    rewards = RewardModel.from_pretrained(run).score(ITEMS)
    assert abs(rewards[0] - rewards[1]) > 1e-4
    for item, reward in zip(ITEMS, rewards, strict=True):
        messages = conversation([{"role": "user", "content": item["prompt"]}], item["response"])
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        with torch.no_grad():
            plain = model(**tokenizer(text, return_tensors="pt")).logits.item()
        assert plain == pytest.approx(reward, abs=drift)
        assert reward_model(text)[0] == {"label": "reward", "score": pytest.approx(plain, abs=1e-6)}
    assert RewardModel.from_pretrained(run / "export").score(ITEMS) == pytest.approx(rewards, abs=drift)
    causal = kind != "encoder"
    assert proof == json.loads((run / "export" / "proof.json").read_text())
    assert (proof["passed"], proof["n_sequences"]) == (True, 64)
    served = {"transformers": True, "pipeline": True, "trl_reward_funcs": True}
    assert proof["contracts"] == served | {"ppo": True if causal else None}
    assert (proof["ppo_reason"] is None) == causal
    moved = proof["max_abs_diff"]
    assert (moved["padding_side"] is not None) == causal
    assert all((moved[name] or 0) <= 1e-5 for name in ("fresh_process", "batch_size", "padding_side"))
    assert moved["merged"] <= proof["tolerance"]
    assert proof["steps"]["recorded"] <= 2 * proof["tolerance"]
    if drift == 1e-5:  # nothing was rounded
        assert proof["tolerance"] == proof["tolerance_float32"] < 1e-3
    evaluation = (run / "evaluation.json").read_text()
    assert json.loads((run / "export" / "evaluation.json").read_text()) == json.loads(evaluation)
    assert abs(proof["accuracy"]["adapter"] - proof["accuracy"]["merged"]) <= 1 / 32


def test_what_other_programs_read_is_in_the_configuration(exported):
    _, run = exported("bf16")
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    # Verl would cut a BOS from the text that nothing adds again.
    assert AutoTokenizer.from_pretrained(run / "model").bos_token == "<s>"
    assert AutoTokenizer.from_pretrained(run / "export").bos_token is None
    weights = saved(run / "export")
    assert weights["score.weight"].dtype == torch.float32
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("run", ["bf16"], indirect=True)
def test_predictions_may_differ_by_two_roundings_to_half_precision_and_no_more(run, exported):
    """As those of another device do: each rounds in its own way."""
    moved = exported("bf16")[0]["steps"]["precision"]
    path = run / "predictions.jsonl"
    first, *others = path.read_text().splitlines()
    line = json.loads(first)

    def shifted(by):
        rewards = [line["rewards"][0] + by, *line["rewards"][1:]]
        path.write_text("\n".join([json.dumps(line | {"rewards": rewards}), *others]) + "\n")

    shifted(1.5 * moved)
    assert export(run)["steps"]["recorded"] == pytest.approx(1.5 * moved, abs=0.4 * moved)
    shifted(2.6 * moved)
    with pytest.raises(ExportError, match="no longer gives the rewards"):
        export(run, overwrite=True)


@pytest.mark.parametrize(("run", "dtype"), [("bf16", "float32"), ("in full", "bfloat16")], indirect=["run"])
def test_dtype_is_that_of_all_weights_and_of_what_is_verified(run, dtype):
    proof = export(run, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {weight.dtype for weight in saved(run / "export").values()} == {wanted}
    assert AutoModelForSequenceClassification.from_pretrained(run / "export").dtype == wanted
    assert proof["dtype"] == dtype
    assert proof["max_abs_diff"]["merged"] <= proof["tolerance"]
    assert (proof["max_abs_diff"]["fresh_process"] > 1e-5) == (dtype == "bfloat16")
    assert (proof["steps"]["rounding"] == 0) == (dtype == "float32")


def test_the_adapter_of_a_4_bit_run_is_merged_into_the_base_that_it_was_trained_on(exported, tiny_llama):
    _, run = exported("4-bit")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = load_file(run / "model" / "adapter_model.safetensors")
    up, down = (adapter[f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight"] for x in "BA")
    scale = json.loads((run / "model" / "adapter_config.json").read_text())
    update = up @ down * scale["lora_alpha"] / scale["r"]
    assert (saved(run / "export")[name].float() - base[name] - update).abs().max() > 2e-3  # 4 bits


def test_a_model_that_does_not_fit_its_device_in_fp32_is_verified_on_the_cpu(trained, monkeypatch):
    model = RewardModel.from_pretrained(trained("fp32")).model.to("meta")  # stands for a GPU
    for free, device in ((100e9, "meta"), (0.5e9, "cpu")):
        monkeypatch.setattr(export_module, "device_memory", lambda _, free=free: free)
        assert export_module.float32_device(model) == torch.device(device)


# The card of a real export


def test_the_cards_snippets_give_the_rewards_that_it_says(exported, capsys):
    proof, run = exported("fp32")
    card = (run / "export" / "README.md").read_text()
    [by_pipeline, by_model], [said], [served] = (blocks(card, kind) for kind in ("python", "text", "bash"))
    expected = [float(line) for line in said.split()]
    assert expected == pytest.approx([sample["reward"] for sample in proof["samples"]], abs=1e-3)
    for snippet, rewards in (by_pipeline, expected), (by_model, expected[:2]):
        capsys.readouterr()
        exec(compile(snippet, "README.md", "exec"), {})
        printed = re.findall(r"-?\d+\.\d+", capsys.readouterr().out)
        assert [float(number) for number in printed] == pytest.approx(rewards, abs=1e-3)
    body = json.loads(shlex.split(served.splitlines()[1])[-1])
    assert (body["input"], body["model"]) == (proof["samples"][0]["text"], str(run / "export"))
    assert body["use_activation"] is body["add_special_tokens"] is False


def test_the_hubs_classes_find_the_accuracy_in_the_card(exported, tiny_data):
    _, run = exported("fp32")
    metrics = json.loads((run / "evaluation.json").read_text())["datasets"]["held_out"]
    card = ModelCard.load(run / "export" / "README.md")
    [result] = card.data.eval_results
    assert result.metric_value == pytest.approx(metrics["accuracy"], abs=1e-4)
    assert result.metric_args["ci95"] == pytest.approx(metrics["accuracy_ci95"], abs=1e-4)
    assert (result.metric_type, result.dataset_split) == ("accuracy", "test")
    assert f"| held out | {metrics['accuracy']:.3f} |" in card.text
    assert "](reliability.png)" in card.text
    assert (run / "export" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert card.data.datasets is card.data.base_model is card.data.license is None  # all of it is local
    assert str(tiny_data.parent) not in card.content.split("---")[1]
    text = " ".join(card.text.split())
    assert '`truncation=True, max_length=128`, with `truncation_side="left"`' in text
    assert "also said as transformers 4.57 reads them" in text
    assert "they pad with `<unk>`, this model's pad token" in text
    assert "a reply ends with `</s>`, so that the policy stops there. One that is cut" in text


# What does not come out


def rescale_the_head(_, folder, *rest):
    weights = saved(folder)
    weights["score.weight"] = weights["score.weight"] * 1.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_in(file, **keys):
    return lambda _, folder, *rest: set_keys(folder / file, **keys)


def move_a_reward_of_ppo(answer):
    answer["ppo"][0] += 0.1


def lose_the_head(model):
    torch.nn.init.normal_(model.score.weight)


def take_another_body(model, *rest):
    for parameter in model.base_model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


def round_coarsely(verification):
    for parameter in verification.reward_model.model.parameters():
        parameter.data = (parameter.data * 8).round() / 8


ADDS_BOS = json.loads(make_tokenizer().backend_tokenizer.to_str())["post_processor"]
SAVE, MERGE = (export_module, "save"), (export_module, "merge")
DEQUANTISED = "in fp32, de-quantised, the rewards are not what was evaluated: held-out comparison"
# The kind of run, after which function something goes wrong, and what is said.
BROKEN = [
    ("fp32", SAVE, rescale_the_head, "do not give .* comparison .* went from .* is allowed"),
    ("fp32", SAVE, write_in("config.json", problem_type=None), "transformers' pipeline does not get"),
    ("fp32", SAVE, write_in("config.json", pad_token_id=None), "plain transformers cannot use"),
    ("fp32", SAVE, write_in("config.json", pad_token_id=2), "scores? otherwise|do not give"),
    ("fp32", SAVE, write_in("tokenizer.json", post_processor=ADDS_BOS), "adds special tokens"),
    ("fp32", (verify, "_score_anew"), move_a_reward_of_ppo, "a PPO trainer does not get the model's rewards"),
    # peft#1836: 0.965 before the merge, 0.496 after.
    ("fp32", (LoraModel, "merge_and_unload"), lose_the_head, "merging changed the rewards: held-out"),
    # The base is loaded anew, so the merge alone would be exact.
    ("4-bit", (lora, "dequantize"), take_another_body, DEQUANTISED),
    ("fp32", MERGE, round_coarsely, "rounding changed the rewards"),
]


@pytest.mark.parametrize(("run", "where", "change", "claim"), BROKEN, indirect=["run"])
def test_what_gives_or_is_served_as_other_rewards_is_refused(run, monkeypatch, where, change, claim):
    right = getattr(*where)

    def spoilt(*args, **options):
        result = right(*args, **options)
        change(*(args if result is None else [result]))
        return result

    monkeypatch.setattr(*where, spoilt)
    refused(claim, run)


def test_a_template_that_begins_a_reply_otherwise_than_it_asks_is_not_for_ppo(run):
    """Thinking templates: what a policy generates begins with what the whole conversation does not show."""
    template = run / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    proof = export(run)
    assert (proof["passed"], proof["contracts"]["ppo"]) == (True, None)
    assert proof["ppo_reason"]
    assert "**Not for PPO trainers**" in (run / "export" / "README.md").read_text()


@pytest.mark.parametrize(("max_length", "fit"), [(66, 1), (38, None)])
def test_a_reply_that_the_model_reads_cut_is_not_held_against_programs_that_cut_nothing(run, max_length, fit):
    """One of the samples has 64 tokens, the others more; each held-out conversation has 39 or more."""
    set_keys(run / "model" / "config.json", rm_recipe={"max_length": max_length, "truncation": "keep_end"})
    (run / "predictions.jsonl").unlink()  # it was not trained so
    if fit:
        assert len(export(run)["samples"]) == fit
    else:
        refused("no conversation fits 38 tokens whole, so none can be served; train with a larger max_l", run)


def test_ctrl_c_leaves_no_half_written_export(run, monkeypatch):
    monkeypatch.setattr(verify, "_score_anew", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(run)
    assert not [path for path in run.iterdir() if "export" in path.name]


def test_a_full_disk_costs_the_new_export_and_not_the_old_one(run):
    with filling_up(40_000) as fill:
        fill()
        refused("the export cannot be written", run)


def test_overwriting_is_asked_for_and_never_removes_what_is_no_export(run, tmp_path):
    (run / "export").mkdir()
    (run / "export" / "proof.json").write_text("{}")
    with pytest.raises(RecipeError, match="add --overwrite to replace it"):
        export(run)
    for target in (run, run / "model", tmp_path):
        with pytest.raises(RecipeError, match="is not an export; choose another --output"):
            export(run, target, overwrite=True)
    assert (run / "run.json").is_file()
    assert RewardModel.from_pretrained(run)  # whose model/ is a model, too, and cannot be made again


def test_a_run_without_its_head_is_named(run):
    path = run / "model" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "score" not in key}, path)
    set_keys(run / "model" / "adapter_config.json", modules_to_save=None)
    with pytest.raises(RecipeError, match="has no trained score"):
        export(run)


def test_a_base_that_has_become_another_one_or_is_gone_is_refused(run, tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    set_keys(run / "model" / "adapter_config.json", base_model_name_or_path=str(base))
    weights = saved(base)
    key = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {key: weights[key].flip(0) * 5}, base / "model.safetensors", {"format": "pt"})
    refused(r"no longer gives the rewards of its predictions.jsonl", run)
    shutil.rmtree(base)
    with pytest.raises(RecipeError, match="base' cannot be loaded"):
        export(run, overwrite=True)
