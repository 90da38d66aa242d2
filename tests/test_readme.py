"""Everything the README shows is run: its commands, its Python and the trees that it draws."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_rows, run_cli, write_jsonl

from rm_recipe import cli
from rm_recipe.data.formats import parse_row
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.export import export
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.pipeline import print_summary
from rm_recipe.training.train import train

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]
TREES = {
    text.splitlines()[0].split()[0]: text
    for kind, text in BLOCKS
    if kind == "text" and "/" in text.split()[0]
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_llama, tiny_data):
    """A folder as a reader has it after `make train`, the small model in place of the real ones."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "accelerate_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    for link, there in (("models/smollm2-135m-instruct", tiny_llama), ("data/offline", tiny_data)):
        (folder / link).parent.mkdir()
        (folder / link).symlink_to(there)
    recipe = folder / "smollm2_offline.yaml"
    recipe.write_text(
        f"model_name_or_path: {tiny_llama}\ndataset_name: {tiny_data}\nuse_peft: true\nmax_length: 128\n"
        "num_train_epochs: 1\nlearning_rate: 1e-2\ngradient_checkpointing: false\nuse_cpu: true\n"
        f"save_steps: 4\ndisable_tqdm: true\noutput_dir: {folder / 'outputs/smollm2_offline'}\n"
    )
    run = folder / "outputs" / "smollm2_offline"
    train(read_recipe(recipe))
    for name in ("tinyllama_hh_lora", "gold"):
        shutil.copytree(run, folder / "outputs" / name)
    evaluate(str(run))
    export(run)
    write_jsonl(folder / "replies.jsonl", [{"prompt": "hello", "response": "good"}])
    write_jsonl(folder / "comparisons.jsonl", make_rows(6, seed=3))
    return folder


@pytest.fixture
def printed(workplace, monkeypatch, capsys):
    """A function: what a verb prints, which has to end well."""

    def run(*words: str) -> str:
        monkeypatch.chdir(workplace)
        monkeypatch.setenv("COLUMNS", "80")
        if "recipes/smollm2_offline.yaml" in words and "--lora_target_modules" not in words:
            words += ("--lora_target_modules", "all-linear")  # the small model has no layers 15 to 29
        monkeypatch.setattr(sys, "argv", ["rm-recipe", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        return said.out

    return run


def test_the_readme_has_the_commands_of_the_project():
    assert {"make train", "make test"} <= set(COMMANDS)
    assert any(command.startswith("accelerate launch") for command in COMMANDS)
    assert README.index("make train") < README.index("make test") < README.index("accelerate launch")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_every_make_command_is_a_target(command):
    result = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("accelerate")])
def test_every_launch_names_a_configuration_and_a_recipe_that_parse(command):
    words = shlex.split(command)
    assert (REPOSITORY / words[words.index("--config_file") + 1]).is_file()
    verb = words.index("rm_recipe")
    if words[verb + 1] == "evaluate":
        assert f"rm-recipe {shlex.join(words[verb + 1 :])}" in COMMANDS  # which is run below
        return
    assert words[verb + 1] == "train"
    read_recipe(REPOSITORY / words[verb + 2], words[verb + 3 :], check_inputs=False)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("rm-recipe push")])
def test_every_push_names_an_export_that_needs_only_a_token(command, workplace, monkeypatch):
    """Pushing itself, to a Hub on localhost, is in test_push."""
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_HOME", str(workplace))
    result = run_cli(*shlex.split(command)[1:], cwd=workplace)
    assert result.returncode == 2
    assert "there is no token for the Hub" in result.stderr


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("rm-recipe") and not c.startswith("rm-recipe push")]
)
def test_every_command_works(command, printed):
    assert printed(*shlex.split(command)[1:])


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_works(snippet, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.search(r"-?\d\.\d+", capsys.readouterr().out)


def test_no_kind_of_command_goes_unchecked():
    assert all(command.split()[0] in ("make", "accelerate", "rm-recipe") for command in COMMANDS)


def test_a_run_leaves_what_the_readme_draws(workplace):
    tree = TREES["outputs/smollm2_offline/"]
    for line in tree.splitlines()[1:]:
        assert list((workplace / "outputs/smollm2_offline").glob(line.split()[0])), line


def test_the_tree_of_the_code_is_the_tree_on_disk():
    drawn, folder = set(), "rm_recipe/"
    for line in TREES["rm_recipe/"].splitlines():
        if not line.startswith(" "):
            folder = line.split()[0].rpartition("/")[0] + "/"
            assert (REPOSITORY / folder).is_dir()
        drawn |= {folder + name for name in re.findall(r"\w+\.py", line)}
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "rm_recipe").rglob("*.py")}
    assert drawn == {path for path in modules if "__" not in path}


def test_the_summary_that_the_readme_shows_is_the_one_that_is_printed(workplace, monkeypatch, capsys):
    """Line by line, figures apart."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PATH", "")
    print_summary(Path("outputs/smollm2_offline"), Path("recipes/smollm2_offline.yaml"))
    shown = {without_figures(line) for kind, text in BLOCKS if kind == "text" for line in text.splitlines()}
    for line in capsys.readouterr().out.splitlines():
        assert without_figures(line) in shown | {""}


def test_the_rows_that_the_readme_shows_are_comparisons():
    [shown] = [text for kind, text in BLOCKS if kind == "json"]
    comparisons = [parse_row(json.loads(line)) for line in shown.splitlines()]
    assert {comparison.prompt[0]["content"] for comparison in comparisons} == {"How are you?"}
    assert {comparison.responses[0] for comparison in comparisons} == {"Fine, and you?"}
    assert [len(comparison.responses) for comparison in comparisons] == [2, 3, 2]


def test_the_table_that_the_readme_shows_is_the_doctors(printed):
    """Line by line, figures and their columns apart."""
    table = printed("check", "recipes/smollm2_offline.yaml", "--data", "--max_train_samples", "20")
    [shown] = [text for kind, text in BLOCKS if kind == "text" and text.startswith("Data\n")]
    assert [without_figures(line) for line in table.partition("report:")[0].strip().splitlines()] == [
        without_figures(line) for line in shown.strip().splitlines()
    ]


def without_figures(line: str) -> str:
    return re.sub(r"\s*\d+(\.\d+)?", " #", line.rstrip(" \u2500"))
