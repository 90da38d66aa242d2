"""Accuracy that can be believed: every comparison counted, and reproduced by plain transformers."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY, make_recipe, make_rows, save_classifier, write_jsonl
from huggingface_hub import constants
from safetensors.torch import save_file
from test_cli import invoke
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe.data.splits import load_split
from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.evaluation.evaluate import _data_of, _trained_prompts, evaluate, weights_of
from rm_recipe.evaluation.findings import HELD_OUT
from rm_recipe.evaluation.format import MISSING, decimal, interval
from rm_recipe.evaluation.metrics import paired_difference
from rm_recipe.evaluation.report import print_evaluation
from rm_recipe.evaluation.summary import read_predictions, write_predictions
from rm_recipe.exporting.export import export
from rm_recipe.model.head import saved_tensors
from rm_recipe.recipe.reader import read_recipe, read_run_recipe
from rm_recipe.recipe.schema import DataArguments
from rm_recipe.scoring import RewardModel
from rm_recipe.tools.pipeline import run as run_recipe
from rm_recipe.training.run_folder import check_data
from rm_recipe.training.train import train

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, tiny_data):
    """The folder of a run, evaluated and exported, its recipe beside it, and its data, which are its own."""
    folder = tmp_path_factory.mktemp("trained")
    data = shutil.copytree(tiny_data, folder / "data")
    keys = {"num_train_epochs": 1, "learning_rate": 1e-3, "gate_statistic": "accuracy"}
    train(read_recipe(make_recipe(folder, tiny_llama, data, **keys)))
    content = evaluate(str(folder / "run"))
    export(folder / "run")
    assert evaluation_of(folder / "run") == content
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, without the export."""
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("export"))


def evaluation_of(run):
    return json.loads((run / "evaluation.json").read_text())


@pytest.fixture
def data(run, trained, tmp_path):
    """A copy of what the run was trained with, which the run now names."""
    recipe, there = (run / "recipe.yaml").read_text(), trained.parent / "data"
    (run / "recipe.yaml").write_text(recipe.replace(str(there), str(tmp_path / "data")))
    return shutil.copytree(there, tmp_path / "data")


@pytest.fixture
def other_set(tmp_path):
    """Four comparisons, one of them with an empty reply."""
    rows = make_rows(4, seed=9)
    rows[0]["chosen"] = ""
    return str(write_jsonl(tmp_path / "other.jsonl", rows))


def test_the_figures_have_the_contracts_keys(trained, capsys, monkeypatch):
    content = evaluation_of(trained)
    assert content.keys() == {"model", "base", "weights", "recipe", "datasets", "gate"}
    figures = content["datasets"][HELD_OUT]
    named = "n_comparisons n_scored excluded accuracy accuracy_ci95 ties loss mean_margin baselines"
    assert figures.keys() >= {*named.split(), "calibration", "length", "subsets", "consistency"}
    assert figures["consistency"]["thank_you"]["n"] == 80
    assert (figures["trained_prompts"], figures["prompts"], figures["chose_checkpoint"]) == (0, 40, False)
    assert figures["n_comparisons"] == figures["n_scored"] + sum(figures["excluded"].values()) == 40
    gate = {"target": 0.65, "statistic": "accuracy", "value": figures["accuracy"]}
    assert content["gate"] == {**gate, "passed": figures["accuracy"] >= 0.65}
    # The tiny data's chosen replies say `good`: a bag of words that learnt from train gets them all.
    assert figures["baselines"].keys() == {"longer_wins", "shorter_wins", "bag_of_words"}
    assert figures["baselines"]["bag_of_words"] == 1
    monkeypatch.setenv("COLUMNS", "80")
    print_evaluation(content, [HELD_OUT])
    printed = capsys.readouterr().out
    assert "Target 0.65" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_ten_lines_of_plain_transformers_give_the_same_figures(trained, tiny_data):
    figures = evaluation_of(trained)["datasets"][HELD_OUT]
    model = AutoModelForSequenceClassification.from_pretrained(trained / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "export")
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


