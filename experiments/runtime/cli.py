"""What every command shares: one-line errors with exit code 2."""

import io
import os
import sys
from collections.abc import Callable

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import Interrupted, second_ctrl_c_ends


def run_command(main: Callable[[], object]) -> None:
    """Calls `main()`; a `UserError` becomes one line on standard error and exit code 2, Ctrl-C one and 130.

    A command that stopped where it can go on ends with 128 and the signal's number; a second Ctrl-C ends it at once.
    """
    with second_ctrl_c_ends():
        _run_command(main)


def _run_command(main: Callable[[], object]) -> None:
    if not (sys.stdout.isatty() or sys.stderr.isatty()):
        # A notebook's kernel sets FORCE_COLOR, which makes rich redraw lines in what is no terminal.
        os.environ.setdefault("TTY_COMPATIBLE", "0")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the locale lacks stops no run
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)  # gin adds where in a config a call stood
        sys.exit(2)
    except Interrupted as stopped:
        print(stopped)
        sys.stdout.flush()
        if stopped.exit_code:
            sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print("interrupted; what was saved is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away; a second complaint at interpreter exit is prevented by closing its end here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
