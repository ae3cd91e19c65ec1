"""Several processes as one program: how they find each other, and how they end, in bounded time."""

import atexit
import dataclasses
import os
import sys
import threading
import time

import jax

from crescendo.parallel.watch import Watch

MOST_SECONDS = 7 * 24 * 3600
"""That a process can be asked to wait for the others."""

_watch: Watch | None = None


@dataclasses.dataclass(frozen=True)
class Process:
    """One process among several.

    Attributes:
      coordinator: `HOST:PORT` of process 0.
      index: this process's number.
      count: how many there are.
    """

    coordinator: str
    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Process":
        """From `HOST:PORT,INDEX,COUNT`.

        Raises:
          ValueError: for anything else.

        >>> Process.parse("10.0.0.1:8476,3,4")
        Process(coordinator='10.0.0.1:8476', index=3, count=4)
        """
        coordinator, *numbers = text.split(",")
        port = coordinator.rpartition(":")[2]
        if len(numbers) != 2 or not all(n.strip().isdigit() for n in (*numbers, port)) or ":" not in coordinator:
            raise ValueError(f"hosts {text!r} must be 'auto' or HOST:PORT,INDEX,COUNT, such as 10.0.0.1:8476,0,4")
        index, count = map(int, numbers)
        if not 0 < int(port) < 2**16:
            raise ValueError(f"hosts {text!r}: the port {port} must be from 1 to 65535")
        if not 0 <= index < count:
            raise ValueError(f"hosts {text!r}: the index {index} must be below the count {count}, counted from 0")
        return cls(coordinator, index, count)


def join(hosts: str, *, timeout_seconds: float = 300.0, heartbeat_seconds: int = 100) -> None:
    """Makes this process one of several; call it before anything asks JAX for its devices.

    A process that waits longer than the timeout for the others says so in one line and exits with code 2. Later, when
    one process ends before its work does (`leave`), the others do too, each with one line and code 2: at once where the
    process was killed, within 30 s where its host is gone, within the heartbeat where it is there and silent.

    Args:
      hosts: "auto", where JAX can tell by itself (SLURM, Open MPI, Cloud TPU, Kubernetes), or
        `HOST:PORT,INDEX,COUNT`.
      timeout_seconds: how long to wait for the others.
      heartbeat_seconds: how long a process may be silent.

    Raises:
      ValueError: for other `hosts`, "auto" where JAX finds nothing, or a timeout that isn't above 0 and within a week.
    """
    if not 0 < timeout_seconds <= MOST_SECONDS:
        raise ValueError(f"joining within {timeout_seconds:g} s: that must be above 0 and at most {MOST_SECONDS:,}")
    process = _found(timeout_seconds) if hosts == "auto" else Process.parse(hosts)

    def give_up() -> None:
        who = "the cluster's coordinator" if process is None else f"process 0 at {process.coordinator}"
        all_of = "all processes" if process is None else f"all {process.count} processes"
        print(
            f"error: {all_of} did not join {who} within {timeout_seconds:g} s: check that each was started, with the "
            "same address and its own index, and can reach it; or wait longer with --join-seconds",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # the main thread waits inside of the runtime, which would abort the process with a stack

    timer = threading.Timer(timeout_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        service = None if process is None else _begin_watch(process, heartbeat_seconds)
        jax.distributed.initialize(
            coordinator_address=service,
            coordinator_bind_address=service,
            num_processes=None if process is None else process.count,
            process_id=None if process is None else process.index,
            initialization_timeout=int(timeout_seconds) + 60,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"hosts {hosts!r}: {str(error).splitlines()[0]}") from None
    finally:
        timer.cancel()


def _found(timeout_seconds: float) -> Process | None:
    """What JAX finds by itself; None where it isn't asked so any more, or finds nothing, which it then says itself.

    JAX has no public name for that. Without it processes join as ever, and the runtime ends them in its own way.
    """
    try:
        from jax._src.clusters import ClusterEnv

        given = os.environ.get("JAX_COORDINATOR_ADDRESS")
        found = ClusterEnv.auto_detect_unset_distributed_params(given, None, None, None, None, int(timeout_seconds))
        coordinator, count, index = found[:3]
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return None if coordinator is None or count is None or index is None else Process(coordinator, index, count)


def _begin_watch(process: Process, heartbeat_seconds: int) -> str:
    """Watches the other processes, and gives the address at which the runtime finds its service."""
    global _watch
    host, _, port = process.coordinator.rpartition(":")
    # Before the runtime takes a process that says nothing for dead.
    _watch = Watch(host.strip("[]"), int(port), process.index, process.count, silence_seconds=0.9 * heartbeat_seconds)
    atexit.register(leave)
    return _watch.begin()


def leave() -> None:
    """This process' work is done: the others make nothing of its end.

    >>> leave()  # which one process alone needn't
    """
    if _watch is not None and not _watch.left and not _watch.alone and not hasattr(sys, "last_exc"):
        _watch.leave()


def await_loss(seconds: float = 2.0) -> None:
    """What went wrong may be that another process has ended: then this one ends here, with the line that says so.

    >>> await_loss()  # at once, of one process alone
    """
    if _watch is not None and not _watch.left:
        time.sleep(seconds)  # the watching thread ends the process meanwhile


def end_alone() -> None:
    """From here on this process speaks of an error of its own, and no more of the others' ends.

    >>> end_alone()  # which one process alone is anyway
    """
    if _watch is not None:
        _watch.end_alone()


def abandon(error: BaseException) -> None:
    """Ends this process by an error of its own, at once, if it is one of several whose work isn't done.

    An orderly exit would wait for the others, and they for this one.

    Args:
      error: that of `sys.exit`, whose code the process ends with; any other is printed, and the code is 1.
    """
    if _watch is None or _watch.left:
        return
    end_alone()
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def is_leader() -> bool:
    """Whether this process is the one that writes what is written once.

    >>> is_leader()
    True
    """
    return jax.process_index() == 0
