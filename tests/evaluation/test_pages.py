"""A page shows text as text, whatever it holds, and stands on its own."""

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from rm_recipe.evaluation.report import render_page
from rm_recipe.overoptimization.page import TEMPLATE

EMPTY = {"proxies": "", "gold": "", "verdicts": [], "curves": [], "proxies_in_detail": [], "drawn": []}


def page(**values):
    from rm_recipe.evaluation.format import Table

    overview = Table("All proxies", [""], [], "")
    return render_page(TEMPLATE, **{**EMPTY, "overview": overview, **values})


def test_text_is_escaped_made_visible_and_redacted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    found = page(proxies="<i>a</i>\u202e", gold="hf_abcdefghijklmnopqrstuvwxyz")
    assert "&lt;i&gt;a&lt;/i&gt;[U+202E]" in found
    assert "hf_abc" not in found


def test_markup_of_our_own_passes():
    from rm_recipe.evaluation.report import Picture

    picture = Picture("t", Markup("<svg></svg>"), "n")
    assert "<svg></svg>" in page(curves=[picture])


def test_a_value_that_is_forgotten_is_an_error():
    with pytest.raises(UndefinedError):
        render_page(TEMPLATE, **{k: v for k, v in EMPTY.items() if k != "gold"})


def test_it_asks_nobody_for_anything():
    found = page()
    assert "default-src 'none'" in found
    assert "<script" not in found
