"""Odd machines: a run goes on, or says in one line what is the matter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_rows, write_jsonl

from rm_recipe import cli


def test_onednn_does_not_hoard_kernels_unless_the_user_says_so(monkeypatch):
    for given, expected in ((None, "64"), ("9", "9")):
        monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
        if given:
            monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given)
        cli.set_environment()
        assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == expected


@pytest.fixture
def odd(tmp_path, tiny_llama):
    """A function: `rm-recipe` in a folder with spaces and letters beyond ASCII, and no other variables."""
    folder = tmp_path / "Übung 2: modèles"
    write_jsonl(folder / "données" / "train.jsonl", make_rows(24, seed=1))
    write_jsonl(folder / "données" / "test.jsonl", make_rows(12, seed=2))
    (folder / "le modèle").symlink_to(tiny_llama)
    (folder / "meine recette.yaml").write_text(
        "model_name_or_path: le modèle\ndataset_name: données\nuse_peft: true\nlora_r: 4\nmax_length: 128\n"
        "num_train_epochs: 1\nlearning_rate: 1e-2\nuse_cpu: true\nsave_steps: 2\n",
        encoding="utf-8",
    )

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-m", "rm_recipe", *arguments],
            capture_output=True, encoding="utf-8", cwd=folder, check=False,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", **variables},
        )  # fmt: skip
        assert "Traceback" not in result.stderr, result.stderr
        return result

    return folder, run


def test_a_run_goes_through_where_nothing_is_as_usual(odd):
    """ASCII locale, no HOME, no Hub, spaces and umlauts in every path, a cache that cannot be written."""
    folder, run = odd
    result = run(
        "run",
        "meine recette.yaml",
        LC_ALL="C",
        HF_HUB_OFFLINE="1",
        HF_HOME="/proc/cache",
        MPLCONFIGDIR="/proc/mpl",
    )
    assert result.returncode == 0, result.stderr
    assert (
        "rm-recipe: /proc/cache/datasets cannot be written, so what is made of the data is kept"
        in result.stderr
    )
    assert (folder / "outputs" / "meine recette" / "export" / "proof.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/tmp"},
        {"HOME": "/proc"},
        {"HF_HUB_OFFLINE": "1"},
        {"HF_HOME": "/proc/cache"},
        {"HF_DATASETS_CACHE": "/proc/cache"},
    ],
    ids=str,
)
def test_each_oddity_alone_ends_in_a_run_or_in_one_line(odd, variables):
    folder, run = odd
    result = run("train", "meine recette.yaml", **variables)
    finished = (folder / "outputs" / "meine recette" / "run.json").is_file()
    assert finished is (result.returncode == 0)
    assert finished or result.stderr.count("rm-recipe: ") == 1


def test_a_user_without_a_home_gets_one_for_this_process(monkeypatch):
    """As where a container runs under a number that no account has."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setenv("HOME", "")
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    cli.replace_unwritable_caches()
    assert Path(os.environ["HOME"]).is_dir()


def test_a_folder_is_writable_if_it_or_what_it_would_be_made_in_is(tmp_path):
    (tmp_path / "file").write_text("")
    assert cli._writable(tmp_path / "new" / "newer")
    assert not cli._writable(tmp_path / "file" / "new")
    assert not cli._writable(cli.Path("/proc/new"))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_an_offline_machine_is_told_what_is_missing(odd):
    _, run = odd
    result = run("train", "meine recette.yaml", "--model_name_or_path", "nobody/nothing", HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert result.stderr.count("rm-recipe: ") == 1
    assert "'model_name_or_path: nobody/nothing' cannot be loaded" in result.stderr
