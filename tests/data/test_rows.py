"""Rows of data sets, in whatever shape they are written, become comparisons or a counted reason."""

import itertools
import json
from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe.data.comparison import (
    Comparison,
    Excluded,
    Malformed,
    as_messages,
    parse_transcript,
    tools_of,
    untied_pairs,
)
from rm_recipe.data.formats import parse_row, prompts_differ


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


USER, REPLY = said("user", "Hi"), said("assistant", "good")
SYSTEM, MORE = said("system", "Be terse."), said("user", "More?")
CALLED = [said("assistant", "calling"), said("tool", "42")]
PAIR = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
EXPECTED = Comparison([USER], ["good", "bad"])


def transcript(*texts: str) -> str:
    return "".join(f"\n\n{'Assistant' if n % 2 else 'Human'}: {text}" for n, text in enumerate(texts))


def why(function, *arguments) -> tuple[str, str]:
    """The reason for which something is left out, and what more is said of it."""
    with pytest.raises(Excluded) as caught:
        function(*arguments)
    return caught.value.reason, caught.value.detail


# --- pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"chosen": transcript("Hi", "good"), "rejected": transcript("Hi", "bad")},
        {"prompt": "Hi", "chosen": transcript("Hi", "good"), "rejected": transcript("Hi", "bad")},
        {"prompt": [USER], "chosen": [REPLY], "rejected": "bad"},
        {"chosen": [USER, REPLY], "rejected": [USER, said("assistant", "bad")]},
        {"prompt": transcript("Hi") + "\n\nAssistant:", "chosen": " good", "rejected": " bad "},
        {"input": "Hi", "output_1": "good", "output_2": "bad", "label": 1},
        {"input": "Hi", "output_1": "bad", "output_2": "good", "label": 2},
        {"prompt": "Hi", "responses": ["bad", "good"], "ranks": [2, "1"]},
    ],
)
def test_every_way_to_write_a_pair_gives_the_same_comparison(row):
    assert parse_row(row) == EXPECTED
    texts = {key: value.replace("\n", "\r\n") for key, value in row.items() if isinstance(value, str)}
    assert parse_row(row | texts) == EXPECTED  # as on Windows


@pytest.mark.parametrize(
    ("prompt", "before", "shared"),
    [
        ("Hi", [SYSTEM, USER], [SYSTEM, USER]),  # the column has the question only
        ("More?", [USER, REPLY, MORE], [USER, REPLY, MORE]),  # ... or the last of several
        ([SYSTEM, USER], [USER], [SYSTEM, USER]),  # the column has more
        ([USER], CALLED, [USER, *CALLED]),
        ([SYSTEM], [USER], [SYSTEM, USER]),
        ([USER], [REPLY, MORE], [USER, REPLY, MORE]),
        ("", [USER], [USER]),
        (transcript("Hi") + "\n\nAssistant:", [USER], [USER]),
        (json.dumps([USER]), [USER], [USER]),
    ],
)
def test_what_chosen_and_rejected_share_is_the_prompt(prompt, before, shared):
    sides = {side: [*before, said("assistant", side)] for side in ("chosen", "rejected")}
    expected = Comparison(shared, ["chosen", "rejected"])
    assert parse_row({"prompt": prompt, **sides}) == expected
    assert parse_row({"prompt": prompt, **{side: json.dumps(m) for side, m in sides.items()}}) == expected
    responses = [sides["rejected"], sides["chosen"]]
    assert parse_row({"prompt": prompt, "responses": responses, "scores": [1, 2]}) == expected


def test_texts_of_an_explicit_prompt_are_taken_as_they_stand():
    """As `score` takes them, and as a policy writes them."""
    row = {"prompt": " Hi", "chosen": "a ", "rejected": "b"}
    assert parse_row(row) == Comparison([said("user", " Hi")], ["a ", "b"])


def test_a_system_column_is_the_system_message():
    expected = Comparison([SYSTEM, USER], ["good", "bad"])
    assert parse_row({**PAIR, "system": "Be terse."}) == expected
    assert parse_row({**PAIR, "prompt": [SYSTEM, USER], "system": "Be terse.\n"}) == expected
    for name in ("system_prompt", "system_message", "systemInstruction"):
        assert parse_row({**PAIR, name: "Be terse."}) == expected
    assert parse_row({**PAIR, "system": "Be terse.", "system_prompt": "Judge."}) == expected
    assert parse_row({**PAIR, "system": "", "system_prompt": None}) == EXPECTED
    with pytest.raises(Malformed, match="column 'system' should be a text"):
        parse_row({**PAIR, "system": 5})


