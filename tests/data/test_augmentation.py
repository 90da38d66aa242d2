"""Edited copies of replies: which comparisons get them, what they teach, and what they leave alone."""

import pytest
from conftest import make_rows, write_jsonl

from rm_recipe.data.augmentation import EDITS, UNSEEN, augment, with_copies
from rm_recipe.data.comparison import Comparison, untied_pairs
from rm_recipe.data.splits import load_split
from rm_recipe.data.tokenization import tokenize
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture
def augmented(write_recipe, tiny_llama, tmp_path):
    """What `augment` makes of rows, and the same rows as they were."""
    tokenizer = load_tokenizer(str(tiny_llama), of_base=True)

    def make(rows, **keys):
        recipe = read_recipe(write_recipe(**keys))
        data = recipe.data
        data.dataset_name = str(write_jsonl(tmp_path / "rows.jsonl", rows))
        split = tokenize(load_split(data, None), tokenizer, recipe.training.max_length, "exclude", alike=True)
        return augment(recipe, tokenizer, split).comparisons, split.comparisons

    return make


def test_a_copy_loses_to_its_original_and_wins_of_what_that_wins_of():
    found = with_copies(Comparison(ASKED, ["yes", "well", "no"], margins=[1.0, 3.0, 2.0]), EDITS["thank_you"])
    assert found.responses == ["yes", "yes Thank you!", "well", "no", "no Thank you!"]
    assert found.ranks == [0, 1, 2, 4, 5]
    known = {("yes", "well"): 1.0, ("yes", "no"): 3.0, ("well", "no"): 2.0}
    of = [response.partition(" ")[0] for response in found.responses]
    assert found.margins == [known.get((of[i], of[j]), 0.0) for i, j in untied_pairs(found.ranks)]


def test_a_copy_stands_behind_all_that_tie_with_its_original():
    tied = Comparison(ASKED, ["yes", "sure", "no"], ranks=[0, 0, 1])
    found = with_copies(tied, EDITS["repeated_sentence"])
    assert found.responses == ["yes", "sure", "yes yes", "no", "no no"]
    assert found.ranks == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("name", [*EDITS, *UNSEEN])
def test_every_edit_keeps_the_words_of_a_reply(name):
    reply = "It is. Well,\n\nperhaps!"
    words = iter((EDITS | UNSEEN)[name](reply).replace("*", "").split())
    assert all(word in words for word in reply.split())


def test_the_share_gets_copies_by_seed_and_comparison_whatever_their_order(augmented):
    rows = make_rows(200, seed=1)
    found, before = augmented(rows, augmentation=0.3)
    copied = [len(row["suffixes"]) == 4 for row in found]
    assert 40 <= sum(copied) <= 80
    for row, plain, own in zip(found, before, copied, strict=True):
        assert own or {key: row[key] for key in plain} == plain
        assert row["key"] == plain["key"]
    backwards, _ = augmented(rows[::-1], augmentation=0.3)
    assert [row["suffixes"] for row in backwards][::-1] == [row["suffixes"] for row in found]
    other, _ = augmented(rows, augmentation=0.3, seed=1)
    assert [len(row["suffixes"]) == 4 for row in other] != copied
    assert "copies" not in augmented(rows, augmentation="omit")[0].column_names


def test_copies_that_say_nothing_new_or_do_not_fit_are_counted_and_not_used(augmented, capsys):
    rows = make_rows(30, seed=1)
    for row in rows[:10]:
        row["chosen"] = "good " * 60
    found, before = augmented(rows, augmentation=1.0)
    lengths = [len(row["suffixes"]) for row in found]
    assert 2 in lengths[:10]  # repeated as a whole, it exceeds max_length
    unchanged = [row["copies"] == "nothing to edit" for row in found]  # its sentence on a line of its own
    assert lengths[10:] == [2 if own else 4 for own in unchanged[10:]]
    plain = [row["prefix"] for row, n in zip(found, lengths, strict=True) if n == 2]
    assert plain == [row["prefix"] for row, n in zip(before, lengths, strict=True) if n == 2]
    said = capsys.readouterr().out
    assert f"{lengths.count(4)} of 30" in said
    assert f"{sum(unchanged)} had nothing to edit" in said
    assert f"{lengths.count(2) - sum(unchanged)} would not have fitted" in said
    assert with_copies(Comparison(ASKED, ["yes", "no"]), str.strip) is None


def test_a_model_that_was_shown_copies_is_fooled_less(write_recipe, tmp_path):
    """Bold type goes with the chosen reply in the data; who has seen that it is no merit pays less."""
    rows = make_rows(160, seed=1)
    for row in rows[::2]:
        row["chosen"] = EDITS["markdown"](row["chosen"])
    write_jsonl(tmp_path / "bold" / "train.jsonl", rows)
    write_jsonl(tmp_path / "bold" / "test.jsonl", make_rows(60, seed=2))
    moved = {}
    for share in ("omit", 0.8):
        recipe = read_recipe(write_recipe(dataset_name=str(tmp_path / "bold"), augmentation=share))
        train(recipe, overwrite=True)
        figures = evaluate(str(recipe.output_dir))["datasets"]["held_out"]
        moved[share] = figures["consistency"]["markdown"]["mean_change"] / figures["std_reward"]
        assert figures["accuracy"] > 0.9
        assert figures["consistency"].keys() == EDITS.keys()
        assert figures["consistency_unseen"].keys() == UNSEEN.keys()
        space = figures["consistency"]["trailing_space"]
        assert abs(space["mean_change"]) + space["std_change"] < 1e-5
    assert moved[0.8] < 0.5 * moved["omit"]
