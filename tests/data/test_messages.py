"""What a prompt is, and what is refused before a template could pass over it."""

import json

import pytest

from rm_recipe.data.messages import (
    ROLES,
    Excluded,
    Malformed,
    as_messages,
    check_prompt,
    check_unicode,
    conversation,
)

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "good"}


def test_a_text_prompt_means_one_user_message():
    assert conversation(as_messages("Hi"), "good") == [USER, REPLY]


def test_messages_keep_their_role_and_content_and_nothing_else():
    assert as_messages([{**USER, "name": "x"}, REPLY]) == [USER, REPLY]
    for role in ROLES:
        assert as_messages([{"role": role, "content": "a"}])[0]["role"] == role


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([{"text": "a"}], "not_messages"),
        ([{"role": "user", "content": None}], "not_messages"),
        ([{"role": "judge", "content": "q"}], "unknown_role"),
    ],
)
def test_messages_without_role_or_content_are_excluded_by_name(value, reason):
    with pytest.raises(Excluded) as caught:
        as_messages(value)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("human", "user"), ("gpt", "assistant"), ("developer", "system"), ("User", "user"), ("Tool ", "tool")],
)
def test_roles_by_other_names_are_read_as_what_they_are(theirs, ours):
    assert as_messages([{"role": theirs, "content": "a"}]) == [{"role": ours, "content": "a"}]


def test_an_unknown_role_is_named():
    with pytest.raises(Excluded) as caught:
        as_messages([USER, {"role": "narrator", "content": "q"}])
    assert (caught.value.reason, caught.value.detail) == ("unknown_role", "role 'narrator'")


def test_parts_of_text_are_joined_and_another_kind_of_part_is_named():
    text = {"type": "text", "text": "Hi, "}
    # As Parquet has them: every key that a part of the column has.
    padded = [{**text, "image_url": None}, {"type": "text", "text": "you", "image_url": None}]
    assert as_messages([{"role": "user", "content": padded}]) == [{"role": "user", "content": "Hi, you"}]
    for part, kind in (({"type": "image_url", "image_url": "x"}, "image_url"), ("Hi", "str"), ({}, "None")):
        with pytest.raises(Excluded) as caught:
            as_messages([{"role": "user", "content": [text, part]}])
        assert (caught.value.reason, caught.value.detail) == ("not_text", f"a part of type '{kind}'")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tool_calls": [{"function": {"name": "f"}}]}, "tool_calls"),
        ({"tool_calls": [{"function": {"name": "f"}}], "content": None}, "tool_calls"),
        ({"function_call": {"name": "f"}}, "tool_calls"),
        ({"reasoning_content": "hm"}, "reasoning_content"),
        ({"thinking": "hm"}, "reasoning_content"),
        ({"content": None}, "not_messages"),
    ],
)
def test_what_a_message_says_beside_its_text_is_no_silent_loss(more, reason):
    with pytest.raises(Excluded) as caught:
        as_messages([USER, {**REPLY, **more}])
    assert caught.value.reason == reason
    assert caught.value.detail
    assert as_messages([{**REPLY, "tool_calls": [], "reasoning_content": None, "weight": 1}]) == [REPLY]


TURNS = [USER, REPLY, {"role": "user", "content": "And you?\n\nReally?"}]


@pytest.mark.parametrize("text", [json.dumps(TURNS), json.dumps(TURNS, indent=1), " " + json.dumps(TURNS)])
def test_messages_as_json_text_are_decoded(text):
    assert as_messages(text) == TURNS


def test_a_transcript_in_the_prompt_is_turns():
    text = "\n\nHuman: Hi\n\nAssistant: good\n\nHuman: And you?\n\nReally?"
    for prompt in (
        text,
        f"{text}\n\nAssistant:",
        f"{text}\n\nAssistant: ".lstrip(),
        text.replace("\n", "\r\n"),
    ):
        assert as_messages(prompt) == TURNS
    assert as_messages(f"{text}\n\nAssistant: Yes") == [*TURNS, {"role": "assistant", "content": "Yes"}]


@pytest.mark.parametrize(
    "text",
    [
        "Human: is it 'Human:' or\n\nAssistant: that comes first?",
        "Which\n\nHuman: and\n\nAssistant:",
        '{"role": "editor", "name": "x"}',
        '[{"title": "a", "content": "the \\"role\\" of b"}]',
        "[1, 2]",
        "{'a': 1}",
        "['role', 'content']",
    ],
)
def test_a_text_that_only_looks_like_messages_is_a_text(text):
    assert as_messages(text) == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (str(TURNS), "python_repr"),
        (str(REPLY), "python_repr"),
        (f"array([{USER},\n       {REPLY}], dtype=object)", "python_repr"),
        (json.dumps(TURNS)[:-5], "not_messages"),
    ],
)
def test_messages_as_text_that_cannot_be_decoded_are_never_a_text(text, reason):
    with pytest.raises(Excluded) as caught:
        as_messages(text)
    assert caught.value.reason == reason


def test_what_is_no_list_of_messages_names_its_column_and_value():
    with pytest.raises(Malformed) as caught:
        as_messages(5, "chosen")
    assert str(caught.value) == "column 'chosen' should be a text or a list of messages, not int '5'"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "empty_prompt"),
        ([{"role": "system", "content": "s"}], "empty_prompt"),
        ([{"role": "user", "content": " "}], "empty_prompt"),
        ([USER, REPLY], "prompt_ends_with_reply"),
    ],
)
def test_a_prompt_asks_something_and_is_not_answered_yet(prompt, reason):
    check_prompt([REPLY, USER])
    with pytest.raises(Excluded, match=reason):
        check_prompt(prompt)


def test_half_a_surrogate_pair_is_no_text():
    check_unicode(["a", "\U0001f600"])
    with pytest.raises(Excluded, match="invalid_text"):
        check_unicode(["a", "\ud83d"])