REFUSED = {
    "missing_response": {"chosen": None, "rejected": "b", "prompt": "p"},
    "empty_response": {"chosen": " ", "rejected": "b", "prompt": "p"},
    "identical_responses": {"chosen": "a", "rejected": "a ", "prompt": "p"},
    "empty_prompt": {"chosen": "a", "rejected": "b", "prompt": " "},
    "reply_of_several_messages": {**PAIR, "chosen": [*CALLED, REPLY], "rejected": [REPLY]},
    "prompt_ends_with_reply": {**PAIR, "prompt": [USER, REPLY]},
    "two_system_messages": {**PAIR, "prompt": [SYSTEM, USER], "system": "Be kind."},
    "not_text": {**PAIR, "image_path": "a.png"},
    "invalid_text": {**PAIR, "chosen": "a\ud800"},
    "single_response": {"prompt": "p", "responses": ["a"], "ranks": [1]},
    "ranks_do_not_match": {"prompt": "p", "responses": ["a", "b"], "ranks": [1]},
    "ranks_do_not_match of two columns": {"input": "p", "output_1": ["a", "c"], "output_2": "b", "label": 2},
    "missing_ranks": {"prompt": "p", "responses": ["a", "b"], "ranks": None},
    "all_tied": {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 2, 2]},
    "missing_label": {"input": "p", "output_1": "a", "output_2": "b", "label": None},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_row_that_is_no_comparison_says_why(reason):
    assert why(parse_row, REFUSED[reason])[0] == reason.partition(" ")[0]


@pytest.mark.parametrize("score", [None, "N/A", True, float("nan"), 10**400])
def test_a_score_that_is_no_number_leaves_its_row_out_and_is_shown(score):
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, score]}
    assert why(parse_row, row) == ("missing_scores", f"scores: {[1, score]}"[:68])


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "p", "chosen": 5, "rejected": "b"}, "chosen"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "prompt"),
        ({**PAIR, "tools": "f"}, "tools"),
        ({**PAIR, "tools": [{"type": "function", "function": "f"}]}, "tools"),
        ({"prompt": "p", "responses": "ab", "ranks": [1, 2]}, "responses"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": 1}, "ranks"),
        ({"prompt": "p", "responses": "[" * 5000, "ranks": [1, 2]}, "responses"),
        ({"instruction": "p", "completions": ["a", "b"]}, "completions"),
        ({"instruction": "p", "input": 5, "chosen": "a", "rejected": "b"}, "input"),
        ({"instruction": [USER], "input": "p", "chosen": "a", "rejected": "b"}, "instruction"),
        ({"question": "p", "history": 5, "chosen": "a", "rejected": "b"}, "history"),
        ({**PAIR, "initial_reason_steps": 5}, "initial_reason_steps"),
        ({"input": "p", "preferred_output": [REPLY], "non_preferred_output": "b"}, "input"),
        ({"message_tree_id": 1, "prompt": {"role": "prompter", "text": "p", "replies": 5}}, "replies"),
        ({"input": "Hi", "output_1": "good", "output_2": "bad", "label": "fine"}, "label"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_column(row, column):
    with pytest.raises(Malformed, match=f"column '{column}' should be "):
        parse_row(row)


# Pieces in which markers, white space and other scripts meet.
MARKERS = ["\n\nHuman:", "\n\nAssistant:", "Human:", "Assistant: "]
PIECES = [*MARKERS, "\n", " ", "hi", "你好", "é", "\u2028", "\n\n"]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)
VALUES = st.none() | TEXTS | st.integers() | st.lists(st.sampled_from([USER, REPLY, {}]))
PAIRS = st.fixed_dictionaries({"chosen": VALUES, "rejected": VALUES}, optional={"prompt": VALUES})
RANKINGS = {"prompt": VALUES, "responses": st.lists(VALUES), "ranks": st.lists(st.integers(0, 3))}


@given(PAIRS | st.fixed_dictionaries(RANKINGS))
def test_any_row_is_a_comparison_or_has_a_reason(row):
    try:
        comparison = parse_row(row)
    except Excluded as excluded:
        assert excluded.reason.isidentifier()
    except Malformed as fault:
        assert fault.args[0] in row
    else:
        assert comparison.ranks == sorted(comparison.ranks)
        assert untied_pairs(comparison.ranks)
        for i, j in untied_pairs(comparison.ranks):
            assert comparison.responses[i].strip() != comparison.responses[j].strip()


# --- rankings and margins --------------------------------------------------------------------


def test_a_ranking_is_one_comparison_best_first_whichever_way_it_is_written():
    expected = Comparison([USER], ["x", "y", "z"], [0, 1, 2])
    assert parse_row({"prompt": "Hi", "responses": ["y", "z", "x"], "ranks": [2, 3, 1]}) == expected
    scores = [Decimal("0.5"), -1, 7]
    assert parse_row({"prompt": "Hi", "responses": ["y", "z", "x"], "scores": scores}) == expected
    published = [{"response": text, "overall_score": score} for text, score in (("z", 1), ("x", 9), ("y", 5))]
    assert parse_row({"instruction": "Hi", "completions": published}) == expected


def test_a_category_of_a_margin_is_the_one_that_is_spelt_alike_before_one_that_is_meant():
    levels = {"much better": 1, "MUCH BETTER": 3, "null": 2, 4: 5}
    found = {"much better": 1, "MUCH BETTER": 3, "null": 2, 4.0: 5, "4": 5, "4.0": 5}
    for value, margin in found.items():
        assert parse_row({**PAIR, "m": value}, "m", levels).margins == [margin]


def test_a_margin_is_a_number_or_the_difference_of_a_rankings_numbers():
    assert parse_row({**PAIR, "m": 0.5}, "m").margins == [0.5]
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 4, 2]}
    assert parse_row(row, "scores").margins == [2, 3, 1]  # b-c, b-a, c-a
    assert parse_row({**row, "m": 0.5}, "m").margins == [0.5] * 3
    ranks = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]}
    assert parse_row(ranks, "ranks").margins == [1, 2, 1]  # 1 is best


