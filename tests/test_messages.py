"""What a prompt is, and what is refused before a template could pass over it."""

import pytest

from rm_recipe.messages import (
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
