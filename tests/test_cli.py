"""Arguments -> effect or one clear message with the contract's exit code."""

import io
import subprocess
import sys

import pytest
import torch

from rm_recipe import cli
from rm_recipe.evaluation.format import print_text


def invoke(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """The verb in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["rm-recipe", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_every_verb_explains_itself_with_the_defaults_of_its_options(monkeypatch, capsys):
    verbs = "init run train check evaluate compare export push score benchmark overoptimization prepare"
    for verb in verbs.split():
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


def test_check_says_what_would_be_trained_and_writes_nothing(monkeypatch, capsys, write_recipe, tmp_path):
    recipe = write_recipe()
    code, out, _ = invoke(monkeypatch, capsys, "check", str(recipe))
    assert code == 0
    assert f"{recipe}: fine (its data were not read: --data); it would train" in out
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = invoke(monkeypatch, capsys, "check", str(recipe), "--model_name_or_path", "some/base")[1]
    assert "some/base is no folder here, so it comes from the Hugging Face Hub" in out
    monkeypatch.setattr("rm_recipe.tools.check.check_step", lambda _: None)  # which reads the data
    assert f"{recipe}: fine; it would" in invoke(monkeypatch, capsys, "check", str(recipe), "--dry-run")[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("code", "message", "error"),
    [
        (130, "interrupted", SystemExit(130)),
        (1, "No space left on device: model.bin", OSError(28, "No space left on device", "model.bin")),
        (2, "a package is missing: none", ModuleNotFoundError("none", name="nil")),
        (1, "out of memory (CUDA out", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
        (1, "out of memory (CUDA error: out", torch.AcceleratorError("CUDA error: out of memory\nCUDA")),
        (1, "out of memory (CUDA error: CUBLAS", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")),
        (1, "out of memory (DefaultCPU", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        (1, "out of memory ()", MemoryError()),
        (None, "peft is there", ModuleNotFoundError("No module named 'peft.nothing'", name="peft.nothing")),
        (None, "so is its name", ImportError("cannot import name 'LoraConfig' from 'peft'", name="peft")),
        (None, "a fault of ours", ZeroDivisionError()),
    ],
    ids=repr,
)
def test_what_goes_wrong_outside_is_one_message_with_a_code_and_a_program_error_keeps_its_traceback(
    monkeypatch, capsys, code, message, error
):
    def raise_it(**_):
        raise error

    monkeypatch.setattr(cli, "app", raise_it)
    with pytest.raises(SystemExit if code else type(error)) as caught:
        cli.main()
    if code:
        assert caught.value.code == code
        err = capsys.readouterr().err
        assert err.startswith(f"rm-recipe: {message}")
        assert err.count("\n") == 1
    else:
        assert caught.value is error


def test_a_sign_that_the_terminal_does_not_know_is_replaced(monkeypatch):
    """As on Windows, where output that goes to a file is in cp1252."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    monkeypatch.setattr(cli, "app", lambda **_: print_text("\N{MINUS SIGN}0.1"))
    cli.main()
    sys.stdout.flush()
    assert written.getvalue().decode("cp1252").strip() == "?0.1"


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
def test_an_interrupt_before_training_says_the_same_command_again(write_recipe, monkeypatch, capsys, flags):
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
