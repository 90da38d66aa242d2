"""What README, docs/ and CONTRIBUTING.md show is run or looked up; the site builds, and fetches nothing.

It is run in a small stand-in of a reader's folder.
"""

import ast
import csv
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, make_recipe, make_rows, run_cli, write_jsonl
from test_cli import invoke

from rm_recipe.data.formats import parse_row
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.export import export
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.recipe.relations import relation_faults
from rm_recipe.recipe.schema import FIXED_KEYS, REFUSED_KEYS, check_values, recipe_keys
from rm_recipe.tools.pipeline import print_summary
from rm_recipe.training.train import train

FENCED = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINKS = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Page:
    """A page of Markdown with its fenced blocks."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in FENCED.findall(self.text)]

    def blocks(self, kind: str) -> list[str]:
        return [text for found, text in FENCED.findall(self.text) if found == kind]

    @property
    def commands(self) -> list[str]:
        """A line each; one that ends in a backslash goes on in the next."""
        lines = "\n".join(self.blocks("bash")).replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


README = Page(REPOSITORY / "README.md")
PAGES = [README, Page(REPOSITORY / "CONTRIBUTING.md"), *map(Page, sorted((REPOSITORY / "docs").glob("*.md")))]
SHOWN = dict.fromkeys(command for page in PAGES for command in page.commands)  # once each, in order
COMMANDS = [command for command in SHOWN if command.startswith("rm-recipe")]
PUSHES = [command for command in COMMANDS if command.startswith("rm-recipe push")]
LAUNCHES = [shlex.split(command) for command in SHOWN if command.startswith("accelerate")]
SNIPPETS = {
    snippet: f"{page.path.name}, {number}"
    for page in reversed(PAGES)
    for number, snippet in enumerate(page.blocks("python"), 1)
}
TREE = "outputs/smollm2_offline/"
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.name)


def text_block(start: str) -> str:
    [block] = [block for page in PAGES for block in page.blocks("text") if block.startswith(start)]
    return block


# --- a reader's folder ---------------------------------------------------------------------------

# What makes a shipped recipe small; the stand-in base has no layers 15 to 29.
SMALL = {"lora_target_modules": "all-linear"}
SMALLER = SMALL | {"max_train_samples": "16", "warmup_steps": "0", "target_accuracy": "0"}
SMALLER_STILL = {"run": SMALLER | {"output_dir": "outputs/by_run"}, "curve": SMALL | {"warmup_steps": "0"}}
SIZES = {"8GB": "1GB", "400,800,1600": "16,32"}  # in which the stand-in fits often enough, and has so many


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, tiny_llama, tiny_data):
    """A folder as a reader has it after `make train`, the small model in place of the real ones."""
    root = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "accelerate_configs"):
        (root / name).symlink_to(REPOSITORY / name)
    for link, there in (("models/smollm2-135m-instruct", tiny_llama), ("data/offline", tiny_data)):
        (root / link).parent.mkdir()
        (root / link).symlink_to(there)
    run = root / "outputs" / "smollm2_offline"
    keys = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 4, "output_dir": str(run)}
    train(read_recipe(make_recipe(root, tiny_llama, tiny_data, **keys)))
    for name in ("tinyllama_hh_lora", "gold"):
        shutil.copytree(run, root / "outputs" / name)
    evaluate(str(run))
    shutil.copytree(run, root / "outputs" / "s1")
    export(run)
    shutil.copytree(run / "export", root / "outputs" / "gold" / "export")
    write_jsonl(root / "replies.jsonl", [{"prompt": "hello", "response": "good"}])
    rows = make_rows(6, seed=3)
    write_jsonl(root / "comparisons.jsonl", rows)
    with (root / "mine.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "reply_a", "reply_b", "better"])
        table.writerows([row["prompt"][0]["content"], row["rejected"], row["chosen"], "B"] for row in rows)
    return root


@pytest.fixture
def printed(workplace, monkeypatch, capsys):
    """A function: what a verb prints, which has to end well."""

    def run(*words: str) -> str:
        monkeypatch.chdir(workplace)
        monkeypatch.setenv("COLUMNS", "80")
        small = SMALLER_STILL.get(words[0], SMALL) if "recipes/smollm2_offline.yaml" in words else {}
        more = [f"--{key}={value}" for key, value in small.items() if f"--{key}" not in words]
        code, out, err = invoke(monkeypatch, capsys, *(SIZES.get(word, word) for word in words), *more)
        assert code == 0, err
        return out

    return run


# --- every block is of a kind that is run --------------------------------------------------------


@of_each_page
def test_a_page_has_blocks_of_kinds_that_are_run(page):
    assert {*page.kinds} <= {"bash", "python", "json", "yaml", "text"}
    assert page.text.count("```") == 2 * len(page.kinds)  # none is indented, or of no kind
    assert {command.split()[0] for command in page.commands} <= {"make", "accelerate", "rm-recipe"}


def test_every_text_that_is_shown_is_compared_with_something():
    starts = ("64 held-out replies", TREE, "token  ")
    assert all(block.startswith(starts) for page in PAGES for block in page.blocks("text"))


def test_every_make_command_is_a_target():
    targets = re.findall(r"^([a-z-]+):.*##", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert {command.split()[1] for command in SHOWN if command.startswith("make")} <= {*targets}


@pytest.mark.parametrize("words", LAUNCHES, ids=" ".join)
def test_every_launch_names_a_configuration_and_a_recipe_that_parse(words):
    assert (REPOSITORY / words[words.index("--config_file") + 1]).is_file()
    verb, *rest = words[words.index("rm_recipe") + 1 :]
    if verb == "evaluate":
        assert f"rm-recipe {shlex.join([verb, *rest])}" in COMMANDS  # which are run
    else:
        assert verb == "train"
        read_recipe(REPOSITORY / rest[0], rest[1:], check_inputs=False)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in PUSHES])
def test_every_command_works(command, printed):
    assert printed(*shlex.split(command)[1:])


@pytest.mark.parametrize("command", PUSHES)
def test_every_push_names_an_export_that_needs_only_a_token(command, workplace, monkeypatch):
    """Pushing itself, to a made-up Hub, is in test_push."""
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_HOME", str(workplace))
    result = run_cli(*shlex.split(command)[1:], cwd=workplace)
    assert result.returncode == 2
    assert "there is no token for the Hub" in result.stderr


@pytest.mark.parametrize("snippet", SNIPPETS, ids=SNIPPETS.values())
def test_every_snippet_works(snippet, workplace, monkeypatch):
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


@of_each_page
def test_every_yaml_is_of_keys_that_a_recipe_takes(page):
    """Alone, or in a recipe that has a base and data besides."""
    for block in page.blocks("yaml"):
        values, faults = check_values(yaml.safe_load(block))
        data = {} if "datasets" in values else {"dataset_name": "data/mine"}
        recipe = {"model_name_or_path": "models/mine", **data, **values}
        assert [*faults, *relation_faults(recipe, recipe)] == []


def test_the_rows_that_are_shown_are_comparisons():
    for page in PAGES:
        for line in "".join(page.blocks("json")).splitlines():
            comparison = parse_row(json.loads(line))
            assert comparison.prompt[0]["content"] == "How are you?"
            assert comparison.responses[0] == "Fine, and you?"


# --- what is shown of output ---------------------------------------------------------------------


def test_a_run_leaves_the_tree_that_is_drawn(workplace):
    for line in text_block(TREE).splitlines()[1:]:
        assert list((workplace / TREE).glob(line.split()[0])), line


def test_the_summary_that_is_shown_is_the_one_that_is_printed(workplace, monkeypatch, capsys):
    """Line by line, figures and the ends of rules apart."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PATH", "")
    print_summary(Path("outputs/smollm2_offline"))
    shown, said = (
        {re.sub(r"\s*\d+(\.\d+)?", " #", line.rstrip(" \u2500")) for line in text.splitlines()}
        for text in (text_block("64 held-out replies"), capsys.readouterr().out)
    )
    assert said <= shown | {""}


