"""Rows of data sets become comparisons or a counted reason."""

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe.data.comparison import Comparison, untied_pairs
from rm_recipe.data.formats import MARGIN_REASONS, is_comparison_shape, parse_row, prompts_differ, unread
from rm_recipe.data.messages import Excluded, Malformed

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "good"}


def transcript(*texts: str) -> str:
    return "".join(f"\n\n{'Assistant' if n % 2 else 'Human'}: {text}" for n, text in enumerate(texts))


def test_implicit_and_explicit_prompts_give_the_same_comparison():
    expected = Comparison([USER], ["good", "bad"])
    reply = [{"role": "assistant", "content": "good"}]
    bad = {"role": "assistant", "content": "bad"}
    assert parse_row({"chosen": transcript("Hi", "good"), "rejected": transcript("Hi", "bad")}) == expected
    assert parse_row({"prompt": "Hi", "chosen": "good", "rejected": "bad"}) == expected
    assert parse_row({"prompt": [USER], "chosen": reply, "rejected": "bad"}) == expected
    assert parse_row({"prompt": "Hi", "chosen": [USER, *reply], "rejected": "bad"}) == expected
    assert parse_row({"chosen": [USER, *reply], "rejected": [USER, bad]}) == expected


@pytest.mark.parametrize(("label", "best"), [(1, ["good", "bad"]), (2, ["bad", "good"])])
def test_llmbars_label_is_the_number_of_the_better_output(label, best):
    row = {"input": "Hi", "output_1": "good", "output_2": "bad", "label": label}
    assert is_comparison_shape(row)
    assert parse_row(row) == Comparison([USER], best)


