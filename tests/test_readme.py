"""The README is short, and its tables are true. What it shows is run by tests/test_docs.py."""

import re

from conftest import REPOSITORY
from shown import README

LONGEST = 220  # lines
FIGURES = re.compile(r"\b\d+\.\d+\b")
VERSIONS = {"1.16"}  # of TRL, which is no measurement
MEASURED = "".join((REPOSITORY / name).read_text() for name in ("recipes/README.md", "CHANGELOG.md"))


def test_the_readme_is_short_and_begins_with_what_works_anywhere():
    assert len(README.text.splitlines()) <= LONGEST
    assert README.commands[0] == "make train"
    assert "`make test`" in README.text
    assert any(command.startswith("accelerate launch") for command in README.commands)


def test_the_table_of_recipes_has_every_recipe():
    first_cells = re.findall(r"^\| `(.+?)` \|", README.text, re.MULTILINE)
    named = {name for cell in first_cells for name in cell.split("`, `")}
    assert {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")} <= named


def test_every_figure_of_a_table_was_measured():
    """Those of a recipe's row as soon as the recipe is there."""
    there = (REPOSITORY / "recipes" / "smollm2_hh_harmless.yaml").is_file()
    for line in README.text.splitlines():
        if line.startswith("|") and (there or "harmless-base" not in line):
            missing = {figure for figure in FIGURES.findall(line) if figure not in MEASURED}
            assert missing <= VERSIONS, line
