"""Several processes as one program: how they find each other, in bounded time."""

import dataclasses
import os
import sys
import threading

import jax


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
        if not 0 <= index < count:
            raise ValueError(f"hosts {text!r}: the index {index} must be below the count {count}, counted from 0")
        return cls(coordinator, index, count)


def join(hosts: str, *, timeout_seconds: float = 300.0, heartbeat_seconds: int = 100) -> None:
    """Makes this process one of several; call it before anything asks JAX for its devices.

    A process that waits longer than the timeout for the others says so in one line and exits with code 2. Later, when
    one process dies, the others notice within about the heartbeat and end too.

    Args:
      hosts: "auto", where JAX can tell by itself (SLURM, Open MPI, Cloud TPU, Kubernetes), or
        `HOST:PORT,INDEX,COUNT`.
      timeout_seconds: how long to wait for the others.
      heartbeat_seconds: how long a process may be silent.

    Raises:
      ValueError: for other `hosts`, or "auto" where JAX finds nothing.
    """
    process = None if hosts == "auto" else Process.parse(hosts)

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
        jax.distributed.initialize(
            coordinator_address=None if process is None else process.coordinator,
            num_processes=None if process is None else process.count,
            process_id=None if process is None else process.index,
            initialization_timeout=int(timeout_seconds) + 60,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"hosts {hosts!r}: {str(error).splitlines()[0]}") from None
    finally:
        timer.cancel()


def is_leader() -> bool:
    """Whether this process is the one that writes what is written once.

    >>> is_leader()
    True
    """
    return jax.process_index() == 0
