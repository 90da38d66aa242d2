"""Everything the README shows is run or looked up: its commands, its Python, its rows, its figures."""

import json
import re
import shlex
import subprocess

import pytest
from conftest import REPOSITORY
from shown import KINDS, LINKS, README, launches, makes, printed, verbs, workplace  # noqa: F401 - fixtures

from rm_recipe.data.formats import parse_row
from rm_recipe.recipe.reader import read_recipe

LONGEST = 220  # lines
FIGURES = re.compile(r"\b\d+\.\d+\b")
VERSIONS = {"1.16"}  # of TRL, which is no measurement
MEASURED = "".join((REPOSITORY / name).read_text() for name in ("recipes/README.md", "CHANGELOG.md"))


def test_the_readme_is_short_and_shows_what_can_be_run():
    assert len(README.text.splitlines()) <= LONGEST
    assert {*README.kinds} <= KINDS
    assert README.text.count("```") == 2 * len(README.kinds)  # none is indented, or of no kind
    assert {command.split()[0] for command in README.commands} == {"make", "accelerate", "rm-recipe"}


def test_the_readme_has_the_commands_of_the_project():
    assert "make train" in README.commands
    assert "`make test`" in README.text
    assert any(command.startswith("accelerate launch") for command in README.commands)


@pytest.mark.parametrize("command", makes([README]))
def test_every_make_command_is_a_target(command):
    words = ["make", "-n", *shlex.split(command)[1:]]
    result = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("words", launches([README]), ids=" ".join)
def test_every_launch_names_a_configuration_and_a_recipe_that_parse(words):
    assert (REPOSITORY / words[words.index("--config_file") + 1]).is_file()
    verb = words.index("rm_recipe")
    assert words[verb + 1] == "train"
    read_recipe(REPOSITORY / words[verb + 2], words[verb + 3 :], check_inputs=False)


@pytest.mark.parametrize("command", verbs([README]))
def test_every_command_works(command, printed):  # noqa: F811
    assert printed(*shlex.split(command)[1:])


@pytest.mark.parametrize("snippet", README.blocks("python"))
def test_every_snippet_works(snippet, workplace, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(workplace)
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.search(r"-?\d\.\d+", capsys.readouterr().out)


def test_the_rows_that_the_readme_shows_are_comparisons():
    [shown] = README.blocks("json")
    comparisons = [parse_row(json.loads(line)) for line in shown.splitlines()]
    assert {comparison.prompt[0]["content"] for comparison in comparisons} == {"How are you?"}
    assert {comparison.responses[0] for comparison in comparisons} == {"Fine, and you?"}
    assert [len(comparison.responses) for comparison in comparisons] == [2, 3, 2]


def test_the_table_of_recipes_has_every_recipe():
    listed = {name for line in README.text.splitlines() for name in re.findall(r"^\| `(.+)` \|", line)}
    named = {name for cell in listed for name in cell.split("`, `")}
    assert {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")} <= named


def test_every_figure_of_a_table_was_measured():
    """Those of a recipe's row only once the recipe is there."""
    for line in README.text.splitlines():
        if line.startswith("|") and "harmless-base" not in line:
            missing = {figure for figure in FIGURES.findall(line) if figure not in MEASURED}
            assert missing <= VERSIONS, line


@pytest.mark.parametrize("target", [link for link in LINKS.findall(README.text) if "://" not in link])
def test_every_link_leads_to_a_file(target):
    assert (REPOSITORY / target.partition("#")[0]).is_file()