def test_other_data_sets_are_added_and_the_held_out_figures_stay(run, other_set, tiny_data):
    content = evaluate(str(run), [other_set])
    assert set(content["datasets"]) == {HELD_OUT, other_set}
    assert content["datasets"][other_set]["excluded"] == {"empty_response": 1}
    lines = [json.loads(line) for line in (run / "predictions.jsonl").open()]
    assert [line["dataset"] for line in lines] == [HELD_OUT] * 40 + [other_set] * 3
    seen = str(tiny_data / "train.jsonl")
    assert evaluate(str(run), [other_set, seen, other_set])["datasets"][seen]["trained_prompts"] == 64
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 43 + 64


def test_where_every_row_asks_the_same_it_is_whole_comparisons_that_were_trained_on(tmp_path):
    rows = [
        {"prompt": "How nice is it?", "chosen": f"a rose {i}", "rejected": f"a wasp {i}", "margin": i}
        for i in range(6)
    ]
    other = {"prompt": "And this?", "chosen": "a rose", "rejected": "a wasp", "margin": 1}
    parts = [rows[:4], rows[3:], [*rows[:4], other], [*rows[3:], other]]
    paths = [write_jsonl(tmp_path / f"{number}.jsonl", own) for number, own in enumerate(parts)]
    with_margins = [DataArguments(dataset_name=str(path), margin_column="margin") for path in paths]
    train, test, mixed, mixed_test = (load_split(data, None) for data in with_margins)
    trained = load_split(with_margins[0], None, margins=True)
    assert [_trained_prompts(test, own) for own in (train, trained, mixed)] == [1, 1, 1]
    assert _trained_prompts(mixed_test, mixed) == 4


def test_columns_of_other_names_are_given_on_the_command_line(run, tmp_path, monkeypatch, capsys):
    rows = [dict(zip(("ask", "good", "bad"), row.values(), strict=True)) for row in make_rows(3, seed=4)]
    path = str(write_jsonl(tmp_path / "named.jsonl", rows))
    words = ["evaluate", str(run), "--dataset", path]
    assert invoke(monkeypatch, capsys, *words)[0] == 2
    named = "{prompt: ask, chosen: good, rejected: bad}"
    assert invoke(monkeypatch, capsys, *words, "--columns", named)[0] == 0
    assert evaluation_of(run)["datasets"][path]["n_scored"] == 3
    code, _, err = invoke(monkeypatch, capsys, *words, "--columns", "{ask: prompt}")
    assert code == 2
    assert "command line: 'columns: " in err


def test_a_set_without_a_split_is_the_recipes_and_never_a_slice_of_it():
    for split, meant in {"test_prefs": "test_prefs", "train[80%:]": "test"}.items():
        recipe = SimpleNamespace(data=DataArguments(dataset_test_split=split))
        assert _data_of("some/set", recipe).dataset_test_split == meant
        assert _data_of("some/set@train[:9]", recipe).dataset_test_split == "train[:9]"


# --- data that changed -------------------------------------------------------------------------


def test_where_what_is_held_out_changed_since_training_nothing_goes_on_from_the_run(run, data, monkeypatch):
    # As a script that shuffles and splits once more makes them: trained on before, held out now.
    train, test = data / "train.jsonl", data / "test.jsonl"
    rows = train.read_text().splitlines(keepends=True)
    train.write_text("".join(rows[20:]) + test.read_text())
    test.write_text("".join(rows[:20]))
    monkeypatch.setattr(RewardModel, "from_pretrained", None)
    (run / "evaluation.json").unlink()
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


def test_where_the_train_rows_changed_or_are_gone_nothing_is_said_of_them(run, data, other_set, capsys):
    train = data / "train.jsonl"
    train.write_text(train.read_text().split("\n", 1)[1])
    figures = evaluate(str(run))["datasets"][HELD_OUT]
    assert (figures["n_scored"], figures["trained_prompts"]) == (40, None)
    assert "bag_of_words" not in figures["baselines"]
    assert "the train comparisons are not those that" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="the train comparisons .*or train anew with --overwrite"):
        check_data(run, read_run_recipe(run))  # nor is the run taken for finished
    shutil.rmtree(data)
    assert evaluate(str(run), [other_set])["datasets"][other_set]["n_scored"] == 3
    assert "is not to be had" in capsys.readouterr().err


