"""Arguments -> effect or one clear message with the contract's exit code."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import run_cli

from rm_recipe import cli

VERBS = "run train check evaluate export push score benchmark overoptimization prepare".split()


def invoke(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """The verb in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["rm-recipe", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_every_verb_explains_itself_with_the_defaults_of_its_options(monkeypatch, capsys):
    for verb in VERBS:
        code, out, _ = invoke(monkeypatch, capsys, verb, "--help")
        assert code == 0
        assert "Usage: rm-recipe" in out
        if verb == "overoptimization":
            assert "[default: 32]" in out


def test_help_answers_without_importing_torch():
    program = (
        "import sys; sys.argv = ['rm-recipe', '--help']\n"
        "from rm_recipe.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stdout.rstrip().endswith("False False")


def test_the_module_is_the_command(tmp_path):
    result = run_cli("train", "gone.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "rm-recipe: gone.yaml: no such recipe\n"


def test_check_says_what_would_be_trained_and_writes_nothing(monkeypatch, capsys, write_recipe, tmp_path):
    recipe = write_recipe()
    code, out, _ = invoke(monkeypatch, capsys, "check", str(recipe))
    assert code == 0
    assert f"{recipe}: fine; it would train" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SystemExit(130), 130, "interrupted"),
        (OSError(28, "No space left on device", "model.bin"), 1, "No space left on device: model.bin"),
        (
            ModuleNotFoundError("No module named 'nil'", name="nil"),
            2,
            "a package is missing: No module named",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            1,
            "out of memory (CUDA out",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory (DefaultCPUAllocator"),
        (MemoryError(), 1, "out of memory ()"),
    ],
    ids=repr,
)
def test_what_goes_wrong_outside_has_its_own_code_and_one_message(monkeypatch, capsys, error, code, message):
    def raise_it(**_):
        raise error

    monkeypatch.setattr(cli, "app", raise_it)
    found, _, err = invoke(monkeypatch, capsys)
    assert found == code
    assert err.startswith(f"rm-recipe: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'peft.nothing'", name="peft.nothing"),  # peft is there
        ImportError("cannot import name 'LoraConfig' from 'peft'", name="peft"),
        ZeroDivisionError(),
    ],
    ids=str,
)
def test_a_program_error_keeps_its_traceback(monkeypatch, error):
    def raise_it(**_):
        raise error

    monkeypatch.setattr(cli, "app", raise_it)
    with pytest.raises(type(error)) as caught:
        cli.main()
    assert caught.value is error


def test_of_several_processes_the_main_one_speaks_and_the_others_only_if_it_does_not(monkeypatch, capsys):
    """The launcher ends the others as soon as it has; ended before, it would say nothing."""
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            cli.fail("what is wrong", 2)
        assert capsys.readouterr().err == "rm-recipe: what is wrong\n"
        assert waited == [cli.SECONDS_TO_SPEAK + 1] * int(rank)


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_an_interrupt_before_training_began_says_the_same_command_again(
    write_recipe, monkeypatch, capsys, flags
):
    """`--resume` would have nothing to go on from, or take up the run that was to be overwritten."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rm_recipe.training.train.load_data", interrupted)
    recipe = write_recipe()
    code, _, err = invoke(monkeypatch, capsys, "train", str(recipe), "--seed", "3", *flags)
    assert code == 130
    assert err.splitlines()[-2:] == [
        "rm-recipe: interrupted before training began",
        f"go on with: rm-recipe train {recipe} --seed 3{' --overwrite' if flags else ''}",
    ]


def test_onednn_does_not_hoard_kernels_unless_the_user_says_so(monkeypatch):
    for given, expected in ((None, "64"), ("9", "9")):
        monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
        if given:
            monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given)
        cli.set_environment()
        assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == expected
