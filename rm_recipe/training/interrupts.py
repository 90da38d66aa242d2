"""Ctrl-C, SIGTERM and SIGHUP: at once, or where there is something to save, when it is saved."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

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
        self._deferred: str | None = None
        self._process = 0
        self._listening = False

    @contextmanager
    def listening(self) -> Iterator["Interrupts"]:
        """Within the outermost one, signals come here; in another thread than the main one, none do."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            yield self
            return
        nohup = {number for number in SIGNALS[2:] if signal.getsignal(number) == signal.SIG_IGN}
        before = {number: signal.signal(number, self._handle) for number in SIGNALS if number not in nohup}
        self._listening, self._process, self.received = True, os.getpid(), None
        try:
            yield self
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self, promise: str) -> Iterator[None]:
        """Within it, a request is noted and answered with `promise` on standard error.

        Raises:
            KeyboardInterrupt: there was one before that got lost.
        """
        if self.received is not None:
            raise KeyboardInterrupt
        self._deferred = promise
        try:
            yield
        finally:
            self._deferred = None

    def _handle(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:  # a data loader's worker, which has inherited this
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        first, self.received = self.received is None, self.received or number
        launched = any(name in os.environ for name in LAUNCHED) and UNDER_RUN not in os.environ
        if self._deferred is None or not (first or launched):
            raise KeyboardInterrupt
        # Not by `print`: the signal may have come amid one.
        if first and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # the terminal may be gone
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{self._deferred}\n".encode())


INTERRUPTS = Interrupts()