# --- which model -------------------------------------------------------------------------------


@pytest.fixture
def other_model(tiny_base, tmp_path):
    """Another model, which knows nothing and leaves out what has over 40 tokens."""
    return save_classifier(tmp_path / "other", tiny_base("gpt2"), max_length=40, truncation="exclude")


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


@pytest.fixture
def compare(monkeypatch, capsys, tmp_path):
    """A function: what `rm-recipe compare` answers to the names of runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *names: invoke(monkeypatch, capsys, "compare", *names)


def cells(answer):
    """The rows of the table that an answer prints."""
    code, out, _ = answer
    assert code == 0
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


def test_runs_stand_side_by_side_with_what_each_is_ahead_of_the_first(run, tmp_path, compare):
    worse = shutil.copytree(run, tmp_path / "worse")
    lines = read_predictions(worse)
    for line in lines[:10]:
        assert line["correct"] == 1.0
        line["correct"] = 0.0
    write_predictions(worse, lines)
    figures = evaluation_of(run)["datasets"][HELD_OUT]
    plain, behind = cells(compare("run", "worse"))
    assert plain[:2] == ["run", decimal(figures["accuracy"])]
    assert plain[3:] == [decimal(figures["loss"]), MISSING]
    lead = paired_difference([line["correct"] for line in lines], np.ones(40))
    assert behind[0] == "worse"
    assert behind[4] == f"{decimal(-10 / 40)} ({interval(lead['ci95'], signed=True)})"
    _, ahead = cells(compare("worse", "run"))
    assert ahead[4].startswith("+0.250 (+0.")


NOT_ALIKE = "other was not evaluated on the comparisons of run; score both on those of other: "
NOT_ALIKE += "rm-recipe evaluate other --against run"
NO_RUN = "other is no run that was evaluated: rm-recipe evaluate RUN"


@pytest.mark.parametrize(
    ("file", "change", "fault"),
    [
        ("run.json", lambda text: re.sub(r'"held_out": "\w+"', '"held_out": "0"', text), NOT_ALIKE),
        ("predictions.jsonl", lambda text: text.split("\n", 1)[1], NOT_ALIKE),
        ("evaluation.json", None, NO_RUN),
        ("run.json", None, NO_RUN),
    ],
)
def test_runs_of_other_comparisons_or_no_evaluation_are_refused(run, tmp_path, compare, file, change, fault):
    path = shutil.copytree(run, tmp_path / "other") / file
    if change:
        path.write_text(change(path.read_text()))
    else:
        path.unlink()
    code, out, err = compare("run", "other")
    assert (code, out) == (2, "")
    assert err.startswith(f"rm-recipe: {fault}")
    assert err.count("\n") == 1


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
    shutil.copy(tmp_path / "alone" / "evaluation.json", run)
    with pytest.raises(RecipeError, match="is of another model; first `rm-recipe evaluate"):
        export(run)


def test_what_a_run_says_of_weights_that_it_has_no_more_gives_way_to_held_out_figures_alone(run, other_set):
    evaluate(str(run), [other_set])
    weights = saved_tensors(run / "model")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, run / "model" / ADAPTER)
    with pytest.raises(RecipeError, match="of this model before it changed.*first `rm-recipe evaluate"):
        evaluate(str(run), [other_set])
    assert set(evaluate(str(run))["datasets"]) == {HELD_OUT}
    assert {line["dataset"] for line in read_predictions(run)} == {HELD_OUT}


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    cached = tmp_path / "models--ann--judge"
    (cached / "snapshots" / "3f1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("3f1")
    (cached / "snapshots" / "3f1" / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert weights_of("ann/judge") == {"commit": "3f1"}
    with pytest.raises(RecipeError, match="ann/other cannot be loaded"):
        weights_of("ann/other")


def test_rewards_that_are_no_numbers_fail_the_evaluation_and_are_counted(run):
    before, weights = evaluation_of(run), saved_tensors(run / "model")
    for name in weights:
        if name.endswith("embed_tokens.weight") or "lora_B" in name:
            weights[name][:] = float("nan")
    save_file(weights, run / "model" / ADAPTER)
    with pytest.raises(TrainingError, match="the rewards of 40 of 40 comparisons are not finite numbers"):
        evaluate(str(run))
    assert evaluation_of(run) == before


# --- refusals and the gate ---------------------------------------------------------------------


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_scored(run, tmp_path, monkeypatch):
    monkeypatch.setattr(RewardModel, "from_pretrained", None)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match="no folder that can be written to; say with --output where"):
        evaluate(str(run), output=tmp_path / "file/in/it")
    folder = shutil.copytree(run / "model", run / "export")
    (folder / "proof.json").write_text("{}")
    with pytest.raises(RecipeError, match="is an export, .*say with --output"):  # `push` uploads it
        evaluate(str(folder))
    with pytest.raises(RecipeError, match="no held-out split; name one with --dataset"):
        evaluate(str(shutil.copytree(run / "model", tmp_path / "alone")))


def test_comparisons_that_chose_the_checkpoint_are_said_to_have(run, other_set):
    """Of ten checkpoints that are all as good the best is by chance above its interval one time in ten."""
    recipe = (run / "recipe.yaml").read_text()
    kept = "save_strategy: steps\neval_strategy: steps\nload_best_model_at_end: true\n"
    settings = re.compile(r"^(save_strategy|eval_strategy|load_best_model_at_end):.*\n", re.MULTILINE)
    (run / "recipe.yaml").write_text(settings.sub("", recipe) + kept)
    datasets = evaluate(str(run), [HELD_OUT, other_set])["datasets"]
    assert datasets[HELD_OUT]["chose_checkpoint"]
    assert "chose_checkpoint" not in datasets[other_set]


def test_with_gate_the_exit_code_says_whether_the_target_is_reached(run, tiny_data, monkeypatch, capsys):
    recipe = (run / "recipe.yaml").read_text().replace("gate_statistic: accuracy", "gate_statistic: ci_low")
    for target, code in ((0.01, 0), (1.0, 1)):
        changed = recipe.replace("target_accuracy: 0.65", f"target_accuracy: {target}")
        (run / "recipe.yaml").write_text(changed)
        found, out, _ = invoke(monkeypatch, capsys, "evaluate", str(run), "--gate")
        assert found == code
        assert ("not reached" in out) == bool(code)
    assert invoke(monkeypatch, capsys, "evaluate", str(run))[0] == 0
    other = str(tiny_data / "train.jsonl")
    code, _, err = invoke(monkeypatch, capsys, "evaluate", str(run), "--dataset", other, "--gate")
    assert code == 2
    assert "--gate judges the held-out split" in err


def test_the_verdict_that_a_recipe_names_is_that_of_other_sets_too(write_recipe, tmp_path, tiny_data, capsys):
    """Of PKU-SafeRLHF's two; a set without such columns is read as it is."""
    pku = str(REPOSITORY / "tests" / "data" / "hunt" / "pku_saferlhf.jsonl")
    keys = {"test_split_size": 0.5, "num_train_epochs": 1, "max_length": 256}
    named = {"prompt": "prompt", "chosen": "response_0", "rejected": "response_1"}
    named["verdict"] = "safer_response_id=0/1"
    train(read_recipe(write_recipe(dataset_name=pku, columns=named, **keys)))
    found = evaluate(str(tmp_path / "run"), [pku, str(tiny_data)])["datasets"]
    assert found[pku]["n_comparisons"] == 4
    assert found[str(tiny_data)]["n_scored"] == 40
    said = "read as two replies and a verdict (by prompt, response_0, response_1, safer_response_id)"
    assert said in capsys.readouterr().out
