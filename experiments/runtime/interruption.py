"""SIGTERM, Ctrl-C and a deadline as a request that the loop looks at between steps.

Of several processes any may get the SIGTERM: JAX's own service picks a step for all of them to stop at.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from crescendo.experiments.runtime.errors import UserError

TIME_IS_UP = "the time is up"
INTERRUPTED = "interrupted; what was saved is kept, and the same command goes on from there"

_second_handler: Any = signal.default_int_handler  # of a Ctrl-C after a signal that an `Interruption` has heard


class Interrupted(Exception):  # noqa: N818 (a request carried out, not an error)
    """The run was asked to stop, and has saved; commands print it and exit with `exit_code`.

    Args:
      message: what was stopped, and how to go on.
      reason: the signal's name, or whatever else asked.

    >>> Interrupted("saved", "SIGTERM").exit_code, Interrupted("saved", "the time is up").exit_code
    (143, 0)
    """

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = reason

    @property
    def exit_code(self) -> int:
        """That of a process which a signal ended, so that no shell takes a part for the whole; 0 without a signal."""
        number = signal.Signals.__members__.get(self.reason or "")
        return 0 if number is None else 128 + number


class Interruption:
    """While entered, the first SIGTERM or SIGINT sets `requested` and says so; a second Ctrl-C interrupts at once.

    >>> with Interruption() as interruption:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     interruption.requested
    'SIGTERM'
    """

    entered: "list[Interruption]" = []  # noqa: RUF012 (one for the process, as its signals are)

    def __init__(self) -> None:
        self._reason: str | None = None
        self._looks = 0
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> str | None:
        """Why to stop, or None. Several processes look equally often, and get the same answer at the same look."""
        if self._reason is None and jax.process_count() > 1:
            self._looks += 1
            if multihost_utils.reached_preemption_sync_point(self._looks):
                self._reason = "SIGTERM"
        return self._reason

    @requested.setter
    def requested(self, reason: str) -> None:
        self._reason = reason

    def _request(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGINT, _second_handler)
        # Not by `print`, which a signal may find in the middle of another one.
        os.write(2, f"\n{self.requested}: stopping where the run can go on; Ctrl-C stops at once\n".encode())

    def __enter__(self) -> "Interruption":
        # With several processes the signals are left to JAX's service.
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            self._before[number] = signal.signal(number, self._request)
        self.entered.append(self)
        return self

    def __exit__(self, *exception) -> None:
        self.entered.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _first(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing, so that the signal is heard by the thread of `ctrl_c_ends` alone."""
    del number, frame


def _second(number: int, frame: FrameType | None) -> None:
    """The same, after an `Interruption` has heard a signal."""
    del number, frame


@contextlib.contextmanager
def ctrl_c_ends() -> Iterator[None]:
    """Within it a Ctrl-C where no `Interruption` listens, or after another one or SIGTERM, ends the process with 130.

    At once, whatever the main thread waits for, and by a thread: as an exception in the main thread it would come up
    anywhere, in an import or a destructor that lose it, or in a thread pool that is still needed. Where Ctrl-C is
    handled otherwise, or none listens as behind `nohup`, the first one is left to that.
    """
    global _second_handler
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    asked = threading.Event()

    def watch() -> None:
        while number := os.read(reader, 1):
            listens = signal.getsignal(signal.SIGINT) is not _first
            if number[0] == signal.SIGINT and (asked.is_set() or not listens):
                if os.isatty(1):
                    os.write(1, b"\x1b[?25h\n")  # the cursor, which the progress line hides
                if not asked.is_set():
                    os.write(2, f"{INTERRUPTED}\n".encode())
                os._exit(128 + signal.SIGINT)
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                asked.set()
        os.close(reader)

    before = signal.getsignal(signal.SIGINT)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    if before in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(signal.SIGINT, _first)
        _second_handler = _second
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _second_handler = signal.default_int_handler
        # A process that was asked to end is watched to its end: it may wait for threads yet.
        if not asked.is_set():
            signal.set_wakeup_fd(wakeup)
            os.close(writer)


def deadline(minutes: float | None) -> float:
    """When a command that may take so many minutes from now on is to stop, as `time.monotonic()` counts; None: never.

    Raises:
      UserError: for minutes that aren't above 0 and finite.

    >>> deadline(None)
    inf
    """
    if minutes is None:
        return math.inf
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes {minutes} must be above 0 and finite")
    return time.monotonic() + 60 * minutes


@contextlib.contextmanager
def interrupted_at(deadline: float) -> Iterator[None]:
    """Within it, the loop that runs is asked to stop when `time.monotonic()` reaches the deadline (in seconds).

    Where no loop runs, `Interrupted` is raised. An infinite deadline never comes.

    >>> with interrupted_at(time.monotonic()), Interruption() as interruption:
    ...     while not interruption.requested: pass
    >>> interruption.requested
    'the time is up'
    """

    def ring(number: int, frame: FrameType | None) -> None:
        del number, frame
        if not Interruption.entered:
            raise Interrupted(f"{TIME_IS_UP}; the same command goes on", TIME_IS_UP)
        Interruption.entered[-1].requested = TIME_IS_UP

    if math.isinf(deadline):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
