"""A signal is answered at once, or when there is something saved; and it is never forgotten."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from rm_recipe.errors import SIGNALS, Interrupts

PROMISE = "rm-recipe: finishing this step and saving it"
pytestmark = pytest.mark.usefixtures("as_in_a_terminal")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_at_once_or_is_noted_where_something_is_to_be_saved(capfd, number):
    requests = Interrupts()
    with requests.listening(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert requests.received == number
    with requests.listening(), requests.deferred():
        signal.raise_signal(number)
        assert capfd.readouterr().err == f"\n{PROMISE}; Ctrl-C again stops at once\n"
        with pytest.raises(KeyboardInterrupt):  # who sends a second one does not want to wait
            signal.raise_signal(signal.SIGINT)
    assert requests.received == number


def test_under_a_launcher_that_passes_a_signal_on_two_are_one_request(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    requests = Interrupts()
    with requests.listening(), requests.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert requests.received == signal.SIGTERM
    assert capfd.readouterr().err == f"\n{PROMISE}\n"


@pytest.mark.parametrize(("number", "heard"), [(signal.SIGINT, signal.SIGINT), (signal.SIGHUP, None)])
def test_what_whoever_started_us_ignores_is_listened_to_but_for_a_terminal_to_be_outlived(number, heard):
    """A script ignores Ctrl-C for what it starts by `&`, nohup a closed terminal."""
    signal.signal(number, signal.SIG_IGN)
    requests = Interrupts()
    with suppress(KeyboardInterrupt), requests.listening():
        signal.raise_signal(number)
    assert signal.getsignal(number) == signal.SIG_IGN
    assert requests.received == heard


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
        with pytest.raises(KeyboardInterrupt), requests.deferred():
            pytest.fail("it was begun")


def test_what_listened_before_listens_again_and_another_thread_is_left_alone():
    requests = Interrupts()

    def while_it_listens() -> list:
        with requests.listening():
            with requests.listening():  # `train` within the command line
                pass
            return [signal.getsignal(number) for number in SIGNALS]

    before = [signal.getsignal(number) for number in SIGNALS]
    with ThreadPoolExecutor() as pool:
        assert pool.submit(while_it_listens).result() == before
    assert while_it_listens() != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


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
