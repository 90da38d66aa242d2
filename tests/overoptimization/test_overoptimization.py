"""What best-of-n by a proxy does to gold, from models and replies to files; and what is refused."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_recipe, run_cli, write_jsonl

from rm_recipe import RewardModel
from rm_recipe.errors import DataError, RecipeError, TrainingError
from rm_recipe.exporting.export import export
from rm_recipe.overoptimization.best_of_n import curve, spread
from rm_recipe.overoptimization.experiment import MEAN, WORST, default_output, overoptimization
from rm_recipe.overoptimization.replies import Sampling
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.rl import combine
from rm_recipe.scoring import RewardModel as Scorer
from rm_recipe.training.train import train

WORDS = ["good", "bad", "good good", "cat on mat", "", "thanks thanks", "no", "far away hello yes"]
ROWS = [
    {
        "prompt": f"hello {number} how are you",
        "responses": [f"{word} {'no ' * (number % 3)}" for word in WORDS],
    }
    for number in range(12)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llama, tiny_distilbert, tiny_data):
    """Runs: two Llamas of other seeds and an encoder, with templates of their own."""
    root = tmp_path_factory.mktemp("judges")
    kinds = {
        "proxy": (tiny_llama, {"seed": 1, "max_steps": 4}),
        "gold": (tiny_llama, {"seed": 2}),
        "encoder": (tiny_distilbert, {"use_peft": False, "learning_rate": 1e-3, "max_length": 64}),
    }
    for name, (base, keys) in kinds.items():
        (root / name).mkdir()
        train(read_recipe(make_recipe(root / name, base, tiny_data, **keys)))
    return {name: str(root / name / "run") for name in kinds}


@pytest.fixture
def samples(tmp_path):
    return write_jsonl(tmp_path / "samples.jsonl", ROWS)


def by_hand(path):
    items = [{"prompt": row["prompt"], "response": reply} for row in ROWS for reply in row["responses"]]
    return RewardModel.from_pretrained(path).score(items).astype(float).reshape(len(ROWS), -1)


def test_given_replies_are_scored_by_both_each_by_its_own_template(models, samples, tmp_path):
    content = overoptimization([models["proxy"]], [models["encoder"]], samples=samples, output=tmp_path / "o")
    proxy, gold = by_hand(models["proxy"]), by_hand(models["encoder"])
    (found,) = content["curves"].values()
    expected = curve(proxy, gold)
    assert found["gold"]["gain"] == pytest.approx(expected.gain.tolist(), abs=1e-4)
    assert found["gold"]["peak_n"] == expected.peak
    assert found["spread"]["gold"] == pytest.approx(spread(gold), rel=1e-4)
    assert content["samples"] == {
        "file": str(samples), "n_prompts": 12, "n_replies": 8, "excluded": {}, "empty_replies": 4,
        "repeated_replies": 0, "cut_replies": None,
    }  # fmt: skip
    files = {path.name for path in (tmp_path / "o").iterdir()}
    assert files == {"overoptimization.json", "overoptimization.html", "overoptimization.svg", "scores.jsonl"}
    assert json.loads((tmp_path / "o" / "overoptimization.json").read_text()) == content
    lines = [json.loads(line) for line in (tmp_path / "o" / "scores.jsonl").read_text().splitlines()]
    assert lines[3]["rewards"][models["proxy"]] == pytest.approx(proxy[3].tolist(), abs=1e-5)
    assert set(found["edits"]) == {"trailing_space", "repeated_sentence", "thank_you", "markdown"}
    assert len(found["examples"]) == 10


def test_a_policy_is_drawn_from_scored_and_reported_on_the_command_line(models, tiny_llama, tiny_data):
    command = ["overoptimization", models["proxy"], "--gold", models["gold"], "--policy", str(tiny_llama),
               "--prompts", str(tiny_data / "test.jsonl"), "--max-prompts", "5", "--n", "4",
               "--max-new-tokens", "6"]  # fmt: skip
    first = run_cli(*command)
    assert first.returncode == 0, first.stderr
    assert "Best of 4 replies to each of 5 prompts" in first.stdout
    assert all(len(line) <= 80 for line in first.stdout.splitlines() if line and line[0] in "┏┃┡│└")
    folder = f"{models['proxy']}/overoptimization"
    assert first.stdout.splitlines()[-1] == f"report: {folder}/overoptimization.html"
    content = json.loads(Path(folder, "overoptimization.json").read_text())
    assert content["sampling"]["policy"] == str(tiny_llama)
    assert content["sampling"]["temperature"] == 1.0
    assert 0 < content["samples"]["cut_replies"] <= 20
    assert content["samples"]["empty_replies"] < 20
    again = run_cli(*command)
    assert "Drawing replies" not in again.stderr
    assert again.stdout == first.stdout
    page = Path(folder, "overoptimization.html").read_text()
    assert content["curves"][models["proxy"]]["verdict"] in html.unescape(page)
    reused = run_cli("overoptimization", models["proxy"], "--gold", models["gold"], "--samples",
                     f"{folder}/samples.jsonl", "--output", f"{folder}/again")  # fmt: skip
    assert reused.returncode == 0, reused.stderr
    other = json.loads(Path(folder, "again", "overoptimization.json").read_text())
    assert other["curves"] == content["curves"]


def test_several_proxies_are_ensembles_too(models, samples, tmp_path):
    content = overoptimization(
        [models["proxy"], models["encoder"]], [models["gold"]], samples=samples, output=tmp_path / "o"
    )
    assert list(content["curves"]) == [models["proxy"], models["encoder"], MEAN, WORST]
    scaled = [(own - own.mean()) / spread(own) for own in map(by_hand, (models["proxy"], models["encoder"]))]
    gold = by_hand(models["gold"])
    for name, together in ((MEAN, np.mean(scaled, axis=0)), (WORST, np.min(scaled, axis=0))):
        expected = curve(together, gold).gain
        assert content["curves"][name]["gold"]["gain"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_several_gold_models_are_their_mean(models, samples, tmp_path):
    content = overoptimization(
        [models["proxy"]], [models["gold"], models["encoder"]], samples=samples, output=tmp_path / "o"
    )
    scaled = [(own - own.mean()) / spread(own) for own in map(by_hand, (models["gold"], models["encoder"]))]
    expected = curve(by_hand(models["proxy"]), np.mean(scaled, axis=0)).gain
    found = content["curves"][models["proxy"]]["gold"]["gain"]
    assert found == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_proxy_with_a_model_of_safety_is_llama_2s_combination(models, tmp_path):
    rows = [{**row, "is_safety": number % 2 == 0} for number, row in enumerate(ROWS)]
    samples = write_jsonl(tmp_path / "marked.jsonl", rows)
    content = overoptimization(
        [models["proxy"]], [models["gold"]], safety=models["encoder"], samples=samples, output=tmp_path / "o"
    )
    (name,) = content["curves"]
    assert name == f"{models['proxy']} with safety {models['encoder']}"
    reward = combine(models["encoder"], models["proxy"], whiten=False)
    both = reward(
        [row["prompt"] for row in rows for _ in WORDS],
        [reply for row in rows for reply in row["responses"]],
        is_safety=[row["is_safety"] for row in rows for _ in WORDS],
    )
    expected = curve(np.reshape(both, (12, -1)), by_hand(models["gold"])).gain
    assert content["curves"][name]["gold"]["gain"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_prompts_that_do_not_fit_a_model_or_have_too_few_replies_are_counted(models, tmp_path):
    rows = [
        *ROWS,
        {"prompt": "thanks", "response": "yes"},
        {"prompt": "fine", "responses": ["yes", "no"]},
        {"prompt": "sat", "responses": [*WORDS, "maybe"]},
        {"prompt": "hello", "responses": ["good " * 200, *WORDS[1:]]},
        {"prompt": " ", "responses": WORDS},
    ]
    samples = write_jsonl(tmp_path / "s.jsonl", rows)
    content = overoptimization([models["proxy"]], [models["gold"]], samples=samples, output=tmp_path / "o")
    assert content["samples"]["excluded"] == {
        "fewer_replies": 2, "does_not_fit_a_model": 1, "empty_prompt": 1
    }  # fmt: skip
    assert content["samples"]["n_prompts"] == 13
    assert content["samples"]["n_replies"] == 8
    assert "1 prompts are left out" in (tmp_path / "o" / "overoptimization.html").read_text()


def test_one_prompt_is_scored_without_intervals(models, tmp_path):
    samples = write_jsonl(tmp_path / "s.jsonl", ROWS[:1])
    content = overoptimization([models["proxy"]], [models["gold"]], samples=samples, output=tmp_path / "o")
    (found,) = content["curves"].values()
    assert found["gold"]["gain_ci95"] is None
    assert found["verdict"].startswith("1 prompt is too few to tell")
    assert "<svg" in (tmp_path / "o" / "overoptimization.html").read_text()


def test_replies_that_are_all_empty_are_kept_and_say_that_there_is_nothing_to_optimise(models, tmp_path):
    rows = [{"prompt": row["prompt"], "responses": ["", "", ""]} for row in ROWS]
    samples = write_jsonl(tmp_path / "s.jsonl", rows)
    content = overoptimization([models["proxy"]], [models["gold"]], samples=samples, output=tmp_path / "o")
    (found,) = content["curves"].values()
    assert content["samples"]["empty_replies"] == 36
    assert content["samples"]["repeated_replies"] == 24
    assert found["verdict"].startswith("This proxy gives all replies to a prompt the same reward")
    assert found["edits"] == {}


def test_the_home_folder_is_in_no_file(models, samples, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(models["proxy"]).parent.parent))
    overoptimization([models["proxy"]], [models["gold"]], samples=samples, output=tmp_path / "o")
    for path in (tmp_path / "o").iterdir():
        assert "~/proxy/run" in path.read_text()
        assert str(Path(models["proxy"]).parent) not in path.read_text()


def test_html_and_controls_in_replies_and_names_are_shown_as_text(models, tmp_path):
    evil = "<script>alert(1)</script>\x00\u202e"
    rows = [{**row, "responses": [evil, *row["responses"][1:]]} for row in ROWS]
    proxy = shutil.copytree(models["proxy"], tmp_path / "<b>proxy</b>")
    samples = write_jsonl(tmp_path / "s.jsonl", rows)
    overoptimization([str(proxy)], [models["gold"]], samples=samples, output=tmp_path / "o")
    for name in ("overoptimization.html", "overoptimization.svg"):
        text = (tmp_path / "o" / name).read_text()
        assert "<script" not in text
        assert "<b>proxy" not in text
        assert "\u202e" not in text
    page = (tmp_path / "o" / "overoptimization.html").read_text()
    assert not re.search(r'(src|href)="(?!#|data:)', page)


# --- what is refused -----------------------------------------------------------------------------


def test_rewards_that_are_no_numbers_name_the_model_and_keep_what_was_drawn(
    models, tiny_llama, tiny_data, tmp_path, monkeypatch
):
    score = Scorer.score

    def broken(self, items, **keys):
        seen.append(1)
        if len(seen) == 2:
            raise TrainingError("the model gives rewards that are not finite numbers")
        return score(self, items, **keys)

    seen: list[int] = []
    monkeypatch.setattr(Scorer, "score", broken)
    drawn = Sampling(str(tiny_llama), n=2, max_new_tokens=3)
    with pytest.raises(
        TrainingError, match=f"^{models['gold']}: .*not finite numbers; drawn replies are kept"
    ):
        overoptimization(
            [models["proxy"]],
            [models["gold"]],
            sampling=drawn,
            prompts=tiny_data / "test.jsonl",
            max_prompts=2,
            output=tmp_path / "o",
        )
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"samples.jsonl", "samples.sampling.json"}


@pytest.mark.parametrize(
    ("proxies", "gold", "said"),
    [
        (["proxy"], ["proxy"], "is the proxy and --gold: what one model does to itself says nothing"),
        (["proxy", "proxy"], ["gold"], "is named twice"),
        (["proxy"], ["gold", "gold"], "is named twice"),
    ],
)
def test_a_model_that_judges_itself_is_refused_before_anything_is_scored(
    models, samples, tmp_path, proxies, gold, said
):
    with pytest.raises(RecipeError, match=said):
        overoptimization(
            [models[name] for name in proxies], [models[name] for name in gold], samples=samples,
            output=tmp_path / "o",
        )  # fmt: skip
    assert not (tmp_path / "o").exists()


def test_a_gold_that_is_the_proxys_export_is_found_out_by_its_rewards(models, samples, tmp_path):
    export(Path(models["proxy"]), tmp_path / "export")
    content = overoptimization(
        [models["proxy"]], [str(tmp_path / "export")], samples=samples, output=tmp_path / "o"
    )
    (found,) = content["curves"].values()
    assert found["agreement"]["mean"] > 0.99
    assert "is it the same model?" in (tmp_path / "o" / "overoptimization.html").read_text()


def test_where_nothing_can_be_compared_it_says_so(models, tmp_path):
    single = write_jsonl(tmp_path / "single.jsonl", [{"prompt": "hello", "response": "good"}])
    with pytest.raises(DataError, match="no prompt has two replies"):
        overoptimization([models["proxy"]], [models["gold"]], samples=single, output=tmp_path / "o")
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "hello", "responses": ["good " * 300, "bad"]}])
    with pytest.raises(DataError, match="every prompt has a reply that does not fit one of the models"):
        overoptimization([models["proxy"]], [models["gold"]], samples=long, output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{proxy}", "--gold", "{gold}"], "give --policy and --prompts, or --samples"),
        (["{proxy}", "--gold", "{gold}", "--policy", "x"], "give --policy and --prompts, or --samples"),
        (
            ["{proxy}", "--gold", "{gold}", "--policy", "x", "--prompts", "y", "--samples", "z"],
            "or --samples",
        ),
        (["{proxy}", "--samples", "z"], "Missing option '--gold'"),
        (["{proxy}", "--gold", "{gold}", "--samples", "z", "--seed", "1", "--n", "4"], "leave out n, seed"),
        (["./gone", "--gold", "{gold}", "--samples", "{samples}"], "./gone does not exist"),
        (["{proxy}", "--gold", "{gold}", "--samples", "gone.jsonl"], "gone.jsonl: no such file"),
        (
            ["{proxy}", "--gold", "{gold}", "--policy", "x", "--prompts", "{samples}", "--n", "1"],
            "'--n 1' must be",
        ),
        (
            ["{proxy}/model", "--gold", "{gold}", "--samples", "{samples}", "--output", "{samples}"],
            "is a file",
        ),
        (
            ["{gold}/model", "--gold", "{proxy}", "--samples", "{samples}", "--max-prompts", "0"],
            "max-prompts",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_one_message(
    models, samples, monkeypatch, capsys, arguments, said
):
    from test_cli import invoke

    places = {**models, "samples": str(samples)}
    code, _, err = invoke(
        monkeypatch, capsys, "overoptimization", *(word.format(**places) for word in arguments)
    )
    assert code == 2
    assert said in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_a_result_goes_into_the_run_of_a_proxy_or_of_its_export(models, tmp_path):
    run = Path(models["proxy"])
    assert default_output(str(run)) == run / "overoptimization"
    assert default_output(str(run / "export")) == run / "overoptimization"
    with pytest.raises(RecipeError, match="is no run folder; say with --output where the result goes"):
        default_output("some/model")
