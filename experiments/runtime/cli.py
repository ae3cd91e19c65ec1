"""What every command shares: one-line errors with exit code 2, Ctrl-C, and how one of several processes ends."""

import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import INTERRUPTED, Interrupted, ctrl_c_ends
from crescendo.parallel import hosts


def run_command(main: Callable[[], object]) -> None:
    """Calls `main()`; a `UserError` becomes one line on standard error and exit code 2, Ctrl-C one and 130.

    A command that stopped where it can go on ends with 128 and the signal's number; a second Ctrl-C ends it at once,
    and so does the first one where there is nothing to stop (`ctrl_c_ends`). One of several processes that fails
    doesn't wait for the others.
    """
    with ctrl_c_ends():
        try:
            _run_command(main)
        except BaseException as error:
            hosts.abandon(error)
            code = error.code if isinstance(error, SystemExit) else 1
            if code in (1, 2):
                _end_in_bounded_time(code)
            raise


def _end_in_bounded_time(code: int) -> None:
    """Ends the process soon after the main thread is through, whatever other threads do.

    One that compiles what nobody needs any more, or that waits for parts of a save that failed, may take minutes.
    """
    through = threading.Event()
    # Python joins the threads of pools before it calls the main thread ended, and runs `atexit`'s functions after both.
    threading._register_atexit(through.set)  # type: ignore[attr-defined]

    def wait() -> None:
        through.wait()
        time.sleep(5)
        os._exit(code)

    threading.Thread(target=wait, daemon=True).start()


def _run_command(main: Callable[[], object]) -> None:
    if not (sys.stdout.isatty() or sys.stderr.isatty()):
        # A notebook's kernel sets FORCE_COLOR, which makes rich redraw lines in what is no terminal.
        os.environ.setdefault("TTY_COMPATIBLE", "0")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the locale lacks stops no run
    try:
        main()
        hosts.leave()
        sys.stdout.flush()
    except UserError as error:
        hosts.end_alone()
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)  # gin adds where in a config a call stood
        sys.exit(2)
    except Interrupted as stopped:
        hosts.leave()
        print(stopped)
        sys.stdout.flush()
        if stopped.exit_code:
            sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away; a second complaint at interpreter exit is prevented by closing its end here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


@contextmanager
def hosts_lost() -> Iterator[None]:
    """Around a run of several processes: the error of whatever waited for one that has ended is nobody's mistake here.

    A save that another process left half done looks like a full disk, say. What has ended is known within a moment, and
    this process ends too (`parallel.hosts`); what is there and late isn't waited for by the runtime either.

    >>> with hosts_lost(): raise jax.errors.JaxRuntimeError("connection reset")
    Traceback (most recent call last):
    ...
    jax.errors.JaxRuntimeError: connection reset
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError | Interrupted) or error.__cause__ is not None:
            hosts.await_loss()
        if (
            jax.process_count() == 1
            or not isinstance(error, jax.errors.JaxRuntimeError)
            or not re.search("gloo|nccl|unavailable|deadline|connection", str(error), re.I)
        ):
            raise
        says = str(error).strip().splitlines()[0][:120]
        raise UserError(
            f"another process of this run doesn't answer ({says}): see its own output; the same command on every host "
            "goes on from the last checkpoint"
        ) from None
