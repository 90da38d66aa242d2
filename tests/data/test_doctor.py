"""The report's figures are those counted by hand, and it stands where the contract says."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from conftest import HH_RLHF, WORDS, make_rows, needs_hh_rlhf, write_jsonl
from datasets import Dataset
from rich.console import Console

from rm_recipe.data.comparison import Comparison
from rm_recipe.data.doctor import (
    SIMILAR,
    count_duplicates,
    count_same_replies,
    examine,
    print_report,
    shingles,
)
from rm_recipe.data.splits import load_split, load_splits
from rm_recipe.data.tokenization import render, tokenize
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.recipe.schema import DataArguments
from rm_recipe.training.train import load_data

# Of a split, by the contract.
FIGURES = "rows comparisons excluded duplicates differing_prompts truncated identical_after_truncation "
FIGURES += "baselines shared_prefix_share tokens"


def report_of(recipe_path):
    recipe = read_recipe(recipe_path)
    _, train_split, test_split, leakage = load_data(recipe)
    return examine(recipe, train_split, test_split, leakage)


def test_every_flaw_is_counted_with_its_row(write_recipe, flawed):
    report = report_of(write_recipe(**flawed, leakage="allow"))
    figures = report["splits"]["train"]
    rows = {"empty_response": "7", "identical_responses": "8", "response_too_long": "9", "too_long": "11"}
    assert figures["excluded"] == dict.fromkeys(rows, 1)
    assert figures["first_rows"] == {reason: [row] for reason, row in rows.items()}
    assert (figures["rows"], figures["comparisons"]) == (13, 9)
    found = {"exact": 2, "near": 0, "contradictory": 0, "repeated_prompts": 2, "prompt_in_replies": 0}
    assert figures["duplicates"] == found
    assert figures["truncated"] == 1
    leakage = {"prompts": 1, "comparisons": 1, "first_turns": 1, "first_rows": ["6"], "policy": "allow"}
    leakage["same_replies"] = 1
    assert leakage.items() <= report["leakage"].items()


def test_the_report_has_the_contracts_keys_and_its_sums_and_the_table_fits(write_recipe, flawed, tmp_path):
    report = report_of(write_recipe(**flawed, leakage="drop", max_train_samples=4))
    assert report.keys() >= {"splits", "leakage"}
    assert report["splits"].keys() == {"train", "test"}
    for figures in report["splits"].values():
        assert figures.keys() >= set(FIGURES.split())
        assert figures["duplicates"].keys() >= {"exact", "near"}
        assert figures["baselines"].keys() == {"longer_wins", "shorter_wins"}
        assert figures["tokens"].keys() == {"p50", "p90", "p99", "max"}
        assert figures["rows"] == figures["comparisons"] + sum(figures["excluded"].values())
    assert report["splits"]["train"]["excluded"]["leaked_prompt"] == 1
    json.dumps(report, allow_nan=False)
    console = Console(width=80, record=True)
    report["leakage"]["same_replies"] = 3
    print_report(report, console)
    printed = console.export_text()
    assert "Leakage: 3 held-out comparisons have the very replies of one of train" in printed
    table, _, said = printed.partition("train, ")
    assert max(map(len, table.splitlines())) <= 80
    assert "too_long: row 11" in said
    assert "1 prompts and 1 first turns of train are held out too" in printed
    assert "'leakage: drop' with 'leakage_by: prompt' concerns 1 comparisons (row 6)" in printed
    rows = [{**row, "context": "doc", "subset": "[/INST] [red]"} for row in make_rows(30, seed=1)]
    rows[0]["prompt"] = [{"role": "judge", "content": "a"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    print_report(report_of(write_recipe(dataset_name=str(path), test_split_size=0.5)), console)
    printed = console.export_text()
    assert "Held out: 50% of the prompts" in printed
    assert "Accuracy on 14 held-out comparisons will be known to about 0.26 either way (95 %)." in printed
    assert "train, unknown_role: row [/INST] [red]:1 (role 'judge')" in printed
    assert printed.count("Columns not read: context.") == 1


def test_tokens_prefix_share_and_baselines_equal_a_naive_count(write_recipe, tiny_data, tiny_llama):
    figures = report_of(write_recipe())["splits"]["train"]
    tokenizer = load_tokenizer(str(tiny_llama), of_base=True)
    lengths, longer, shared, plain = [], [], 0, 0
    for row in map(json.loads, (tiny_data / "train.jsonl").open()):
        both = [
            tokenizer(render(tokenizer, messages))["input_ids"]
            for messages in Comparison(row["prompt"], [row["chosen"], row["rejected"]]).conversations()
        ]
        lengths += [len(ids) for ids in both]
        same = 0
        while both[0][same] == both[1][same]:
            same += 1
        plain += sum(map(len, both))
        shared += sum(map(len, both)) - same
        longer.append((np.sign(len(both[0]) - len(both[1])) + 1) / 2)
    assert figures["tokens"]["max"] == max(lengths)
    assert figures["tokens"]["p50"] == np.percentile(lengths, 50, method="higher")
    assert figures["shared_prefix_share"] == pytest.approx(1 - shared / plain)
    assert figures["baselines"]["longer_wins"] == pytest.approx(np.mean(longer))
    assert figures["baselines"]["shorter_wins"] == pytest.approx(1 - np.mean(longer))


@needs_hh_rlhf
@pytest.mark.parametrize(("subset", "longer"), [("harmless-base", 0.445), ("helpful-base", 0.61)])
def test_genuine_hh_rlhf_is_as_it_was_counted_before(write_recipe, tiny_llama, subset, longer):
    """The official harmless-base test split, of which this is a part: longer wins 0.445, shared 37 %."""
    keys = {"dataset_name": str(HH_RLHF), "dataset_subsets": [subset], "max_train_samples": 500}
    recipe = read_recipe(write_recipe(**keys))
    train_split, test_split, leakage = load_splits(recipe)
    assert leakage["comparisons"] == 0
    tokenizer = load_tokenizer(str(tiny_llama))
    splits = [tokenize(split, tokenizer, None, "exclude") for split in (train_split, test_split)]
    for figures in examine(recipe, *splits, leakage)["splits"].values():
        assert figures["duplicates"]["exact"] == 0
        assert figures["baselines"]["longer_wins"] == pytest.approx(longer, abs=0.05)
        assert figures["shared_prefix_share"] == pytest.approx(0.37, abs=0.05)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_chosen_replies_with_the_lower_score_are_counted_and_named(write_recipe, tmp_path, suffix):
    rows = [row | {"score_chosen": 8, "score_rejected": 3.5} for row in make_rows(9, seed=1)]
    rows[1]["score_chosen"] = rows[4]["score_chosen"] = 2
    rows[5]["score_rejected"] = None
    table = Dataset.from_list([row | {"prompt": row["prompt"][0]["content"]} for row in rows])
    write = table.to_json if suffix == "jsonl" else table.to_csv
    for name in ("train", "test"):
        write(str(tmp_path / f"{name}.{suffix}"))
    report = report_of(write_recipe(dataset_name=str(tmp_path), leakage="allow"))
    assert report["splits"]["train"]["scored_lower"] == {"comparisons": 2, "first_rows": ["2", "5"]}


@pytest.mark.parametrize(("by", "comparisons"), [("prompt", 1), ("first_turn", 3)])
def test_dialogues_of_several_depths_leak_by_their_first_turn(write_recipe, tmp_path, by, comparisons):
    """Two longer ones of a held-out dialogue, and one that is held out as it is."""
    train, test = make_rows(8, seed=1), make_rows(4, seed=2)
    goes_on = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "far"}]
    for n, row in enumerate(train[:3]):
        row["prompt"] = [{"role": "system", "content": "x"}] * (n == 1) + test[0]["prompt"] + goes_on[: 2 * n]
    train[2]["prompt"] = test[1]["prompt"] + goes_on * 2
    train[0]["prompt"] = test[0]["prompt"]
    for name, rows in (("train", train), ("test", test)):
        write_jsonl(tmp_path / "deep" / f"{name}.jsonl", rows)
    keys = {"dataset_name": str(tmp_path / "deep"), "leakage": "drop", "leakage_by": by}
    report = report_of(write_recipe(**keys))
    found = {"prompts": 1, "first_turns": 2, "comparisons": comparisons, "by": by}
    assert found.items() <= report["leakage"].items()
    assert report["splits"]["train"]["excluded"] == {f"leaked_{by}": comparisons}


def split_of(path, rows):
    return load_split(DataArguments(dataset_name=str(write_jsonl(path, rows))), "train")


def row(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_each_kind_of_repetition_is_counted_once(tmp_path):
    rows = [
        row("how are you", "fine", "bad"),
        row("How  are you", "Fine", "bad"),  # exact: case and white space are no difference
        row("how are you", "bad", "fine"),  # exact, the other way round
        row("how are you", "thanks", "no"),  # the prompt only
        row("who are they", "cats", "dogs"),
        row("who was it that rang?", "Who was it that rang?\nI", "who was it that rang? you"),  # in both
        row("where was it found then?", "where was it found then?", "here"),  # in one
        row("hi", "hi there", "high time"),  # no more than a greeting
    ]
    found = {"exact": 2, "near": 0, "contradictory": 1, "repeated_prompts": 3, "prompt_in_replies": 1}
    assert count_duplicates(split_of(tmp_path / "x.jsonl", rows)) == found


def test_ties_in_another_order_are_no_other_verdict(tmp_path):
    rankings = (("abc", [5, 5, 1]), ("bac", [5, 5, 1]), ("abc", [5, 4, 1]))
    rows = [{"prompt": "p", "responses": list(texts), "scores": scores} for texts, scores in rankings]
    found = count_duplicates(split_of(tmp_path / "x.jsonl", rows))
    assert (found["exact"], found["contradictory"]) == (2, 1)


def test_near_duplicates_are_those_that_share_their_three_word_sequences(tmp_path):
    """100 long texts, 60 of them again with 0 to 11 words changed: found unless close to the threshold."""
    rng = random.Random(0)
    words = [f"{word}{n}" for word in WORDS for n in range(20)]
    texts = [[rng.choice(words) for _ in range(120)] for _ in range(100)]
    for number in range(60):
        texts.append(list(texts[number]))
        for place in rng.sample(range(120), number // 5):
            texts[-1][place] = "changed"
    rows = [row(" ".join(text[:40]), " ".join(text[40:80]), " ".join(text[80:])) for text in texts]
    found = count_duplicates(split_of(tmp_path / "x.jsonl", rows))
    sets = [shingles(" ".join(["user", *text])) for text in texts]
    similar = [len(one & other) / len(one | other) for one, other in zip(sets, sets[100:], strict=False)]
    clearly = sum(value >= SIMILAR + 0.1 for value in similar)
    perhaps = sum(value >= SIMILAR - 0.15 for value in similar)
    assert found["exact"] == 5  # nothing changed
    assert 10 < clearly < perhaps < 60
    assert clearly <= found["exact"] + found["near"] <= perhaps


def test_held_out_comparisons_with_the_replies_of_one_of_train_are_counted_and_others_not(tmp_path):
    """An exclamation mark more was no leakage: the model had 1.000, and nothing was said."""
    rng = random.Random(0)
    words = [f"{word}{n}" for word in WORDS for n in range(20)]
    rows = [row(*(" ".join(rng.choices(words, k=12)) for _ in range(3))) for _ in range(40)]
    few = row("is it?", "yes, it is", "no, it is not")
    train = split_of(tmp_path / "train.jsonl", [*rows[:30], few])
    copies = [one | {"prompt": f"{one['prompt']}!", "chosen": one["chosen"].upper()} for one in rows[:5]]
    swapped = [one | {"chosen": one["rejected"], "rejected": one["chosen"]} for one in rows[5:8]]
    same_prompt = [one | {"chosen": other["chosen"]} for one, other in pairwise(rows[8:])]
    held_out = [*copies, *copies, *swapped, *same_prompt, *rows[30:], few | {"prompt": "really?"}]
    assert count_same_replies(train, split_of(tmp_path / "test.jsonl", held_out)) == 13


def test_three_words_make_a_shingle_and_a_chinese_character_is_a_word():
    assert shingles("a b c d") == {b"a b c", b"b c d"}
    assert shingles("a b") == {b"a b"}
    assert shingles("你好吗朋友") == {s.encode() for s in ("你 好 吗", "好 吗 朋", "吗 朋 友")}
    assert shingles("!?") == {b"!?"}