@pytest.mark.parametrize("value", [None, "", float("nan"), [1, None], [1], -0.1, [1, 2]])
def test_a_row_without_a_margin_of_0_or_more_says_so(value):
    fault = "negative_margin" if value in (-0.1, [1, 2]) else "missing_margin"
    assert why(parse_row, {**PAIR, "m": value}, "m")[0] == fault


@pytest.mark.parametrize("value", ["so so", ["a", "b"], True])
def test_a_margin_that_is_neither_names_its_column(value):
    for categories in (None, {"better": 1}):
        with pytest.raises(Malformed, match="column 'm' should be"):
            parse_row({**PAIR, "m": value}, "m", categories)


# --- messages --------------------------------------------------------------------------------


def test_roles_by_other_names_are_read_as_what_they_are_and_unknown_ones_named():
    roles = {"human": "user", "developer": "system", **dict.fromkeys(("gpt", "MODEL", "AI"), "assistant")}
    for theirs, ours in roles.items():
        assert as_messages([{**said(theirs, "a"), "name": "x"}]) == [said(ours, "a")]
        assert as_messages({"from": theirs, "value": "a"}) == [said(ours, "a")]
        assert as_messages({"role": theirs, "text": "a"}) == [said(ours, "a")]
    assert why(as_messages, [USER, said("narrator", "q")]) == ("unknown_role", "role 'narrator'")


def test_parts_of_text_are_joined_and_another_kind_of_part_is_named():
    text = {"type": "text", "text": "Hi, "}
    # As Parquet has them: every key that a part of the column has.
    padded = [{**text, "image_url": None}, {"type": "text", "text": "you", "image_url": None}]
    assert as_messages([said("user", padded)]) == [said("user", "Hi, you")]
    gemini = [{"text": "Hi, "}, {"text": "you"}]
    assert as_messages([{"role": "model", "parts": gemini}]) == [said("assistant", "Hi, you")]
    with pytest.raises(Excluded, match="not_text") as caught:
        as_messages([{"role": "model", "parts": [{"text": "Hm", "thought": True}, *gemini]}])
    assert caught.value.detail == "a part of type 'text, thought'"
    assert as_messages([said("user", [{"type": "input_text", "text": "Hi"}])]) == [USER]
    others = [({"type": "image_url", "image_url": "x"}, "image_url"), ({"fileData": "x"}, "fileData")]
    for part, kind in (*others, ("Hi", "str"), ({}, "")):
        assert why(as_messages, [said("user", [text, part])]) == ("not_text", f"a part of type '{kind}'")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tool_calls": [{"function": {"name": "f"}}]}, "tool_calls"),
        ({"reasoning_content": "hm"}, "reasoning_content"),
        ({"thinking": "hm"}, "reasoning_content"),
        ({"function_calls": "f(n=1)"}, "tool_calls"),
        ({"functions": '[{"name": "f"}]'}, "tool_calls"),
        ({"content": None}, "not_messages"),
        ({"role": None}, "not_messages"),
    ],
)
def test_what_a_message_says_beside_its_text_is_no_silent_loss(more, reason):
    assert why(as_messages, [USER, {**REPLY, **more}])[0] == reason
    assert as_messages([{**REPLY, "tool_calls": [], "reasoning_content": None, "weight": 1}]) == [REPLY]
    assert as_messages([{**REPLY, "function_calls": "[]", "functions": "null"}]) == [REPLY]


