"""While a command imports what it needs, which takes seconds, Ctrl-C is as it is outside of Python."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def ctrl_c_ends() -> Iterator[None]:
    """Within it Ctrl-C ends the process without a word: an import that it interrupts says a page, or forgets it.

    Where another handler is set, or none listens as behind `nohup`, that stays.

    >>> with ctrl_c_ends(): signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    True
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
