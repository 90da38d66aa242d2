"""The errors that users see, one message each, printed without a traceback; and the signals that end a run.

The command line turns them into exit codes (`rm_recipe/cli.py`): 2 where the user's input is
wrong, 1 where the run itself failed.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def one_line(error: BaseException) -> str:
    """A library's message, shortened to what fits into one of ours: its first sentence."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:300]


class RmRecipeError(Exception):
    """Base of every error whose text is meant for the user; `exit_code` is the process's."""

    exit_code = 1


class RecipeError(RmRecipeError):
    """The recipe, an argument or a path is wrong."""

    exit_code = 2


class DataError(RmRecipeError):
    """A data set or an input file is not what it should be."""

    exit_code = 2


class UnfitError(DataError):
    """A conversation that the model cannot read: too long, or refused by its template."""


class TrainingError(RmRecipeError):
    """Training started and could not go on."""


class Interrupted(RmRecipeError):  # noqa: N818 - asked for by the user
    """SIGINT (Ctrl-C) or SIGTERM, with what is kept and how to go on."""

    def __init__(self, message: str, number: int | None = None, *, resumable: bool = False) -> None:
        """`resumable`: whether `--resume` goes on, or the same command again."""
        super().__init__(message)
        self.resumable = resumable
        self.number = number or signal.SIGINT
        self.exit_code = 128 + self.number  # as a shell counts: 130, 143


class ExportError(RmRecipeError):
    """A merged model could not be written, or is not equal to what was evaluated."""


class PushError(RmRecipeError):
    """A model could not be uploaded, or what arrived is not what was sent."""


# --- Ctrl-C, SIGTERM and SIGHUP: at once, or where there is something to save, when it is saved ----------

# A terminal that is closed sends SIGHUP, where there is such a signal.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
LAUNCHED = ("RANK", "ACCELERATE_MIXED_PRECISION")  # in the environment by a launcher
UNDER_RUN = "RM_RECIPE_RUN"  # in that of a training of `rm-recipe run`, which passes on each signal once


class Interrupts:
    """What SIGINT, SIGTERM and SIGHUP do in this process while somebody listens.

    They raise KeyboardInterrupt, or, within `deferred`, are noted in `received` for the block to answer.
    A second one, of a user who does not want to wait, raises at once; not under a launcher, which passes on
    what the terminal has sent to all: there one request comes as two signals.

    Attributes:
        received: the signal that was first, None if there was none. Python prints and forgets an exception
            that a signal raises in a destructor or a library's callback; this is not forgotten.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._process = 0  # that listens

    @contextmanager
    def listening(self) -> Iterator["Interrupts"]:
        """Within the outermost one, signals come here; in another thread than the main one, none do."""
        if self._process or threading.current_thread() is not threading.main_thread():
            yield self
            return
        nohup = {number for number in SIGNALS[2:] if signal.getsignal(number) == signal.SIG_IGN}
        before = {number: signal.signal(number, self._handle) for number in SIGNALS if number not in nohup}
        self._process, self.received = os.getpid(), None
        try:
            yield self
        finally:
            self._process = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it, a request is noted, and standard error says what comes before it is answered.

        Raises:
            KeyboardInterrupt: there was one before that got lost.
        """
        if self.received is not None:
            raise KeyboardInterrupt
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:  # of a process that has inherited this
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        first, self.received = self.received is None, self.received or number
        launched = any(name in os.environ for name in LAUNCHED) and UNDER_RUN not in os.environ
        if not self._deferred or not (first or launched):
            raise KeyboardInterrupt
        # Not by `print`: the signal may have come amid one.
        if first and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # the terminal may be gone
                again = "" if launched else "; Ctrl-C again stops at once"
                text = f"\nrm-recipe: finishing this step and saving it{again}\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())


INTERRUPTS = Interrupts()
