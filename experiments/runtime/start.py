"""While a command imports what it needs, which takes seconds, Ctrl-C is as it is outside of Python."""

import os
import signal
import sys


def ctrl_c_ends_commands() -> None:
    """From here on Ctrl-C ends a command without a word: an import that it interrupts says a page, or forgets it.

    For the first line of what commands import: `run_command`, which listens, comes after their imports, and from its
    end on it is so again. Nothing changes where Python runs something else, or where Ctrl-C has another handler or
    none, as behind `nohup`.
    """
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_command() -> bool:
    """Whether Python was started for one: `crescendo ...`, or `python -m crescendo...`."""
    typed = " ".join(sys.orig_argv)
    named = bool(sys.argv) and os.path.basename(sys.argv[0]) == "crescendo"
    return named or "-m crescendo." in typed or "-mcrescendo." in typed
