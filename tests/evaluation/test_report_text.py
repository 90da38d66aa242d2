"""Numbers read as numbers, missing ones as a dash, and no text hides what it does."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe.evaluation.format import (
    Row,
    as_text,
    decimal,
    duration,
    interval,
    is_number,
    mapping,
    objects,
    p_value,
    share,
    shorten,
    strip,
    table,
    values,
    whole,
)
from rm_recipe.files import visible

NO_NUMBERS = [None, True, "1", float("nan"), float("inf"), 10**400, [], {}]


@given(st.text(st.characters(codec=None)))
def test_shown_text_holds_nothing_invisible_and_is_stable(text):
    shown = visible(text)
    assert visible(shown) == shown
    shown.encode("utf-8")
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert not [
        c for c in shown if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "RLI")
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\r\nb\tc", "a\nb\tc"),
        ("a\rb\x00\x7f", "a[U+000D]b[U+0000][U+007F]"),
        ("\ud800\x9b", "[U+D800][U+009B]"),
        ("\u202eabc\u200b", "[U+202E]abc[U+200B]"),
        ("\u05d0\u0627\U0001f469\u200d\U0001f680 \u4e2d", "\u05d0\u0627\U0001f469\u200d\U0001f680 \u4e2d"),
    ],
)
def test_what_has_no_shape_gets_one_and_the_rest_stays(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_finite_number_is_a_dash(value):
    assert not is_number(value)
    dash = "\N{EN DASH}"
    assert {decimal(value), whole(value), share(value), duration(value), p_value(value)} == {dash}
    assert interval([value, 1.0]) == interval(value) == dash
    assert strip(value, [0.1, 0.2]) is None


def test_numbers_are_written_alike():
    assert decimal(0.87349) == "0.873"
    assert decimal(-0.0001, signed=True) == "0.000"
    assert decimal(-0.25, 2, signed=True) == "\N{MINUS SIGN}0.25"
    assert decimal(0.5, signed=True) == "+0.500"
    assert decimal(1e9) == "1.000e+09"
    assert (whole(12345), share(0.0301)) == ("12,345", "3.0 %")
    assert interval([0.851, 0.8924]) == "0.851 to 0.892"
    assert (p_value(1e-20), p_value(0.04)) == ("below 0.001", "0.040")
    assert [duration(s) for s in (3.25, 235.49, 7322)] == ["3.2 s", "3 min 55 s", "2 h 2 min"]


def test_an_interval_is_drawn_only_where_it_fits():
    assert strip(0.5, [0.4, 0.6]) == (0.4, 0.5, 0.6)
    assert strip(0.7, [0.4, 0.6]) is None
    assert strip(0.5, [-0.1, 0.6]) is None


def test_what_is_not_there_is_empty():
    assert mapping({"a": {"b": {"c": 1}}}, "a", "b") == {"c": 1}
    assert mapping({"a": None}, "a", "b") == mapping(None) == mapping([], "a") == {}
    assert objects({"a": [{"b": 1}, None, 3]}, "a") == [{"b": 1}]
    assert objects(None, "a") == objects({"a": {}}, "a") == []
    assert (as_text(None), as_text("a"), as_text({"a": "\u00e4"})) == ("", "a", '{"a": "\u00e4"}')


def test_long_text_says_how_much_more_there_is():
    assert shorten("abc", 3) == "abc"
    assert shorten("a" * 5000, 10) == "a" * 10 + " [and 4,990 more characters]"


def test_a_table_shows_fifty_rows_and_no_column_of_dashes():
    dash = "\N{EN DASH}"
    found = table("t", ["name", "empty", "n"], [Row([str(i), dash, "1"]) for i in range(60)], "note")
    assert (found.head, len(found.rows), found.more) == (["name", "n"], 50, 10)
    assert found.rows[0].cells == ["0", "1"]
    assert table("t", ["name"], [], "note") is None


def test_a_list_of_values_leaves_out_what_is_not_known():
    assert [row.cells for row in values("t", {"a": "1", "b": "\N{EN DASH}", "c": ""}, "note").rows] == [
        ["a", "1"]
    ]
    assert values("t", {"b": "\N{EN DASH}"}, "note") is None