def test_calls_of_tools_are_kept_as_json_however_they_are_written():
    call = {"name": "f", "arguments": {"n": 1}}
    kept = {**REPLY, "content": "", "tool_calls": json.dumps([{"type": "function", "function": call}])}
    as_text = {"type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    for written in ({"tool_calls": [as_text]}, {"function_call": call}):
        assert as_messages([{**REPLY, "content": None, **written}]) == [kept]
    assert json.loads(tools_of({"tools": [json.dumps(call)]})) == [call]  # one text each, as a table has them
    assert "2024-07-26" in tools_of({"tools": [{"name": "f", "since": date(2024, 7, 26)}]})  # of a table


TURNS = [USER, REPLY, said("user", "And you?\n\nReally?")]


def test_a_prompts_text_may_be_messages_as_json_a_transcript_or_helpsteers_turns():
    text = transcript("Hi", "good", "And you?\n\nReally?")
    helpsteer = "Hi\n<extra_id_1>Assistant\ngood\n<extra_id_1>User\nAnd you?\n\nReally?"
    for prompt in (
        json.dumps(TURNS),
        " " + json.dumps(TURNS, indent=1),
        text,
        f"{text}\n\nAssistant:",
        f"{text}\n\nAssistant: ".lstrip(),
        text.replace("\n", "\r\n"),
        helpsteer,
        f"{helpsteer}\n<extra_id_1>Assistant\n",
    ):
        assert as_messages(prompt) == TURNS
    assert as_messages(f"{text}\n\nAssistant: Yes") == [*TURNS, said("assistant", "Yes")]


@pytest.mark.parametrize("gap", ["\n", "\n\n", "\r\n"])
@pytest.mark.parametrize("asks", ["Human", "User"])
@pytest.mark.parametrize("answers", ["Assistant", "Bot", "AI"])
def test_a_transcript_of_other_speakers_or_without_blank_lines_is_read_as_one(gap, asks, answers):
    begin = gap.join([f"{asks}: Hi", f"{answers}: good", f"{asks}: More?", f"{answers}:"])
    expected = Comparison([USER, REPLY, MORE], ["a", "b"])
    assert parse_row({"chosen": f"{begin} a", "rejected": f"{begin} b"}) == expected
    assert parse_row({"prompt": begin, "chosen": " a", "rejected": " b"}) == expected


def test_a_transcript_with_blank_lines_before_some_turns_only_loses_none():
    assert as_messages("User: Hi\nAI: good\nUser: More?\n\nAI:") == [USER, REPLY, MORE]
    assert as_messages("User: Hi\n\nAI: good\nUser: More?\nAI:") == [USER, REPLY, MORE]


@pytest.mark.parametrize(
    "text",
    [
        "Human: is it 'Human:' or\n\nAssistant: that comes first?",
        '{"role": "editor", "name": "x"}',
        '[{"title": "a", "content": "the \\"role\\" of b"}]',
        "['role', 'content']",
        "User: is what I wrote\nBot: and what it said. Which is better?",
        "Rate this:\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And you?\n\nAssistant: Fine",
        "[INST] is what kind of tag?",
        "<start_of_turn> is a token of Gemma's?",
        "Prompter: one who prompts actors",
    ],
)
def test_a_text_that_only_looks_like_messages_is_a_text(text):
    assert as_messages(text) == [said("user", text)]


# As chat templates and others' transcripts write what is asked; each ends where a reply is to come.
OTHER_TURNS = [
    "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<s>[INST] Hi [/INST]",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>",
    "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n",
    "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:",
    "### Human: Hi### Assistant:",
    "Human: Hi Assistant: good Human: More? Assistant:",
    "prompter: Hi",
    transcript("Hi", "good", "More?").removeprefix("\n\nHuman: "),
    "Hi\n\nAssistant:",
    "Be terse.\n\nHuman: Hi\n\nAssistant: good\n\nHuman: More?\n\nAssistant:",
    "A chat between a user and an assistant. USER: Hi ASSISTANT: good</s>USER: More? ASSISTANT:",
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>",
    "[gMASK]<sop><|user|>\nHi<|assistant|>\n",
    "GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant:",
    "BEGINNING OF CONVERSATION:\nUSER: Hi ASSISTANT:",
    "###\nHuman: Hi\n###\nAssistant:",
    "<human>: Hi\n<bot>:",
    "\u7528\u6237\uff1aHow are you?\n\u52a9\u624b\uff1a",
]


@pytest.mark.parametrize("text", OTHER_TURNS)
def test_turns_that_are_not_read_as_such_are_never_one_message(text):
    assert why(as_messages, text)[0] == why(parse_row, {**PAIR, "prompt": text})[0] == "unread_turns"
    assert parse_row({**PAIR, "chosen": text}).responses[0] == text  # a model may have written it


@pytest.mark.parametrize(
    "asked", ["Human: Hi", "\n\nHuman: Hi", transcript("Hi") + "\n\nAssistant:", "User: Hi\nBot:"]
)
def test_replies_to_a_transcript_that_all_bear_their_speakers_name_are_read_without_it(asked):
    name = asked.rpartition("\n")[2] if asked.endswith(":") else "Assistant:"
    named = {"chosen": f"{name} good", "rejected": f"\n{name} bad"}
    assert parse_row({"prompt": asked, **named}) == EXPECTED
    found = parse_row({"prompt": asked, "responses": [*named.values()][::-1], "scores": [1, 2]})
    assert found == EXPECTED
    assert parse_row({"prompt": "Hi", **named}).responses == list(named.values())
    titles = {"chosen": "AI: The Next Frontier", "rejected": "AI: It Is Here"}  # of no speaker
    assert parse_row({"prompt": transcript("A title?") + "\n\nAssistant:", **titles}).responses == [
        *titles.values()
    ]


def test_a_prompt_that_speaks_of_a_user_and_ends_in_a_colon_is_a_text_like_any_other():
    for text in (
        "Note to human: compare GPT and BERT. Start with GPT:",
        "Advise this user: name the best AI:",
    ):
        assert parse_row({**PAIR, "prompt": text}).prompt == [{"role": "user", "content": text}]


def test_a_reply_that_alone_bears_the_name_which_the_prompt_lacks_is_not_read():
    assert why(parse_row, {**PAIR, "prompt": "Human: Hi", "chosen": "Assistant: good"})[0] == "unread_turns"


def test_messages_as_text_that_cannot_be_decoded_are_never_a_text():
    assert why(as_messages, str(TURNS))[0] == "python_repr"
    assert why(as_messages, f"array([{USER},\n       {REPLY}], dtype=object)")[0] == "python_repr"
    assert why(as_messages, json.dumps(TURNS)[:-5])[0] == "not_messages"


@given(TEXTS)
def test_a_transcript_taken_apart_and_joined_is_the_same_but_for_what_stands_around_its_messages(text):
    try:
        messages = parse_transcript(text)
    except Excluded:
        assert not text.lstrip().startswith(("Human:", "Assistant:"))
    else:
        names = {"user": "Human:", "assistant": "Assistant:"}
        joined = "".join(names[message["role"]] + message["content"] for message in messages)
        assert "".join(joined.split()) == "".join(text.split())
        assert all(message["content"] in text.replace("\r\n", "\n") for message in messages)
        assert all(a["role"] != b["role"] for a, b in itertools.pairwise(messages))


def test_a_speakers_name_inside_a_message_starts_no_turn():
    text = "\n\nHuman: Write a dialogue. Human: hi\nAssistant: hey\n\nAssistant: done "
    written = said("user", "Write a dialogue. Human: hi\nAssistant: hey")
    assert parse_transcript(text) == [written, said("assistant", "done")]


def test_a_reply_that_writes_a_turn_of_its_own_is_a_comparison_all_the_same():
    row = {"chosen": transcript("q", "one") + "\n\nAssistant: two", "rejected": transcript("q", "three")}
    assert prompts_differ(row)
    assert parse_row(row) == Comparison([said("user", "q")], ["one\n\nAssistant: two", "three"])
    assert not prompts_differ({"chosen": transcript("q", "a"), "rejected": transcript("q", "b")})