def test_the_figures_of_the_data_are_named_as_the_report_has_them(printed, workplace):
    folder = workplace / "outputs" / "checked"
    printed("check", "recipes/smollm2_offline.yaml", "--data", "--output_dir", str(folder))
    split = json.loads((folder / "data_report.json").read_text())["splits"]["train"]
    table = (REPOSITORY / "docs" / "tutorial.md").read_text().partition("| figure | train | test |")[2]
    for row in table.partition("\n\n")[0].splitlines()[2:]:
        for path in re.findall(r"`([a-z_.0-9]+)`", row.split("|")[1].partition("(")[0]):
            assert reduce(getitem, path.split("."), split) is not None


# --- the README's tables -------------------------------------------------------------------------


def test_the_readme_is_short_and_begins_with_what_works_anywhere():
    assert len(README.text.splitlines()) <= 220
    assert README.commands[0] == "make train"
    assert "`make test`" in README.text
    assert any(command.startswith("accelerate launch") for command in README.commands)


def test_the_table_of_recipes_has_every_recipe():
    first_cells = re.findall(r"^\| `(.+?)` \|", README.text, re.MULTILINE)
    named = {name for cell in first_cells for name in cell.split("`, `")}
    assert {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")} <= named


def test_every_figure_of_a_table_was_measured():
    measured = "".join((REPOSITORY / name).read_text() for name in ("recipes/README.md", "CHANGELOG.md"))
    for line in README.text.splitlines():
        if line.startswith("|"):
            missing = {figure for figure in re.findall(r"\b\d+\.\d+\b", line) if figure not in measured}
            assert missing <= {"1.16"}, line  # TRL's version


# --- what is said of the code --------------------------------------------------------------------


@pytest.fixture(scope="session")
def generate():
    """The script that makes parts of pages from the code."""
    spec = importlib.util.spec_from_file_location("generate", REPOSITORY / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_made_from_the_code_is_up_to_date(generate):
    assert generate.stale() == [], "run `make docs`"


def test_a_stale_page_is_seen(generate):
    page = "<!-- generated: shapes -->\n| an older table |\n<!-- end -->\n"
    assert "summarize_from_feedback" in generate.up_to_date(page)


def test_every_recipe_key_has_a_row():
    text = (REPOSITORY / "docs" / "recipes-and-keys.md").read_text()
    rows = {*re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)}
    assert {*recipe_keys().model_fields, *FIXED_KEYS, *REFUSED_KEYS} <= rows


def test_every_message_of_the_troubleshooting_is_one_that_the_code_has():
    """Sentence by sentence, and piece by piece between the `…`, which stand for what is put in."""
    texts = []
    for path in (REPOSITORY / "rm_recipe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    there = "\n".join(texts)
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    page, _, _ = text.partition("## What you see in other tools")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 40
    for message in quoted:
        for piece in filter(str.strip, re.split(r"…|(?<=\.) ", message)):
            assert piece in there, message
    reasons = page.partition("is no message but a reason")[2].partition("are in")[0]
    for reason in re.findall(r"`([a-z_]+)`", reasons):
        assert reason in there, reason


@of_each_page
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
