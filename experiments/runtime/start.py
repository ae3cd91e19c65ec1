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
    program = sys.argv[0] if sys.argv else ""
    if program == "-m" or os.path.basename(program) == "crescendo":  # `-m`: while its module is looked for
        return True
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
    return bool(module) and module[0].startswith("crescendo.")
