"""While a command imports what it needs, which takes seconds, Ctrl-C is as it is outside of Python."""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


def ctrl_c_ends_commands() -> None:
    """From here on Ctrl-C ends a command without a word: an import that it interrupts says a page, or forgets it.

    For the first line of what commands import: `run_command`, which listens, comes after their imports, and from its
    end on it is so again. Nothing changes where Python runs something else, or where Ctrl-C has another handler or
    none, as behind `nohup`.
    """
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


_collection = threading.Lock()
_without_collection: list[bool] = []  # for each thread that is inside; the first says whether collection was on


@contextmanager
def no_collection() -> Iterator[None]:
    """Leaves garbage lie: to look for it takes seconds of a start, in which much is made and little is garbage.

    In several threads at once until the last one is through; it is then as the first one found it.
    """
    with _collection:
        _without_collection.append(gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _collection:
            was_on = _without_collection.pop(0)
            if _without_collection:
                _without_collection[0] = was_on
            elif was_on:
                gc.enable()


def command_seconds() -> float:
    """How long ago the command was given that this process runs; 0 where it runs none, or the system doesn't say."""
    if not _is_command():
        return 0.0
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def _is_command() -> bool:
    """Whether Python was started for one: `crescendo ...`, or `python -m crescendo...`."""
    typed = " ".join(sys.orig_argv)
    named = bool(sys.argv) and os.path.basename(sys.argv[0]) == "crescendo"
    return named or "-m crescendo." in typed or "-mcrescendo." in typed
