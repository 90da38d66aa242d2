"""What README, docs/ and CONTRIBUTING.md show, and a small stand-in of a reader's folder to run it in."""

import csv
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_rows, write_jsonl

from rm_recipe import cli
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.export import export
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

FENCED = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINKS = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
KINDS = {"bash", "python", "json", "yaml", "text"}

# What makes a shipped recipe small; the stand-in base has no layers 15 to 29.
SMALL = ["--lora_target_modules", "all-linear"]
SIZES = {"8GB": "1GB", "400,800,1600": "16,32"}  # in which the stand-in fits often enough, and has so many
SMALLER = [*SMALL, "--max_train_samples", "16", "--warmup_steps", "0", "--target_accuracy", "0"]


@dataclass(frozen=True)
class Page:
    """A page of Markdown with its fenced blocks."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(REPOSITORY))

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, kind: str) -> list[str]:
        return [text for found, text in FENCED.findall(self.text) if found == kind]

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in FENCED.findall(self.text)]

    @property
    def commands(self) -> list[str]:
        """A line each; one that ends in a backslash goes on in the next."""
        lines = "\n".join(self.blocks("bash")).replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


README = Page(REPOSITORY / "README.md")
CONTRIBUTING = Page(REPOSITORY / "CONTRIBUTING.md")
DOCS = [Page(path) for path in sorted((REPOSITORY / "docs").glob("*.md"))]


def overrides_for(words: list[str]) -> list[str]:
    """What a shown command needs besides so that it runs on the small stand-ins."""
    if "recipes/smollm2_offline.yaml" not in words:
        return []
    if words[0] == "curve":
        return [*SMALL, "--warmup_steps", "0"]
    more = [*SMALLER, "--output_dir", "outputs/by_run"] if words[0] == "run" else SMALL
    return [
        word
        for key, value in zip(more[::2], more[1::2], strict=True)
        if key not in words
        for word in (key, value)
    ]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, tiny_llama, tiny_data):
    """A folder as a reader has it after `make train`, the small model in place of the real ones."""
    root = tmp_path_factory.mktemp("reader")
    fill(root, tiny_llama, tiny_data)
    return root


def fill(root: Path, model: Path, data: Path) -> None:
    """Make recipes, base, data, runs, an export and files of rows."""
    for name in ("recipes", "accelerate_configs"):
        (root / name).symlink_to(REPOSITORY / name)
    for link, there in (("models/smollm2-135m-instruct", model), ("data/offline", data)):
        (root / link).parent.mkdir()
        (root / link).symlink_to(there)
    recipe = root / "smollm2_offline.yaml"
    recipe.write_text(
        f"model_name_or_path: {model}\ndataset_name: {data}\nuse_peft: true\nmax_length: 128\n"
        "num_train_epochs: 1\nlearning_rate: 1e-2\ngradient_checkpointing: false\nuse_cpu: true\n"
        f"save_steps: 4\ndisable_tqdm: true\noutput_dir: {root / 'outputs/smollm2_offline'}\n"
    )
    run = root / "outputs" / "smollm2_offline"
    train(read_recipe(recipe))
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


@pytest.fixture
def printed(workplace, monkeypatch, capsys):
    """A function: what a verb prints, which has to end well."""

    def run(*words: str) -> str:
        monkeypatch.chdir(workplace)
        monkeypatch.setenv("COLUMNS", "80")
        small = [SIZES.get(word, word) for word in words]
        monkeypatch.setattr(sys, "argv", ["rm-recipe", *small, *overrides_for(small)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        return said.out

    return run


def without_figures(line: str) -> str:
    """A line that is printed, figures and the ends of rules apart."""
    return re.sub(r"\s*\d+(\.\d+)?", " #", line.rstrip(" \u2500"))


def verbs(pages: list[Page]) -> list[str]:
    """The `rm-recipe` commands of pages, once each."""
    words = (shlex.split(command) for page in pages for command in page.commands)
    return [*dict.fromkeys(shlex.join(command) for command in words if command[0] == "rm-recipe")]


def launches(pages: list[Page]) -> list[list[str]]:
    """The `accelerate launch` commands, as words."""
    found = dict.fromkeys(
        command for page in pages for command in page.commands if command.startswith("accelerate")
    )
    return [shlex.split(command) for command in found]


def makes(pages: list[Page]) -> list[str]:
    """The `make` commands."""
    return [*dict.fromkeys(c for page in pages for c in page.commands if c.startswith("make"))]
