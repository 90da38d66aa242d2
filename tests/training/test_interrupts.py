"""A signal is answered at once, or when there is something saved; and it is never forgotten."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import REPOSITORY

from rm_recipe.training import interrupts
from rm_recipe.training.interrupts import SIGNALS, Interrupts

pytestmark = pytest.mark.usefixtures("as_in_a_terminal")
NUMBERS = pytest.mark.parametrize("number", SIGNALS)


@NUMBERS
def test_a_signal_raises_at_once_where_nothing_is_to_be_saved(number):
    requests = Interrupts()
    with requests.listening(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert requests.received == number


@NUMBERS
def test_where_something_is_to_be_saved_it_is_noted_and_answered(capfd, monkeypatch, number):
    monkeypatch.setenv("RANK", "0")
    requests = Interrupts()
    with requests.listening(), requests.deferred("saving first"):
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGINT)  # the same request, passed on by a launcher
    assert requests.received == number
    assert capfd.readouterr().err == "\nsaving first\n"


def test_without_a_launcher_the_second_one_stops_at_once():
    requests = Interrupts()
    with requests.listening(), requests.deferred("saving first"):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_closed_terminal_is_a_request_unless_it_is_to_be_outlived():
    requests = Interrupts()
    with requests.listening(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with requests.listening():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert requests.received is None


def test_ctrl_c_is_listened_to_also_where_whoever_started_us_ignores_it():
    """As a script does with what it starts by `&`: `kill -INT` has to save and end it all the same."""
    requests = Interrupts()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with requests.listening(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_the_tests_of_signals_pass_where_whoever_started_them_ignores_these():
    """As `nohup` and a script's `&` do. None may wait for ever for what never comes."""
    files = [
        f"tests/{name}.py" for name in ("training/test_interrupts", "data/test_passes", "tools/test_run")
    ]
    which = ["-m", "not slow", "-k", "test_interrupts or ctrl_c or passed_on"]
    command = shlex.join([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *which, *files])
    result = subprocess.run(
        ["sh", "-c", f"trap '' INT HUP; exec {command}"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


def test_one_that_comes_later_stops_at_once(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(interrupts, "SECONDS_OF_ONE_REQUEST", 0.05)
    requests = Interrupts()
    with requests.listening(), requests.deferred("saving first"):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_whose_exception_got_lost_is_raised_before_anything_long_begins():
    """As Python loses what is raised in a destructor."""

    class Lost:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    requests = Interrupts()
    with requests.listening():
        thing = Lost()
        del thing
        with pytest.raises(KeyboardInterrupt), requests.deferred("saving first"):
            pytest.fail("it was begun")


def test_what_listened_before_listens_again_and_another_thread_is_left_alone():
    before = [signal.getsignal(number) for number in SIGNALS]
    requests, found = Interrupts(), []

    def elsewhere() -> None:
        with requests.listening():
            found.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    with requests.listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        with requests.listening():  # `train` within the command line
            pass
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before == found


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_data_loaders_worker_outlives_ctrl_c_and_can_be_ended(number, status):
    """The terminal sends Ctrl-C to it too, and the step that is being finished needs its batches."""
    requests = Interrupts()
    with requests.listening():
        child = os.fork()
        if child == 0:
            signal.raise_signal(number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert requests.received is None
