"""Accuracy that can be believed: every comparison counted, and reproduced by plain transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_recipe, make_rows, write_jsonl
from safetensors.torch import save_file
from test_cli import invoke
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe.errors import DataError, RecipeError, TrainingError
from rm_recipe.evaluation.evaluate import evaluate, weights_of
from rm_recipe.evaluation.findings import HELD_OUT
from rm_recipe.evaluation.report import print_evaluation
from rm_recipe.evaluation.summary import read_predictions
from rm_recipe.exporting.export import export
from rm_recipe.model.head import saved_tensors
from rm_recipe.recipe.reader import read_recipe, read_run_recipe
from rm_recipe.scoring import RewardModel
from rm_recipe.tools.pipeline import run as run_recipe
from rm_recipe.training.run_folder import check_data
from rm_recipe.training.train import train

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, tiny_data):
    """The folder of a run, its recipe beside it, and its data, which are its own."""
    folder = tmp_path_factory.mktemp("trained")
    data = shutil.copytree(tiny_data, folder / "data")
    keys = {"num_train_epochs": 1, "learning_rate": 1e-3, "gate_statistic": "accuracy"}
    train(read_recipe(make_recipe(folder, tiny_llama, data, **keys)))
    return folder / "run"


@pytest.fixture(scope="module")
def exported(trained):
    """The run's evaluation and its export; the copies that tests change have neither."""
    copy = shutil.copytree(trained, trained.parent / "exported")
    content = evaluate(str(copy))
    export(copy)
    return copy, content


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run."""
    return shutil.copytree(trained, tmp_path / "run")


def test_the_figures_have_the_contracts_keys(exported, capsys, monkeypatch):
    run, content = exported
    assert content.keys() == {"model", "base", "weights", "recipe", "datasets", "gate"}
    figures = content["datasets"][HELD_OUT]
    named = (
        "n_comparisons n_scored excluded accuracy accuracy_ci95 ties loss mean_margin baselines calibration"
    )
    assert figures.keys() >= {*named.split(), "length", "subsets"}
    assert figures["consistency"]["thank_you"]["n"] == 80
    assert figures["trained_prompts"] == 0
    assert figures["n_comparisons"] == figures["n_scored"] + sum(figures["excluded"].values()) == 40
    gate = {"target": 0.65, "statistic": "accuracy", "value": figures["accuracy"]}
    assert content["gate"] == {**gate, "passed": figures["accuracy"] >= 0.65}
    # The tiny data's chosen replies say `good`: a bag of words that learnt from train gets them all.
    assert figures["baselines"].keys() == {"longer_wins", "shorter_wins", "bag_of_words"}
    assert figures["baselines"]["bag_of_words"] == 1
    assert figures["beats_baselines"] is False
    assert json.loads((run / "evaluation.json").read_text()) == content
    monkeypatch.setenv("COLUMNS", "80")
    print_evaluation(content, [HELD_OUT])
    printed = capsys.readouterr().out
    assert "Target 0.65" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_ten_lines_of_plain_transformers_give_the_same_figures(exported, tiny_data):
    run, content = exported
    figures = content["datasets"][HELD_OUT]
    model = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    rewards, lengths = np.empty((40, 2)), np.empty((40, 2))
    for number, row in enumerate(map(json.loads, (tiny_data / "test.jsonl").open())):
        for side, reply in enumerate((row["chosen"], row["rejected"])):
            messages = [*row["prompt"], {"role": "assistant", "content": reply}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
            rewards[number, side], lengths[number, side] = model(input_ids=ids).logits.item(), ids.shape[1]
    margins, longer = rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1]
    assert figures["accuracy"] == np.mean((np.sign(margins) + 1) / 2)
    assert figures["baselines"]["longer_wins"] == np.mean((np.sign(longer) + 1) / 2)
    assert figures["length"]["accuracy_chosen_longer"] == np.mean(margins[longer > 0] > 0)
    assert figures["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), abs=1e-5)
    assert figures["mean_margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert figures["std_reward"] == pytest.approx(rewards.std(), abs=1e-5)
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    bins = np.minimum((confidence - 0.5) * 20, 9).astype(int)
    gaps = [abs((confidence - right)[bins == b].sum()) for b in np.unique(bins)]
    assert figures["calibration"]["ece"] == pytest.approx(sum(gaps) / 40, abs=1e-5)


def test_another_data_set_is_added_and_the_held_out_figures_stay(run, tmp_path):
    evaluate(str(run))
    rows = make_rows(4, seed=9)
    rows[0]["chosen"] = ""
    path = str(write_jsonl(tmp_path / "other.jsonl", rows))
    content = evaluate(str(run), [path])
    assert set(content["datasets"]) == {HELD_OUT, path}
    assert content["datasets"][path]["excluded"] == {"empty_response": 1}
    lines = [json.loads(line) for line in (run / "predictions.jsonl").open()]
    assert [line["dataset"] for line in lines] == [HELD_OUT] * 40 + [path] * 3
    evaluate(str(run), [path, path])
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 43
    for line in lines:
        assert line["margin"] == pytest.approx(line["rewards"][0] - line["rewards"][1])
        assert line["correct"] == (line["margin"] > 0)


def test_comparisons_that_were_trained_on_are_counted(run, tiny_data):
    path = str(tiny_data / "train.jsonl")
    assert evaluate(str(run), [path])["datasets"][path]["trained_prompts"] == 64


@pytest.fixture
def remade(trained):
    """A function that writes the rows of train and test anew, until the test ends."""
    data = trained.parent / "data"
    kept = {path: path.read_text() for path in data.iterdir()}
    rows = {path.stem: text.splitlines(keepends=True) for path, text in kept.items()}

    def write(**anew):
        for name, lines in anew.items():
            (data / f"{name}.jsonl").write_text("".join(lines))

    yield lambda change: write(**change(rows))
    for path, text in kept.items():
        path.write_text(text)


def moved(rows):
    """As a script that shuffles and splits once more makes them: trained on before, held out now."""
    return {"train": rows["train"][20:] + rows["test"], "test": rows["train"][:20]}


def test_where_what_is_held_out_changed_since_training_nothing_goes_on_from_the_run(run, remade, monkeypatch):
    remade(moved)
    monkeypatch.setattr(RewardModel, "from_pretrained", None)
    recipe = run.parent / "recipe.yaml"
    recipe.write_text((run / "recipe.yaml").read_text())
    for verb in (
        lambda: evaluate(str(run)),
        lambda: export(run),
        lambda: run_recipe(recipe, ["--output_dir", str(run)]),
    ):
        with pytest.raises(RecipeError, match="the held-out comparisons are not those that .*was trained"):
            verb()
    assert not (run / "evaluation.json").exists()


def test_other_data_are_evaluated_all_the_same_but_without_a_count_of_what_was_trained_on(
    run, remade, tmp_path, capsys
):
    path = str(write_jsonl(tmp_path / "other.jsonl", make_rows(4, seed=9)))
    remade(moved)
    figures = evaluate(str(run), [path])["datasets"][path]
    assert (figures["n_scored"], figures["trained_prompts"]) == (4, None)
    assert "bag_of_words" not in figures["baselines"]
    assert "the train comparisons are not those that" in capsys.readouterr().out


def test_with_other_train_rows_alone_what_is_held_out_can_be_evaluated_and_the_run_is_not_taken_for_finished(
    run, remade, capsys
):
    remade(lambda rows: {"train": rows["train"][1:]})
    figures = evaluate(str(run))["datasets"][HELD_OUT]
    assert (figures["n_scored"], figures["trained_prompts"]) == (40, None)
    check_data(run, read_run_recipe(run))
    assert capsys.readouterr().out.count("warning: the train comparisons are not those that") == 2
    with pytest.raises(RecipeError, match="the train comparisons .*or train anew with --overwrite"):
        check_data(run, read_run_recipe(run), train=True)


def test_a_run_whose_training_data_are_gone_can_be_evaluated_elsewhere(run, trained, tmp_path, capsys):
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(trained.parent / "data"), str(tmp_path / "gone")))
    check_data(run, read_run_recipe(run), train=True)
    assert "changed since training cannot be told" in capsys.readouterr().out
    path = str(write_jsonl(tmp_path / "other.jsonl", make_rows(4, seed=9)))
    figures = evaluate(str(run), [path])["datasets"][path]
    assert figures["n_scored"] == 4
    assert "bag_of_words" not in figures["baselines"]
    assert "no bag-of-words baseline" in capsys.readouterr().out


@pytest.fixture
def other_model(tiny_base, tmp_path):
    """Another one-label model, which knows nothing and leaves out what has over 40 tokens."""
    folder = tmp_path / "other"
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base("gpt2"), num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("gpt2"))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.rm_recipe = {"max_length": 40, "truncation": "exclude"}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_two_models_are_compared_on_the_comparisons_that_fit_both(run, other_model, tiny_data, tmp_path):
    content = evaluate(str(run), against=str(other_model))["datasets"][HELD_OUT]
    found = content["against"]
    alone = evaluate(str(other_model), [str(tiny_data / "test.jsonl")], tmp_path / "alone")
    (figures,) = alone["datasets"].values()
    assert 0 < found["n"] == figures["n_scored"] < content["n_scored"] == 40
    assert found["other_accuracy"] == figures["accuracy"]
    mine = {line["row"]: line["correct"] for line in read_predictions(run)}
    other = {line["row"]: line["correct"] for line in read_predictions(tmp_path / "alone")}
    assert found["difference"] == pytest.approx(np.mean([mine[row] - other[row] for row in other]))
    assert found["only_this"] == sum(mine[row] > other[row] for row in other)


def test_two_models_do_not_mix_in_one_evaluation(run, other_model, tiny_data, tiny_llama, tmp_path):
    path, out = str(tiny_data / "test.jsonl"), tmp_path / "out"
    content = evaluate(str(run), output=out)
    assert (content["model"], content["base"]) == (str(run), str(tiny_llama))
    before = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(RecipeError, match="is of another model .*run.*give another --output"):
        evaluate(str(other_model), [path], out)
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    alone = evaluate(str(other_model), [path], tmp_path / "alone")
    assert (alone["model"], alone["base"]) == (str(other_model), None)
    shutil.copy(out / "evaluation.json", run)
    with pytest.raises(RecipeError, match="is of another model"):  # nor in the folder of a run
        evaluate(str(other_model), [path], run)
    with pytest.raises(RecipeError, match="is not of this run's model"):
        shutil.copy(tmp_path / "alone" / "evaluation.json", run)
        export(run)


def test_what_a_run_says_of_weights_that_it_has_no_more_gives_way_to_held_out_figures_alone(run, tmp_path):
    path = str(write_jsonl(tmp_path / "other.jsonl", make_rows(4, seed=9)))
    evaluate(str(run), [HELD_OUT, path])
    weights = saved_tensors(run / "model")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, run / "model" / ADAPTER)
    with pytest.raises(RecipeError, match="of this model before it changed.*first `rm-recipe evaluate"):
        evaluate(str(run), [path])
    assert set(evaluate(str(run))["datasets"]) == {HELD_OUT}
    assert {line["dataset"] for line in read_predictions(run)} == {HELD_OUT}


def test_an_export_is_not_written_into_by_its_evaluation(run, tiny_data):
    """It was verified, and is what `push` uploads."""
    folder = shutil.copytree(run / "model", run / "export")
    (folder / "proof.json").write_text("{}")
    for output in (None, folder):
        with pytest.raises(RecipeError, match="is an export, .*say with --output"):
            evaluate(str(folder), [str(tiny_data / "test.jsonl")], output)
    assert not (folder / "evaluation.json").exists()


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch):
    monkeypatch.setattr("rm_recipe.evaluation.evaluate.adapter_config", lambda *_: None)
    monkeypatch.setattr(
        "rm_recipe.evaluation.evaluate.cached_file", lambda name, file: f"/hub/{name}/snapshots/3f1/{file}"
    )
    assert weights_of("ann/judge") == {"commit": "3f1"}


def test_rewards_that_are_no_numbers_fail_the_evaluation_and_are_counted(run):
    before = evaluate(str(run))
    weights = saved_tensors(run / "model")
    for name in weights:
        if name.endswith("embed_tokens.weight") or "lora_B" in name:
            weights[name][:] = float("nan")
    save_file(weights, run / "model" / ADAPTER)
    with pytest.raises(TrainingError, match="the rewards of 40 of 40 comparisons are not finite numbers"):
        evaluate(str(run))
    assert json.loads((run / "evaluation.json").read_text()) == before


def test_benchmarks_and_raw_hh_rlhf_transcripts_are_recognised(run, tmp_path):
    """Made up, in the shapes of RewardBench, LLMBar and hh-rlhf."""
    pair = {"chosen": "good good", "rejected": "bad bad", "chosen_model": "a", "rejected_model": "b"}
    subsets = enumerate(["alpacaeval-easy", "donotanswer", "donotanswer"])
    pairs = [{"prompt": f"hello {n}", **pair, "subset": subset, "id": n} for n, subset in subsets]
    labelled = [
        {"input": f"how are you {n}", "output_1": "bad bad", "output_2": "good good", "label": 2}
        for n in range(4)
    ]
    transcript = {side: f"\n\nHuman: hello\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    reward_bench = str(write_jsonl(tmp_path / "reward_bench.jsonl", pairs))
    hh_rlhf = str(write_jsonl(tmp_path / "hh.jsonl", [transcript]))
    llmbar = tmp_path / "llmbar.json"
    llmbar.write_text(json.dumps(labelled))
    found = evaluate(str(run), [hh_rlhf, reward_bench, str(llmbar)])["datasets"]
    subsets = found[reward_bench]["subsets"]
    assert {name: part["n"] for name, part in subsets.items()} == {"alpacaeval-easy": 1, "donotanswer": 2}
    assert (found[str(llmbar)]["n_scored"], found[hh_rlhf]["n_scored"]) == (4, 1)
    line = read_predictions(run)[-1]
    rewards = RewardModel.from_pretrained(run).score(
        [{"prompt": "how are you 3", "response": reply} for reply in ("good good", "bad bad")]
    )
    assert line["rewards"] == pytest.approx(rewards.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "hi", "responses": ["a", "b"]}], "its columns are prompt, responses; rm_recipe needs"),
        ([{"input": "hi", "output_1": "a", "output_2": "b"}], "rm_recipe needs"),
        ([], "is empty"),
        ([{"prompt": "hi", "chosen": "", "rejected": "b"}], "no comparison in it .1 empty_response."),
    ],
)
def test_a_set_that_holds_no_comparison_is_refused_and_nothing_is_written(run, tmp_path, rows, message):
    path = write_jsonl(tmp_path / "odd.jsonl", rows)
    with pytest.raises(DataError, match=message):
        evaluate(str(run), [str(path)])
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [(3, "LlamaForSequenceClassification. has 3 labels"), (None, "LlamaForCausalLM. has 2 labels")],
)
def test_a_model_with_another_head_is_refused(tiny_base, tiny_data, tmp_path, labels, message):
    source = folder = tiny_base("llama")
    if labels:
        folder = tmp_path / "classifier"
        AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    with pytest.raises(RecipeError, match=message):
        evaluate(str(folder), [str(tiny_data / "test.jsonl")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_with_gate_the_exit_code_says_whether_the_target_is_reached(run, monkeypatch, capsys):
    recipe = (run / "recipe.yaml").read_text().replace("gate_statistic: accuracy", "gate_statistic: ci_low")
    for target, code in ((0.01, 0), (1.0, 1)):
        changed = recipe.replace("target_accuracy: 0.65", f"target_accuracy: {target}")
        (run / "recipe.yaml").write_text(changed)
        found, out, _ = invoke(monkeypatch, capsys, "evaluate", str(run), "--gate")
        assert found == code
        assert ("not reached" in out) == bool(code)
    assert invoke(monkeypatch, capsys, "evaluate", str(run))[0] == 0


def test_a_gate_without_a_held_out_split_is_refused(run, tiny_data, monkeypatch, capsys):
    other = str(tiny_data / "train.jsonl")
    code, _, err = invoke(monkeypatch, capsys, "evaluate", str(run), "--dataset", other, "--gate")
    assert code == 2
    assert "--gate judges the held-out split" in err


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_scored(run, tmp_path, monkeypatch):
    monkeypatch.setattr(RewardModel, "from_pretrained", None)
    (tmp_path / "file").write_text("mine")
    for below in ("", "folder/in/it"):
        with pytest.raises(RecipeError, match="is a file or lies in one; say with --output where"):
            evaluate(str(run), output=tmp_path / "file" / below)
    monkeypatch.setattr("os.access", lambda *_: False)  # as for everybody but the superuser
    with pytest.raises(RecipeError, match="cannot be written to"):
        evaluate(str(run), output=tmp_path / "elsewhere")


def test_a_model_without_a_recipe_needs_a_data_set(tiny_llama):
    with pytest.raises(RecipeError, match="no held-out split; name one with --dataset"):
        evaluate(str(tiny_llama))


def test_rankings_are_evaluated_and_told_in_the_predictions(run, tmp_path):
    rows = [
        {"prompt": f"hello {n}", "responses": ["bad bad", "good good", "bad bad cat"], "ranks": [2, 1, 2]}
        for n in range(4)
    ]
    path = str(write_jsonl(tmp_path / "rankings.jsonl", rows))
    figures = evaluate(str(run), [path])["datasets"][path]
    assert figures["n_scored"] == 4
    lines = [json.loads(line) for line in (run / "predictions.jsonl").open()]
    assert [line["ranks"] for line in lines] == [[0, 1, 1]] * 4
    for line in lines:
        best, *others = line["rewards"]
        assert line["correct"] == np.mean([best > other for other in others])
        assert line["margin"] == pytest.approx(best - np.mean(others), abs=1e-6)
    assert figures["accuracy"] == pytest.approx(np.mean([line["correct"] for line in lines]))
