"""What README, docs/ and CONTRIBUTING.md show is run or looked up; the site builds, and fetches nothing."""

import ast
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, run_cli
from shown import (
    CONTRIBUTING,
    DOCS,
    KINDS,
    LINKS,
    README,
    launches,
    makes,
    printed,  # noqa: F401 - a fixture
    verbs,
    without_figures,
    workplace,  # noqa: F401 - a fixture
)

from rm_recipe.data.formats import parse_row
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.recipe.relations import relation_faults
from rm_recipe.recipe.schema import check_values
from rm_recipe.tools.pipeline import print_summary

PAGES = [README, CONTRIBUTING, *DOCS]
COMMANDS = verbs(PAGES)
PUSHES = [command for command in COMMANDS if command.startswith("rm-recipe push")]
SNIPPETS = {
    snippet: f"{page.name}, {number}"
    for page in reversed(PAGES)
    for number, snippet in enumerate(page.blocks("python"), 1)
}
TREE = "outputs/smollm2_offline/"


@pytest.fixture(scope="session")
def generate():
    """The script that makes parts of pages from the code."""
    spec = importlib.util.spec_from_file_location("generate", REPOSITORY / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_blocks(start: str) -> list[str]:
    return [block for page in PAGES for block in page.blocks("text") if block.startswith(start)]


# --- every block is of a kind that is run --------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_blocks_of_kinds_that_are_run(page):
    assert {*page.kinds} <= KINDS
    assert page.text.count("```") == 2 * len(page.kinds)  # none is indented, or of no kind
    assert {command.split()[0] for command in page.commands} <= {"make", "accelerate", "rm-recipe"}


def test_every_text_that_is_shown_is_compared_with_something():
    starts = ("64 held-out replies", TREE, "token  ")
    assert all(block.startswith(starts) for page in PAGES for block in page.blocks("text"))


def test_every_make_command_is_a_target():
    targets = re.findall(r"^([a-z-]+):.*##", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert {shlex.split(command)[1] for command in makes(PAGES)} <= {*targets}


@pytest.mark.parametrize("words", launches(PAGES), ids=" ".join)
def test_every_launch_names_a_configuration_and_a_recipe_that_parse(words):
    assert (REPOSITORY / words[words.index("--config_file") + 1]).is_file()
    verb, *rest = words[words.index("rm_recipe") + 1 :]
    if verb == "evaluate":
        assert f"rm-recipe {shlex.join([verb, *rest])}" in COMMANDS  # which are run
    else:
        assert verb == "train"
        read_recipe(REPOSITORY / rest[0], rest[1:], check_inputs=False)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in PUSHES])
def test_every_command_works(command, printed):  # noqa: F811
    assert printed(*shlex.split(command)[1:])


@pytest.mark.parametrize("command", PUSHES)
def test_every_push_names_an_export_that_needs_only_a_token(command, workplace, monkeypatch):  # noqa: F811
    """Pushing itself, to a made-up Hub, is in test_push."""
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_HOME", str(workplace))
    result = run_cli(*shlex.split(command)[1:], cwd=workplace)
    assert result.returncode == 2
    assert "there is no token for the Hub" in result.stderr


