"""What best-of-n by a proxy does to gold, from models and replies to files; and what is refused."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import make_recipe, write_jsonl
from test_cli import invoke

from rm_recipe.errors import DataError, TrainingError
from rm_recipe.overoptimization.best_of_n import gain_curve, spread
from rm_recipe.overoptimization.experiment import comparable, default_output, overoptimization
from rm_recipe.overoptimization.replies import Sample
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.scoring import RewardModel
from rm_recipe.training.train import train

WORDS = ["good", "bad", "good good", "cat on mat", "", "thanks thanks", "no", "far away hello yes"]
ROWS = [
    {"prompt": f"hello {n} how are you", "responses": [f"{word} {'no ' * (n % 3)}" for word in WORDS]}
    for n in range(12)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llama, tiny_distilbert, tiny_data):
    """Runs: two Llamas of other seeds and an encoder, with templates of their own."""
    root = tmp_path_factory.mktemp("runs")
    encoder = {"use_peft": False, "learning_rate": 1e-3, "max_length": 64}
    kinds = {"proxy": (tiny_llama, {"seed": 1, "max_steps": 4}), "gold": (tiny_llama, {"seed": 2})}
    for name, (base, keys) in (kinds | {"encoder": (tiny_distilbert, encoder)}).items():
        (root / name).mkdir()
        train(read_recipe(make_recipe(root / name, base, tiny_data, **keys)))
    return {name: str(root / name / "run") for name in ("proxy", "gold", "encoder")}


def measured(models, tmp_path, rows, **keys):
    """The result for these replies; one proxy and one gold unless said otherwise."""
    keys = {"proxies": [models["proxy"]], "gold": [models["gold"]], "output": tmp_path / "o"} | keys
    return overoptimization(file=write_jsonl(tmp_path / "samples.jsonl", rows), **keys)


@cache
def by_hand(path):
    items = [{"prompt": row["prompt"], "response": reply} for row in ROWS for reply in row["responses"]]
    return RewardModel.from_pretrained(path).score(items).astype(float).reshape(len(ROWS), -1)


def test_a_policy_is_drawn_from_scored_and_reported_on_the_command_line(
    models, tiny_llama, tiny_data, monkeypatch, capsys
):
    command = ["overoptimization", models["proxy"], "--gold", models["gold"]]
    limits = ["--max-prompts", "5", "--n", "4", "--max-new-tokens", "6"]
    prompts = ["--policy", str(tiny_llama), "--prompts", str(tiny_data / "test.jsonl"), *limits]
    code, out, err = invoke(monkeypatch, capsys, *command, *prompts)
    assert code == 0, err
    assert "Best of 4 replies to each of 5 prompts" in out
    folder = default_output(f"{models['proxy']}/export")
    assert folder == Path(models["proxy"], "overoptimization")
    assert out.splitlines()[-1] == f"report: {folder}/overoptimization.html"
    content = json.loads((folder / "overoptimization.json").read_text())
    assert 0 < content["samples"]["cut_replies"] <= 20
    reused = ["--samples", f"{folder}/samples.jsonl", "--output", f"{folder}/again"]
    assert invoke(monkeypatch, capsys, *command, *reused)[0] == 0
    other = json.loads((folder / "again" / "overoptimization.json").read_text())
    assert other["curves"] == content["curves"]


def test_each_model_has_its_template_proxies_are_ensembles_too_and_gold_models_a_mean(models, tmp_path):
    two = [models["proxy"], models["encoder"]]
    scaled = [(own - own.mean()) / spread(own) for own in map(by_hand, two)]
    mean, worst, gold = np.mean(scaled, axis=0), np.min(scaled, axis=0), by_hand(models["gold"])
    content = measured(models, tmp_path, ROWS, proxies=two)
    assert {path.suffix for path in (tmp_path / "o").iterdir()} == {".html", ".json"}
    assert json.loads((tmp_path / "o" / "overoptimization.json").read_text()) == content
    assert list(content["curves"]) == [*two, "mean of the proxies", "worst of the proxies"]
    for found, by in zip(content["curves"].values(), (*scaled, mean, worst), strict=True):
        assert found["gold"]["gain"] == pytest.approx(gain_curve(by, gold)["gain"], abs=1e-3)
    (found,) = measured(models, tmp_path, ROWS, proxies=[models["gold"]], gold=two)["curves"].values()
    assert found["gold"]["gain"] == pytest.approx(gain_curve(gold, mean)["gain"], abs=1e-3)


def test_of_more_replies_than_the_others_have_some_are_taken_by_lot():
    """Not the first ones: a file may be sorted."""
    samples = [Sample([], [str(k) for k in range(100)]), *[Sample([], ["a"] * 10)] * 20, Sample([], ["a"])]
    same = comparable(samples)
    assert [len(one.responses) for one in same] == [10] * 21
    assert max(map(int, same[0].responses)) > 50
    assert comparable(samples) == same


def test_what_cannot_be_compared_and_what_is_empty_or_said_again_is_counted(models, tmp_path):
    rows = [*ROWS, {"prompt": "thanks", "response": "yes"}, {"prompt": "fine", "responses": ["yes", "no"]}]
    rows += [{"prompt": "sat", "responses": [""] * 8}, {"prompt": " ", "responses": WORDS}]
    rows += [{"prompt": "hello", "responses": ["good " * 200, *WORDS[1:]]}]
    found = measured(models, tmp_path, rows)["samples"]
    assert found["excluded"] == {"fewer_replies": 2, "does_not_fit_a_model": 1, "empty_prompt": 1}
    assert (found["n_prompts"], found["n_replies"]) == (13, 8)
    assert (found["empty_replies"], found["repeated_replies"], found["cut_replies"]) == (12, 7, None)


def test_a_copy_is_found_out_names_are_text_and_the_home_folder_is_in_no_file(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    proxy = shutil.copytree(models["gold"], tmp_path / "<b>proxy" / "run")
    evil = "<script>alert(1)</script>\x00\u202e"
    rows = [{**row, "responses": [evil, *row["responses"][1:]]} for row in ROWS]
    measured(models, tmp_path, rows, proxies=[str(proxy)])
    for path in (tmp_path / "o").iterdir():
        text = path.read_text()
        assert "proxy/run" in text
        assert str(tmp_path) not in text
        if path.suffix == ".html":
            assert not re.search(r"<script|<b>proxy|\u202e", text)
    assert "is it the same model?" in (tmp_path / "o" / "overoptimization.html").read_text()


# --- what is refused -----------------------------------------------------------------------------


def test_rewards_that_are_no_numbers_name_the_model(models, tmp_path, monkeypatch):
    monkeypatch.setattr(RewardModel, "score", Mock(side_effect=TrainingError("not finite numbers")))
    with pytest.raises(TrainingError, match=f"^{models['proxy']}: not finite numbers"):
        measured(models, tmp_path, ROWS[:2])


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ([["good"]] * 2, "no prompt has two replies"),
        ([["good " * 300, "bad"]] * 2, "0 prompts are too few .*does_not_fit_a_model 2"),
        ([["good", "bad"]], "1 prompts are too few"),
    ],
)
def test_where_nothing_can_be_compared_it_says_so(models, tmp_path, replies, said):
    rows = [{"prompt": f"hello {n}", "responses": own} for n, own in enumerate(replies)]
    with pytest.raises(DataError, match=said):
        measured(models, tmp_path, rows)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{proxy} --gold {gold} --policy x --samples z", "give --policy and --prompts, or --samples"),
        ("{proxy} --samples z", "Missing option '--gold'"),
        ("./gone --gold {gold} --samples z", "./gone does not exist"),
        ("some/model --gold {gold} --samples z", "is no run folder; say with --output where the result goes"),
        ("{proxy} --gold {gold} --policy x --prompts y --n 1", "'--n': Input should be greater"),
        ("{proxy}/model --gold {gold} --samples z --output {file}", "is a file"),
    ],
)
def test_arguments_that_do_not_go_together_are_one_message(models, monkeypatch, capsys, arguments, said):
    words = arguments.format(**models, file=__file__).split()
    code, _, err = invoke(monkeypatch, capsys, "overoptimization", *words)
    assert code == 2
    assert said in " ".join(err.replace("│", " ").split())
