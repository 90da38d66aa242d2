"""Nothing of a transcript is lost, and a turn starts only where the speaker changes."""

import gzip
import itertools
import json

import pytest
from conftest import HH_RLHF, needs_hh_rlhf
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe.data.messages import before_last_reply, join_turns, parse_transcript, split_turns

# Pieces in which markers, white space and other scripts meet.
PIECES = st.sampled_from(
    ["\n\nHuman:", "\n\nAssistant:", "Human:", "Assistant: ", "\n", " ", "hi", "你好", "é", "\u2028", "\n\n"]
)
TEXTS = st.one_of(st.text(), st.lists(PIECES).map("".join))


@given(TEXTS)
def test_a_transcript_that_is_taken_apart_and_joined_is_the_same_text(text):
    try:
        turns = split_turns(text)
    except ValueError:
        assert not text.lstrip().startswith(("Human:", "Assistant:"))
    else:
        assert join_turns(turns) == "\n\n" + text.lstrip()
        speakers = [speaker for speaker, _ in turns]
        assert all(a != b for a, b in itertools.pairwise(speakers))


@given(st.lists(TEXTS.map(str.strip), min_size=1))
def test_messages_that_are_written_as_a_transcript_are_read_back(contents):
    """But for those that hold the start of another speaker's turn: nothing could tell it apart."""
    speakers = ["Human", "Assistant"] * len(contents)
    text = join_turns([(s, f" {c}") for s, c in zip(speakers, contents, strict=False)])
    markers = text.count("\n\nHuman:") + text.count("\n\nAssistant:")
    if markers == len(contents):
        assert [message["content"] for message in parse_transcript(text)] == contents


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


def test_a_reply_that_writes_its_own_name_again_stays_one_reply():
    text = "\n\nHuman: q\n\nAssistant: one\n\nAssistant: two"
    assert parse_transcript(text)[-1]["content"] == "one\n\nAssistant: two"
    assert before_last_reply(text) == "\n\nHuman: q\n\nAssistant: one"


@pytest.mark.parametrize("text", ["", "just some text", "Hi\n\nHuman: x", "human: x"])
def test_text_that_is_no_transcript_is_refused(text):
    with pytest.raises(ValueError, match="not a transcript"):
        parse_transcript(text)


@needs_hh_rlhf
@pytest.mark.parametrize("subset", ["helpful-base", "harmless-base"])
def test_every_genuine_transcript_is_given_back_character_for_character(subset):
    for split in ("train", "test"):
        with gzip.open(HH_RLHF / subset / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                for side in ("chosen", "rejected"):
                    assert join_turns(split_turns(row[side])) == row[side]
