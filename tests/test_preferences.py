"""Rows of data sets become comparisons or a counted reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe.preferences import Comparison, Excluded, as_messages, conversation, parse_row, parse_transcript

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "good"}


def test_a_transcript_becomes_alternating_messages():
    text = "\n\nHuman: Hello\n\nAssistant: Hi. Yes?\n\nHuman: A\n\nB\n\nAssistant: ok "
    assert parse_transcript(text) == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi. Yes?"},
        {"role": "user", "content": "A\n\nB"},
        {"role": "assistant", "content": "ok"},
    ]


def test_a_speakers_name_inside_a_message_starts_no_turn():
    text = "\n\nHuman: Write a dialogue. Human: hi\nAssistant: hey\n\nAssistant: done"
    assert [m["role"] for m in parse_transcript(text)] == ["user", "assistant"]


def test_text_that_is_no_transcript_is_excluded_by_name():
    with pytest.raises(Excluded, match="not_a_transcript"):
        parse_transcript("just some text")


def test_implicit_and_explicit_prompts_give_the_same_comparison():
    expected = Comparison([USER], ["good", "bad"])
    transcript = {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"}
    reply = [{"role": "assistant", "content": "good"}]
    assert parse_row(transcript) == expected
    assert parse_row({"prompt": "Hi", "chosen": "good", "rejected": "bad"}) == expected
    assert parse_row({"prompt": [USER], "chosen": reply, "rejected": "bad"}) == expected
    assert parse_row({"prompt": "Hi", "chosen": [USER, *reply], "rejected": "bad"}) == expected
    assert (
        parse_row({"chosen": [USER, *reply], "rejected": [USER, {"role": "assistant", "content": "bad"}]})
        == expected
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": None, "rejected": "b", "prompt": "p"}, "missing_response"),
        ({"chosen": " ", "rejected": "b", "prompt": "p"}, "empty_response"),
        ({"chosen": "a", "rejected": "a ", "prompt": "p"}, "identical_responses"),
        ({"chosen": "a", "rejected": "b", "prompt": " "}, "empty_prompt"),
        ({"chosen": "\n\nHuman: x", "rejected": "\n\nHuman: x"}, "ends_without_reply"),
        (
            {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: b"},
            "differing_prompts",
        ),
        ({"chosen": [{"text": "a"}], "rejected": "b", "prompt": "p"}, "not_messages"),
        ({"chosen": [USER], "rejected": "b", "prompt": "p"}, "ends_without_reply"),
        (
            {"chosen": [{**REPLY, "content": None}], "rejected": "b", "prompt": "p"},
            "not_messages",
        ),
        (
            {"chosen": [USER, REPLY], "rejected": "b", "prompt": "p"},
            "differing_prompts",
        ),
    ],
)
def test_a_row_that_is_no_comparison_says_why(row, reason):
    with pytest.raises(Excluded) as caught:
        parse_row(row)
    assert caught.value.reason == reason


@given(st.text(), st.text())
def test_any_two_texts_are_a_comparison_or_a_reason(chosen, rejected):
    try:
        comparison = parse_row({"chosen": chosen, "rejected": rejected})
    except Excluded as excluded:
        assert excluded.reason.isidentifier()
    else:
        assert len(set(comparison.responses)) == 2


def test_a_text_prompt_means_one_user_message():
    assert conversation(as_messages("Hi"), "good") == [USER, REPLY]


def test_texts_of_an_explicit_prompt_are_taken_as_they_stand():
    """As `score` takes them, and as a policy writes them."""
    assert parse_row({"prompt": " Hi", "chosen": "a ", "rejected": "b"}) == Comparison(
        [{"role": "user", "content": " Hi"}], ["a ", "b"]
    )
