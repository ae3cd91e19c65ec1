"""SIGTERM and Ctrl-C as a request that the loop looks at between steps."""

import signal
from types import FrameType


class Interrupted(Exception):  # noqa: N818 (a request carried out, not an error)
    """The run was asked to stop, and has saved; commands print it and exit with code 0."""


class Interruption:
    """While entered, the first SIGTERM or SIGINT sets `requested`; a second Ctrl-C interrupts at once.

    >>> with Interruption() as interruption:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     interruption.requested
    'SIGTERM'
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, object] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
