"""Files of prompts and of replies are read in every shape, and what is left out is counted."""

import pytest
from conftest import HH_RLHF, make_rows, needs_hh_rlhf, write_jsonl

from rm_recipe.errors import DataError
from rm_recipe.overoptimization.replies import read_prompts, read_samples


def test_prompts_come_from_prompts_and_from_comparisons_each_once(tmp_path):
    rows = make_rows(2, seed=1)
    transcript = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi?\n\nAssistant: No"}
    file = write_jsonl(
        tmp_path / "prompts.jsonl",
        [{"prompt": "hello"}, *rows, {"prompt": "hello"}, transcript, {"prompt": "bad?", "is_safety": True}],
    )
    found, excluded = read_prompts(file)
    assert not excluded
    assert [one.prompt[-1]["content"] for one in found] == [
        "hello", *(row["prompt"][0]["content"] for row in rows), "Hi?", "bad?"
    ]  # fmt: skip
    assert [one.is_safety for one in found] == [False, False, False, False, True]


def test_replies_are_gathered_by_prompt(tmp_path):
    file = write_jsonl(
        tmp_path / "samples.jsonl",
        [
            {"prompt": "hello", "response": "a"},
            {"prompt": "other", "responses": ["x", ""], "cut": 1},
            {"prompt": [{"role": "user", "content": "hello"}], "response": "b"},
        ],
    )
    (hello, other), _ = read_samples(file)
    assert hello.responses == ["a", "b"]
    assert hello.cut is None
    assert (other.responses, other.cut) == (["x", ""], 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a row is a JSON object"),
        ('{"prompt": "a"}', "line 2: expected a 'prompt' and its 'responses', a list of texts"),
        ('{"prompt": "a", "responses": "b"}', "line 2: expected a 'prompt' and its 'responses'"),
        ('{"prompt": "a", "responses": [1]}', "line 2: expected a 'prompt' and its 'responses'"),
        ('{"responses": ["b"]}', "line 2: column 'prompt' should be a text or a list of messages"),
    ],
)
def test_a_faulty_file_of_replies_is_named_with_its_row(tmp_path, line, said):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"prompt": "hello", "responses": ["a", "b"]}\n' + line + "\n")
    with pytest.raises(DataError, match=said):
        read_samples(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), ("", "is empty"), ('{"text": "a"}\n', "line 1: column 'prompt'")],
)
def test_a_faulty_file_of_prompts_is_named(tmp_path, content, said):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=said):
        read_prompts(file)


def test_a_row_that_is_no_prompt_is_counted_and_the_others_are_read(tmp_path):
    rows = [
        {"prompt": " ", "responses": ["b"]},
        {"prompt": "hello", "responses": ["a"]},
        {"prompt": "a", "responses": ["\ud800"]},
    ]
    found, excluded = read_samples(write_jsonl(tmp_path / "samples.jsonl", rows))
    assert [one.responses for one in found] == [["a"]]
    assert excluded == {"empty_prompt": 1, "invalid_text": 1}
    pair = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi?\n\nAssistant: "}
    found, excluded = read_prompts(write_jsonl(tmp_path / "prompts.jsonl", [pair, *rows[1:]]))
    assert len(found) == 2
    assert excluded == {"empty_response": 1}
    with pytest.raises(DataError, match="holds no prompt that can be used"):
        read_prompts(write_jsonl(tmp_path / "none.jsonl", [pair]))


def test_no_more_rows_are_read_than_are_wanted(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "b"}\n{\n')
    assert [one.prompt[0]["content"] for one in read_prompts(file, 2)[0]] == ["a", "b"]


@needs_hh_rlhf
@pytest.mark.parametrize("name", ["harmless-base", "helpful-base"])
def test_the_prompts_of_genuine_hh_rlhf_are_read(name):
    found, excluded = read_prompts(HH_RLHF / name / "test.jsonl.gz")
    assert len(found) > 200
    assert excluded.total() < 20
