"""SIGTERM, Ctrl-C and a deadline as a request that the loop looks at between steps.

Of several processes any may get the SIGTERM: JAX's own service picks a step for all of them to stop at.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from crescendo.experiments.runtime.errors import UserError


class Interrupted(Exception):  # noqa: N818 (a request carried out, not an error)
    """The run was asked to stop, and has saved; commands print it and exit with code 0."""


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
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
            raise Interrupted("the time is up; the same command goes on")
        Interruption.entered[-1].requested = "the time is up"

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