@pytest.mark.parametrize("snippet", SNIPPETS, ids=SNIPPETS.values())
def test_every_snippet_works(snippet, workplace, monkeypatch):  # noqa: F811
    """It ends well, asserts what it asserts, and prints something."""
    for tracker in ("trackio", "wandb"):  # which nothing else needs
        if f"import {tracker}" in snippet:
            pytest.importorskip(tracker)
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("TRACKIO_DIR", str(workplace / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with redirect_stdout(io.StringIO()) as said:
        exec(compile(snippet, SNIPPETS[snippet], "exec"), {"__name__": "shown"})
    assert said.getvalue().strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_yaml_is_of_keys_that_a_recipe_takes(page):
    """Alone, or in a recipe that has a base and data besides."""
    for block in page.blocks("yaml"):
        values, faults = check_values(yaml.safe_load(block))
        base = {"model_name_or_path": "models/mine"} | (
            {} if "datasets" in values else {"dataset_name": "data/mine"}
        )
        assert [*faults, *relation_faults(base | values, base | values)] == []


def test_the_rows_that_are_shown_are_comparisons():
    for page in PAGES:
        for line in "".join(page.blocks("json")).splitlines():
            comparison = parse_row(json.loads(line))
            assert comparison.prompt[0]["content"] == "How are you?"
            assert comparison.responses[0] == "Fine, and you?"


# --- what is shown of output ---------------------------------------------------------------------


def test_a_run_leaves_the_tree_that_is_drawn(workplace):  # noqa: F811
    [tree] = text_blocks(TREE)
    for line in tree.splitlines()[1:]:
        assert list((workplace / TREE).glob(line.split()[0])), line


def test_the_summary_that_is_shown_is_the_one_that_is_printed(workplace, monkeypatch, capsys):  # noqa: F811
    """Line by line, figures apart."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PATH", "")
    print_summary(Path("outputs/smollm2_offline"))
    [shown] = text_blocks("64 held-out replies")
    lines = {without_figures(line) for line in shown.splitlines()}
    for line in capsys.readouterr().out.splitlines():
        assert without_figures(line) in lines | {""}


def test_the_figures_of_the_data_are_named_as_the_report_has_them(printed, workplace):  # noqa: F811
    folder = workplace / "outputs" / "checked"
    printed("check", "recipes/smollm2_offline.yaml", "--data", "--output_dir", str(folder))
    split = json.loads((folder / "data_report.json").read_text())["splits"]["train"]
    table = (REPOSITORY / "docs" / "tutorial.md").read_text().partition("| figure | train | test |")[2]
    for row in table.partition("\n\n")[0].splitlines()[2:]:
        for path in re.findall(r"`([a-z_.0-9]+)`", row.split("|")[1].partition("(")[0]):
            assert reduce(getitem, path.split("."), split) is not None


# --- what is said of the code --------------------------------------------------------------------


def test_what_is_made_from_the_code_is_up_to_date(generate):
    assert generate.stale() == [], "run `make docs`"


def test_a_stale_page_is_seen(generate):
    page = "<!-- generated: shapes -->\n| an older table |\n<!-- end -->\n"
    assert "summarize_from_feedback" in generate.up_to_date(page)


def test_every_recipe_key_has_a_row():
    from rm_recipe.recipe.schema import FIXED_KEYS, REFUSED_KEYS, recipe_keys

    text = (REPOSITORY / "docs" / "recipes-and-keys.md").read_text()
    rows = {*re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)}
    assert {*recipe_keys().model_fields, *FIXED_KEYS, *REFUSED_KEYS} <= rows


def messages_of_the_code() -> str:
    """Every text of the package, one after the other, with `…` for what is put in."""
    texts = []
    for path in (REPOSITORY / "rm_recipe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_every_message_of_the_troubleshooting_is_one_that_the_code_has():
    """Sentence by sentence, and piece by piece between the `…`."""
    there = messages_of_the_code()
    page = (
        (REPOSITORY / "docs" / "troubleshooting.md")
        .read_text()
        .partition("## What you see in other tools")[0]
    )
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 40
    for message in quoted:
        for piece in filter(str.strip, re.split(r"…|(?<=\.) ", message)):
            assert piece in there, message
    for reason in re.findall(
        r"`([a-z_]+)`", page.partition("is no message but a reason")[2].partition("are in")[0]
    ):
        assert reason in there, reason


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    """Anchors are looked up where the site is built."""
    for target in LINKS.findall(page.text):
        if "://" not in target and not target.startswith("#"):
            assert (page.path.parent / target.partition("#")[0]).exists(), target


# --- the site ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: `make setup` does")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_site_builds_strictly(site):
    names = {path.stem for path in (REPOSITORY / "docs").glob("*.md")}
    assert names <= {path.stem for path in site.glob("*.html")}


def test_the_site_fetches_nothing_from_elsewhere(site):
    """No script, style, font, picture or frame has an address of another host."""
    fetched = r"<(?:script|img|iframe|link|source)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//[^\"\s>]+"
    for path in site.rglob("*.html"):
        found = re.findall(fetched, path.read_text(encoding="utf-8"))
        assert [tag for tag in found if 'rel="canonical"' not in tag] == [], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\"?(?:https?:)?//|@import", path.read_text(encoding="utf-8")), path


def test_every_link_within_the_site_leads_to_a_page(site):
    for path in set(site.glob("*.html")) - {site / "404.html"}:  # which knows no place of its own
        for target in re.findall(r'href="([^"#:?]+)["#?]', path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
