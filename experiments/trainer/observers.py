"""Who sees the records of a run.

The loop hands each record to a list of observers. An observer writes or shows it and never changes the trajectory. A
new one is a class with `__call__(record)` and `close()`, and an entry in `WRITERS` if runs are to ask for it by name
(`train.writers`)."""

import importlib
import math
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from crescendo.experiments.runs.records import JsonlWriter, Record
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import Appender
from crescendo.experiments.runtime.imports import without
from crescendo.experiments.trainer.progress import ProgressLine
from crescendo.parallel.hosts import is_leader

with without("torch"):  # which takes four seconds, for what isn't asked of it here
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c


class Observer(Protocol):
    """Sees every record of a run, in order; changes nothing."""

    def __call__(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Observers:
    """Several observers as one: each sees every record, and all are closed even where one fails.

    >>> seen = []
    >>> class Collect:
    ...     def __call__(self, record): seen.append(record["step"])
    ...     def close(self): seen.append("closed")
    >>> both = Observers([Collect(), Collect()])
    >>> both({"kind": "train", "step": 1, "examples_seen": 8}); both.close(); seen
    [1, 1, 'closed', 'closed']
    """

    def __init__(self, observers: Iterable[Observer]):
        self._observers = tuple(observers)

    def __call__(self, record: Record) -> None:
        for observer in self._observers:
            observer(record)

    def close(self) -> None:
        with ExitStack() as stack:
            for observer in reversed(self._observers):
                stack.callback(observer.close)


# Writers that a run may ask for besides, by name: `module:class`, called with the folder and the run's name; where it
# has a static `check()`, that raises UserError if it can't work on this machine.
WRITERS = {"wandb": "crescendo.experiments.trainer.wandb_writer:WandbWriter"}


def run_observers(
    folder: Path,
    *,
    resume_at_examples: int,
    total_examples: int,
    label: str,
    unit: str = "token",
    writers: Sequence[str] = (),
) -> Observers:
    """The observers of a training run: `metrics.jsonl`, TensorBoard events, the progress line, and what is asked for.

    Of several processes of one run the first has them.

    Args:
      folder: the run folder, which exists.
      resume_at_examples: the clock of the checkpoint that the run goes on from; 0 for a fresh start.
      total_examples: where the run ends.
      label: the run's name on the progress line.
      unit: what is counted beside examples: "token", "image".
      writers: keys of `WRITERS`.

    Raises:
      UserError: if the folder can't be written, or for a writer that isn't known or whose package isn't installed.
    """
    if not is_leader():
        return Observers([])
    further = [_writer(name)(folder, label) for name in dict.fromkeys(writers)]
    return Observers(
        [
            JsonlWriter(folder / "metrics.jsonl", resume_at_examples),
            TensorBoardWriter(folder, resume_at_examples),
            *further,
            ProgressLine(total_examples, label, unit=unit),
        ]
    )


def check_writers(writers: Sequence[str]) -> None:
    """That the writers which a run asks for are there, before anything is compiled for it.

    Raises:
      UserError: one that isn't known, or whose package isn't installed.
    """
    for name in writers:
        getattr(_writer(name), "check", lambda: None)()


def _writer(name: str) -> Any:
    if name not in WRITERS:
        raise UserError(f"train.writers: no writer {name!r}; there are {', '.join(WRITERS)}")
    module, _, kind = WRITERS[name].partition(":")
    return getattr(importlib.import_module(module), kind)


class Thinned:
    """Hands training records on at most once in `interval_seconds`, and the last one in any case; others at once.

    Args:
      write: called with each record that gets through.
      interval_seconds: between two training records.
      clock: in seconds.
    """

    def __init__(
        self,
        write: Callable[[Record], None],
        interval_seconds: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._write, self._interval_seconds, self._clock = write, interval_seconds, clock
        self._written_at = -math.inf
        self._skipped: Record | None = None

    def __call__(self, record: Record) -> None:
        if record["kind"] == "train":
            now = self._clock()
            if now - self._written_at < self._interval_seconds:
                self._skipped = record
                return
            self._written_at, self._skipped = now, None
        self._write(record)

    def flush(self) -> None:
        """Hands on the last training record, if it was held back."""
        if self._skipped is not None:
            self._write(self._skipped)
            self._skipped = None


class TensorBoardWriter:
    """Writes every number of the records as TensorBoard scalars `kind/name` against `examples_seen`; no TensorFlow.

    Training records are thinned in time, to one in `interval_seconds`, and the last one always gets in: an event costs
    about 0.1 ms, too much for every step of a small model. On resuming, TensorBoard is told to forget what lies past
    `resume_at_examples` (0: everything).

    Raises:
      UserError: if the disk is full or read-only.
    """

    def __init__(
        self,
        folder: Path,
        resume_at_examples: int,
        *,
        interval_seconds: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._thinned = Thinned(self._write_scalars, interval_seconds, clock)
        # TensorBoard reads a folder's event files in the order of their names: nanoseconds, all of one length.
        self._append = Appender(folder / f"events.out.tfevents.{time.time_ns()}")
        self._write(Event(file_version="brain.Event:2"))
        forget_from = resume_at_examples + 1 if resume_at_examples > 0 else 0
        self._write(Event(step=forget_from, session_log=SessionLog(status=SessionLog.START)))

    def __call__(self, record: Record) -> None:
        self._thinned(record)

    def close(self) -> None:
        self._thinned.flush()
        self._append.close()

    def _write_scalars(self, record: Record) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float | np.number)}
        values = [
            Summary.Value(tag=f"{record['kind']}/{name}", simple_value=value)
            for name, value in numbers.items()
            if name != "examples_seen"
        ]
        self._write(Event(step=record["examples_seen"], summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        """Appends one event in the TFRecord framing: length, its checksum, data, its checksum."""
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._append(length + _checksum(length) + data + _checksum(data))


def _checksum(data: bytes) -> bytes:
    """The masked CRC-32C of the TFRecord format."""
    return struct.pack("<I", masked_crc32c(data))