@pytest.mark.parametrize("label", [0, 3, "1", "good", [1]])
def test_a_label_that_names_no_output_is_a_fault_of_the_file(label):
    with pytest.raises(Malformed, match="1 or 2, the number of the better output"):
        parse_row({"input": "Hi", "output_1": "good", "output_2": "bad", "label": label})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": None, "rejected": "b", "prompt": "p"}, "missing_response"),
        ({"chosen": " ", "rejected": "b", "prompt": "p"}, "empty_response"),
        ({"chosen": "a", "rejected": "a ", "prompt": "p"}, "identical_responses"),
        ({"chosen": "a", "rejected": "b", "prompt": " "}, "empty_prompt"),
        ({"chosen": "a", "rejected": "b"}, "not_a_transcript"),
        ({"chosen": "\n\nHuman: x", "rejected": "\n\nHuman: x"}, "ends_without_reply"),
        ({"chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: y"}, "empty_prompt"),
        ({"chosen": transcript("x", "a"), "rejected": transcript("y", "b")}, "differing_prompts"),
        (
            {"chosen": transcript("x", "a", "b", "c"), "rejected": transcript("x", "a", "d", "e")},
            "differing_prompts",
        ),
        ({"chosen": transcript("x", "a", "b", "c"), "rejected": transcript("x", "d")}, "differing_prompts"),
        ({"chosen": [{"text": "a"}], "rejected": "b", "prompt": "p"}, "not_messages"),
        ({"chosen": [USER], "rejected": "b", "prompt": "p"}, "ends_without_reply"),
        ({"chosen": [], "rejected": "b", "prompt": "p"}, "ends_without_reply"),
        ({"chosen": [{**REPLY, "content": None}], "rejected": "b", "prompt": "p"}, "not_messages"),
        ({"chosen": [USER, REPLY], "rejected": "b", "prompt": "p"}, "differing_prompts"),
        ({"prompt": "p", "responses": ["a"], "ranks": [1]}, "single_response"),
        ({"prompt": "p", "responses": None, "ranks": [1]}, "missing_response"),
        ({"prompt": "p", "responses": [], "ranks": []}, "single_response"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [10**400, 1]}, "missing_scores"),
        ({"prompt": "p", "responses": ["a", None], "ranks": [1, 2]}, "missing_response"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, "ranks_do_not_match"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": None}, "missing_ranks"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, None]}, "missing_scores"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, "missing_scores"),
        ({"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 2, 2]}, "all_tied"),
        ({"prompt": "p", "responses": ["a", "b", "a "], "ranks": [1, 2, 3]}, "identical_responses"),
        ({"prompt": None, "responses": ["a", "b"], "ranks": [1, 2]}, "empty_prompt"),
        ({"input": "p", "output_1": "a", "output_2": "b", "label": None}, "missing_label"),
        ({"input": "p", "output_1": "a", "output_2": None, "label": 1}, "missing_response"),
        ({"input": None, "output_1": "a", "output_2": "b", "label": 1}, "empty_prompt"),
        ({"input": "p", "output_1": "a", "output_2": "a", "label": 1}, "identical_responses"),
        ({"prompt": [{"role": "system", "content": "s"}], "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": [USER, REPLY], "chosen": "a", "rejected": "b"}, "prompt_ends_with_reply"),
        ({"prompt": [{"role": "judge", "content": "q"}], "chosen": "a", "rejected": "b"}, "unknown_role"),
        ({"prompt": "p", "chosen": "a\ud800", "rejected": "b"}, "invalid_text"),
        ({"prompt": "\ud800p", "chosen": "a", "rejected": "b"}, "invalid_text"),
    ],
)
def test_a_row_that_is_no_comparison_says_why(row, reason):
    with pytest.raises(Excluded) as caught:
        parse_row(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "p", "chosen": 5, "rejected": "b"}, "chosen"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b"]}, "rejected"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": {"role": "user"}, "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "p", "responses": "ab", "ranks": [1, 2]}, "responses"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": ["1", "2"]}, "ranks"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [True, False]}, "scores"),
        ({"instruction": "p", "completions": ["a", "b"]}, "completions"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_column(row, column):
    with pytest.raises(Malformed) as caught:
        parse_row(row)
    assert caught.value.args[0] == column


VALUES = st.one_of(st.none(), st.text(), st.integers(), st.lists(st.sampled_from([USER, REPLY, {}])))
ROWS = st.one_of(
    st.fixed_dictionaries({"chosen": VALUES, "rejected": VALUES}, optional={"prompt": VALUES}),
    st.fixed_dictionaries(
        {"prompt": VALUES, "responses": st.lists(VALUES)},
        optional={
            "ranks": st.lists(st.integers(0, 3)),
            "scores": st.lists(st.floats()),
            "completions": VALUES,
        },
    ),
)


@given(ROWS)
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


def test_texts_of_an_explicit_prompt_are_taken_as_they_stand():
    """As `score` takes them, and as a policy writes them."""
    assert parse_row({"prompt": " Hi", "chosen": "a ", "rejected": "b"}) == Comparison(
        [{"role": "user", "content": " Hi"}], ["a ", "b"]
    )


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


SYSTEM, MORE = said("system", "Be terse."), said("user", "More?")
CALLED = [said("assistant", "calling"), said("tool", "42")]


@pytest.mark.parametrize(
    ("prompt", "before", "shared"),
    [
        ("Hi", [SYSTEM, USER], [SYSTEM, USER]),  # the column has the question only
        ("Hi", [USER, REPLY, MORE], [USER, REPLY, MORE]),  # ... or the first of several
        ("More?", [USER, REPLY, MORE], [USER, REPLY, MORE]),  # ... or the last
        (" Hi\n", [SYSTEM, USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER], [SYSTEM, USER]),  # the column has more
        ([USER], CALLED, [USER, *CALLED]),
        ([USER], [said("assistant", "Let me see.")], [USER, said("assistant", "Let me see.")]),
        ([SYSTEM], [USER], [SYSTEM, USER]),
        ([USER], [REPLY, MORE], [USER, REPLY, MORE]),
        ([], [USER], [USER]),
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


@pytest.mark.parametrize("prompt", [transcript("Hi") + "\n\nAssistant:", "Hi", None])
def test_a_transcript_is_never_twice_in_the_text(prompt):
    row = {"prompt": prompt, "chosen": transcript("Hi", "good"), "rejected": transcript("Hi", "bad")}
    assert parse_row(row) == Comparison([USER], ["good", "bad"])


def test_a_transcript_as_prompt_has_the_texts_without_white_space_for_replies():
    """As in dahoas' copies of hh-rlhf, and as hh-rlhf's own are read."""
    row = {"prompt": transcript("Hi") + "\n\nAssistant:", "chosen": " good", "rejected": " bad "}
    assert parse_row(row) == Comparison([USER], ["good", "bad"])


def test_a_system_column_is_the_system_message():
    row = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
    expected = Comparison([SYSTEM, USER], ["good", "bad"])
    assert parse_row({**row, "system": "Be terse."}) == expected
    assert parse_row({**row, "prompt": [SYSTEM, USER], "system": "Be terse.\n"}) == expected
    ranking = {"prompt": "Hi", "responses": ["good", "bad"], "ranks": [1, 2], "system": "Be terse."}
    assert parse_row(ranking) == expected
    assert parse_row({**row, "system": ""}) == parse_row({**row, "system": None}) == parse_row(row)
    with pytest.raises(Excluded, match="two_system_messages"):
        parse_row({**row, "prompt": [SYSTEM, USER], "system": "Be kind."})
    with pytest.raises(Malformed, match="column 'system' should be a text"):
        parse_row({**row, "system": 5})


def test_tools_leave_a_row_out_under_their_name():
    row = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
    assert parse_row({**row, "tools": []}) == parse_row({**row, "tools": None}) == parse_row(row)
    with pytest.raises(Excluded, match="tools"):
        parse_row({**row, "tools": [{"type": "function"}]})


def test_a_reply_of_several_messages_is_no_text_and_is_counted_as_such():
    row = {"prompt": "Hi", "chosen": [*CALLED, REPLY], "rejected": [said("assistant", "bad")]}
    with pytest.raises(Excluded, match="reply_of_several_messages"):
        parse_row(row)


def test_what_is_not_read_of_a_row_is_named():
    row = {"prompt": "Hi", "chosen": [{**REPLY, "name": "x", "weight": 1}], "rejected": "bad", "system": "s"}
    more = {"context": "doc", "score": 3, "tags": [], "note": None, "m": 1, "subset": "a", "responses": ["c"]}
    assert unread({**row, **more}, "m") == ["context", "score", "responses", "name (of messages)"]
    ranking = {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2], "scores": [2, 1]}
    assert unread(ranking) == ["scores"]
    assert unread({"instruction": "a", "completions": [{"response": "a"}], "models": ["b"]}) == ["models"]


def test_scores_that_are_no_numbers_are_named_as_the_file_names_them():
    """UltraFeedback's judge says N/A at times."""
    row = {
        "instruction": "Hi",
        "completions": [{"response": "a", "overall_score": "N/A"}, {"response": "b", "overall_score": 2}],
    }
    with pytest.raises(Excluded) as caught:
        parse_row(row)
    assert caught.value.reason == "missing_overall_score"
    assert caught.value.detail == "['N/A', 2] are no numbers"
    del row["completions"][0]["overall_score"]
    with pytest.raises(Excluded, match="missing_overall_score"):
        parse_row(row)


def test_decimals_are_numbers():
    row = {"prompt": "Hi", "responses": ["a", "b"], "scores": [Decimal("1.5"), Decimal("4")]}
    assert parse_row(row, "scores") == Comparison([USER], ["b", "a"], [0, 1], [2.5])


def test_windows_line_breaks_are_no_other_transcript():
    row = {"chosen": transcript("Hi", "good"), "rejected": transcript("Hi", "bad")}
    windows = {side: text.replace("\n", "\r\n") for side, text in row.items()}
    assert parse_row(windows) == parse_row(row)


def test_a_reply_that_writes_a_turn_of_its_own_is_a_comparison_all_the_same():
    row = {
        "chosen": transcript("q", "one") + "\n\nAssistant: two",
        "rejected": transcript("q", "three"),
    }
    assert prompts_differ(row)
    assert parse_row(row) == Comparison(
        [{"role": "user", "content": "q"}], ["one\n\nAssistant: two", "three"]
    )
    assert not prompts_differ({"chosen": transcript("q", "a"), "rejected": transcript("q", "b")})


# --- rankings --------------------------------------------------------------------------------


def test_a_ranking_is_one_comparison_best_first_whichever_way_it_is_written():
    expected = Comparison([USER], ["x", "y", "z"], [0, 1, 2])
    assert parse_row({"prompt": "Hi", "responses": ["y", "z", "x"], "ranks": [2, 3, 1]}) == expected
    assert parse_row({"prompt": "Hi", "responses": ["y", "z", "x"], "scores": [0.5, -1, 7]}) == expected
    ultrafeedback = {
        "instruction": "Hi",
        "completions": [
            {"response": text, "overall_score": score, "model": "m"}
            for text, score in (("z", 1.0), ("x", 9.0), ("y", 5.0))
        ],
    }
    assert parse_row(ultrafeedback) == expected


def test_a_row_is_read_in_the_shape_that_it_has_values_for():
    """As the rows of a file of several shapes come: every column, most of them empty."""
    empty = dict.fromkeys(("prompt", "chosen", "rejected", "responses", "ranks", "scores", "completions"))
    ranking = {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2]}
    pair = {"chosen": transcript("Hi", "b"), "rejected": transcript("Hi", "a")}
    assert parse_row({**empty, **ranking}) == parse_row({**empty, **pair}) == parse_row(ranking)
    both = {**ranking, "chosen": "c", "rejected": "d"}
    assert parse_row(both).responses == ["c", "d"]  # TRL's columns come first
    with pytest.raises(Excluded, match="missing_response"):
        parse_row(empty)
    assert parse_row({**ranking, "completions": [{"response": "x"}]}) == parse_row(ranking)


def test_ties_stay_in_the_comparison_and_give_no_pair():
    comparison = parse_row({"prompt": "Hi", "responses": ["a", "b", "c", "b"], "scores": [1, 5, 1, 5]})
    assert comparison.responses == ["b", "b", "a", "c"]
    assert comparison.ranks == [0, 0, 1, 1]
    assert untied_pairs(comparison.ranks) == [(0, 2), (0, 3), (1, 2), (1, 3)]


@given(st.lists(st.integers(1, 5), min_size=2, max_size=9))
def test_k_responses_give_k_choose_2_pairs_less_the_ties(scores):
    row = {"prompt": "p", "responses": [f"r{n}" for n in range(len(scores))], "scores": scores}
    k = len(scores)
    ties = sum(scores[i] == scores[j] for i in range(k) for j in range(i))
    try:
        comparison = parse_row(row)
    except Excluded:
        assert ties == k * (k - 1) / 2
    else:
        assert len(untied_pairs(comparison.ranks)) == k * (k - 1) / 2 - ties
        by_text = dict(zip(row["responses"], scores, strict=True))
        for i, j in untied_pairs(comparison.ranks):
            assert by_text[comparison.responses[i]] > by_text[comparison.responses[j]]


# --- margins ---------------------------------------------------------------------------------

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_a_margin_is_a_number_or_a_category():
    assert parse_row({**PAIR, "m": 0.5}, "m").margins == [0.5]
    levels = {"significantly better": 1, 3: 0.7}
    assert parse_row({**PAIR, "m": "significantly better"}, "m", levels).margins == [1]
    assert parse_row({**PAIR, "m": 3}, "m", levels).margins == [0.7]
    assert parse_row({**PAIR, "m": 3}).margins == []


def test_a_rankings_margins_are_one_number_or_the_differences_of_its_numbers():
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 4, 2]}
    assert parse_row(row, "scores").margins == [2, 3, 1]  # b-c, b-a, c-a
    ranks = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]}
    assert parse_row(ranks, "ranks").margins == [1, 2, 1]  # 1 is best
    pair = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 4]}
    assert parse_row(pair, "scores").margins == [3]
    assert parse_row({**row, "m": 0.5}, "m").margins == [0.5] * 3


