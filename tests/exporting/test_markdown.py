"""A name in Markdown is read as it is and means nothing there."""

import html
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rm_recipe.exporting.card import Verbatim, code, plain
from rm_recipe.files import visible

NASTY = st.text(alphabet="ab `*_[]()<>|#!\\~-=+&;:/\"'\n\t1.", max_size=30) | st.text(max_size=20)
RENDERER = MarkdownIt("commonmark", {"html": True}).enable("table")


def one_line(text: str) -> str:
    return visible(" ".join(text.split()))


def inline(text: str) -> list:
    [block] = [token for token in RENDERER.parse(text) if token.type == "inline"]
    return block.children


@given(NASTY)
@example("<script>alert(1)</script>")
@example("[x](javascript:alert(1))")
@example("![x](http://tracker/x.png)")
@example("a | b\n|---|---|")
@example("<http://x>")
def test_plain_text_is_text_in_a_cell_of_a_table(text):
    rendered = RENDERER.parse(f"| a | b |\n|---|---|\n| {plain(text)} | end |\n")
    assert [token.type for token in rendered].count("td_open") == 2
    cells = [token for token in rendered if token.type == "inline"]
    assert {token.type for token in cells[2].children} <= {"text", "text_special", "em_open", "em_close"}
    assert cells[3].content == "end"


@given(NASTY)
@example("`")
@example("a ``` b")
@example("</details>")
def test_code_is_one_span_that_reads_as_the_text(text):
    if not one_line(text):
        return
    before, span, after = inline(f"x {code(text)} y")
    assert (before.type, span.type, after.type) == ("text", "code_inline", "text")
    assert span.content.strip() == one_line(text).strip()


@pytest.mark.parametrize("text", ["---\na: b\n---", "a\r\nb", "a\u2028b", "a\x85b"])
def test_no_name_begins_a_line(text):
    for written in (plain(text), code(text)):
        assert len(written.splitlines()) == 1


def test_what_is_markdown_already_stays():
    assert plain(Verbatim("**a** | b")) == "**a** | b"


@given(st.text(alphabet="ab<>|[]`*#\\", min_size=1))
def test_plain_text_reads_as_it_was(text):
    shown = re.sub(r"<[^>]+>", "", RENDERER.renderInline(plain(text)))
    assert html.unescape(shown) == one_line(text)
