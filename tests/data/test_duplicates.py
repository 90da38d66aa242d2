"""Comparisons that come again are found, exactly, nearly, or with the opposite verdict."""

import random

from conftest import WORDS, write_jsonl

from rm_recipe.data.doctor import SIMILAR, count_duplicates, shingles
from rm_recipe.data.splits import load_split
from rm_recipe.recipe.schema import DataArguments


def split_of(path, rows):
    return load_split(DataArguments(dataset_name=str(write_jsonl(path, rows))), "train")


def row(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_each_kind_of_repetition_is_counted_once(tmp_path):
    first = row("how are you", "fine", "bad")
    rows = [
        first,
        row("How  are you", "Fine", "bad"),  # exact: case and white space are no difference
        row("how are you", "bad", "fine"),  # exact, the other way round
        row("how are you", "thanks", "no"),  # the prompt only
        row("who are they", "cats", "dogs"),
    ]
    assert count_duplicates(split_of(tmp_path / "x.jsonl", rows)) == {
        "exact": 2, "near": 0, "contradictory": 1, "repeated_prompts": 3,
    }  # fmt: skip


def test_ties_in_another_order_are_no_other_verdict(tmp_path):
    rankings = (("abc", [5, 5, 1]), ("bac", [5, 5, 1]), ("abc", [5, 4, 1]))
    rows = [{"prompt": "p", "responses": list(texts), "scores": scores} for texts, scores in rankings]
    found = count_duplicates(split_of(tmp_path / "x.jsonl", rows))
    assert (found["exact"], found["contradictory"]) == (2, 1)


def jaccard(a: set[bytes], b: set[bytes]) -> float:
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_that_share_their_three_word_sequences(tmp_path):
    """200 long texts, 60 of them again with a few words changed: found unless close to the threshold."""
    rng = random.Random(0)
    words = [f"{word}{n}" for word in WORDS for n in range(20)]
    texts = [[rng.choice(words) for _ in range(120)] for _ in range(200)]
    for number in range(60):
        changed = list(texts[number])
        for place in rng.sample(range(120), number // 5):  # 0 to 11 words
            changed[place] = "changed"
        texts.append(changed)
    rows = [row(" ".join(text[:40]), " ".join(text[40:80]), " ".join(text[80:])) for text in texts]
    found = count_duplicates(split_of(tmp_path / "x.jsonl", rows))
    sets = [shingles(" ".join(["user", *text])) for text in texts]
    similar = [jaccard(sets[200 + number], sets[number]) for number in range(60)]
    clearly = sum(value >= SIMILAR + 0.1 for value in similar)
    perhaps = sum(value >= SIMILAR - 0.15 for value in similar)
    assert found["exact"] == 5  # nothing changed
    assert 10 < clearly < perhaps < 60
    assert clearly <= found["exact"] + found["near"] <= perhaps


def test_three_words_make_a_shingle_and_a_chinese_character_is_a_word():
    assert shingles("a b c d") == {b"a b c", b"b c d"}
    assert shingles("a b") == {b"a b"}
    assert shingles("你好吗朋友") == {s.encode() for s in ("你 好 吗", "好 吗 朋", "吗 朋 友")}
    assert shingles("!?") == {b"!?"}