@pytest.mark.parametrize("value", ["so so", ["a", "b"], True])
def test_a_margin_that_is_neither_names_its_column(value):
    for categories in (None, {"better": 1}):
        with pytest.raises(Malformed) as caught:
            parse_row({**PAIR, "m": value}, "m", categories)
        assert caught.value.args[0] == "m"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "missing_margin"), (10**400, "missing_margin"), (float("nan"), "missing_margin"),
        ([1, None], "missing_margin"), ([1], "missing_margin"), (-0.1, "negative_margin"),
        ([1, 2], "negative_margin"),
    ],
)  # fmt: skip
def test_a_row_without_a_margin_of_0_or_more_is_excluded(value, reason):
    with pytest.raises(Excluded) as caught:
        parse_row({**PAIR, "m": value}, "m")
    assert caught.value.reason == reason
    assert reason in MARGIN_REASONS


def test_a_category_that_is_a_number_is_found_as_whole_or_decimal():
    assert parse_row({**PAIR, "m": 3.0}, "m", {3: 0.7}).margins == [0.7]
    assert parse_row({**PAIR, "m": "3"}, "m", {3: 0.7}).margins == [0.7]


@pytest.mark.parametrize(
    ("columns", "known"),
    [
        (["chosen", "rejected", "x"], True),
        (["prompt", "responses", "scores"], True),
        (["instruction", "completions"], True),
        (["prompt", "responses"], False),
        (["chosen"], False),
    ],
)
def test_a_data_set_is_recognised_by_its_columns(columns, known):
    assert is_comparison_shape(columns) is known
