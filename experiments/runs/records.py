"""What a run records, who records it, and how it is read back.

The loop hands each record, a flat dict with at least `kind` and `examples_seen`, to a list of observers. An observer
writes or shows it and never changes the trajectory. A new one is a class with `__call__(record)` and `close()`, and an
entry in `WRITERS` if runs are to ask for it by name (`train.writers`).

Kinds of record: `train` (one a step), `validation`, `probe` (what a probe saw), `batch_size` (a change: `from`, `to`,
`reason`) and `warning` (`message`). Losses are in nats a token, or whatever the task's unit is; `examples_seen`,
`tokens_seen` (`images_seen`, ...) and `step` are counted after the step.
"""

import importlib
import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.progress import ProgressLine
from crescendo.parallel.hosts import is_leader

Record = Mapping[str, Any]
Columns = dict[str, np.ndarray]

TRAIN_COLUMNS = (
    *("step", "examples_seen", "units_seen", "loss", "learning_rate", "batch_size", "microbatches"),
    *("gradient_norm", "skipped_steps", "seconds", "units_per_second", "mfu"),
)
VALIDATION_COLUMNS = ("step", "examples_seen", "units_seen", "loss", "seconds")


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


# Writers that a run may ask for besides, by name: `module:class`, called with the folder and the run's name.
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


def _writer(name: str) -> Callable[[Path, str], Observer]:
    if name not in WRITERS:
        raise UserError(f"train.writers: no writer {name!r}; there are {', '.join(WRITERS)}")
    module, _, kind = WRITERS[name].partition(":")
    return getattr(importlib.import_module(module), kind)


class JsonlWriter:
    """Appends each record to a file as one line of JSON; floats read back bit-identically.

    Opening drops the records past `resume_at_examples` and a torn last line, so that a killed and resumed run holds
    each record once. For that the loop hands over all records up to N before it starts the checkpoint of N. Resuming
    at 0 is a fresh start: nothing is kept. A record is one unbuffered write: a SIGKILL loses none that was handed over.

    Raises:
      UserError: if the disk is full or read-only, or a line before the last is damaged.
    """

    def __init__(self, path: Path, resume_at_examples: int):
        kept = [r for r in read_records(path) if resume_at_examples > 0 and r["examples_seen"] <= resume_at_examples]
        content = b"".join(map(_line, kept))
        with file_access("write", path):
            if not path.exists() or path.read_bytes() != content:
                replace_file(path, content)
        self._append = _Appender(path)

    def __call__(self, record: Record) -> None:
        self._append(_line(record))

    def close(self) -> None:
        self._append.close()


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
        self._append = _Appender(folder / f"events.out.tfevents.{time.time_ns()}")
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


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
      folder: where it is.
      info: `run.json`.
      config: the operative gin config; empty if it isn't written yet.
      train: one array per number of the training records, at least those of `TRAIN_COLUMNS`; NaN where it is null.
        `units_seen` and `units_per_second` are what the records call by the run's own unit (`tokens_seen`, ...).
      validation: the same for the validation records, at least `VALIDATION_COLUMNS`.
      events: the other records (`batch_size`, `warning`), in order.
    """

    folder: Path
    info: dict[str, Any]
    config: str
    train: Columns
    validation: Columns
    events: list[dict[str, Any]]

    @property
    def unit(self) -> str:
        """What is counted beside examples: "token", "image"."""
        return str(self.info.get("unit", "token"))

    @property
    def name(self) -> str:
        return " ".join(str(self.info["name"]).split())


def read_run(folder: Path) -> Run:
    """Reads a run folder, also one whose run is still going on or was killed.

    Raises:
      UserError: if the folder is not a run's, or `run.json` or `metrics.jsonl` is damaged.
    """
    path, config = folder / "run.json", folder / "config.gin"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no run.json; name a folder that a training run wrote")
    try:
        with file_access("read", folder):
            info = json.loads(path.read_bytes())
            config_text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or leave this run out") from None
    if missing := {"name", "total_examples"} - set(info if isinstance(info, dict) else ()):
        raise UserError(f"{path} has no {' and no '.join(sorted(missing))}; restore it or leave this run out")
    records = read_records(path.with_name("metrics.jsonl"))
    unit = f"{info.get('unit', 'token')}s_"
    return Run(
        folder=folder,
        info=info,
        config=config_text,
        train=_columns([_with_units(r, unit) for r in records if r["kind"] == "train"], TRAIN_COLUMNS),
        validation=_columns([_with_units(r, unit) for r in records if r["kind"] == "validation"], VALIDATION_COLUMNS),
        events=[r for r in records if r["kind"] not in ("train", "validation")],
    )


def _with_units(record: Record, unit: str) -> dict[str, Any]:
    """The record with what its names call by the run's unit also under `units_`."""
    return {**record, **{f"units_{name.removeprefix(unit)}": x for name, x in record.items() if name.startswith(unit)}}


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a run that has reached its end and was evaluated there."""
    if not (folder / "run.json").is_file():
        return False
    run = read_run(folder)
    return bool(len(run.validation["loss"])) and run.validation["examples_seen"][-1] >= run.info["total_examples"]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without a torn end; none if there is no such file.

    Raises:
      UserError: if a damaged line comes before a sound one.
    """
    records: list[dict[str, Any]] = []
    damaged = None
    with file_access("read", path):
        lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"kind", "examples_seen"} <= record.keys():
            damaged = damaged or number
        elif damaged:
            raise UserError(f"{path} is damaged at line {damaged}: remove that line to go on without its record")
        else:
            records.append(record)
    return records


@contextmanager
def file_access(action: str, path: Path) -> Iterator[None]:
    """Turns a full or read-only disk, or a file that isn't ours, into a `UserError` that names the path.

    >>> with file_access("read", Path("nowhere")): open("nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: cannot read nowhere: No such file or directory; mend ...
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot {action} {path}: {reason}; mend that or choose another path") from error


class _Appender:
    """Appends bytes to a file, unbuffered."""

    def __init__(self, path: Path):
        self._path = path
        with file_access("write", path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)

    def __call__(self, data: bytes) -> None:
        with file_access("write", self._path):
            while data:  # where the disk fills up, the first write is cut short and the next one raises
                data = data[self._file.write(data) :]

    def close(self) -> None:
        self._file.close()


def _line(record: Record) -> bytes:
    """One line of JSON; a float is written with the digits that identify it, numpy's scalars as Python's."""
    return json.dumps(record, default=lambda scalar: scalar.item()).encode() + b"\n"


def _checksum(data: bytes) -> bytes:
    """The masked CRC-32C of the TFRecord format."""
    return struct.pack("<I", masked_crc32c(data))


def replace_file(path: Path, content: bytes) -> None:
    """Writes the whole file, or leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _columns(records: list[dict[str, Any]], names: tuple[str, ...]) -> Columns:
    """The records' numbers by name, each an array with one value per record."""
    every = dict.fromkeys((*names, *(name for record in records for name in record)))
    columns = {name: [record.get(name) for record in records] for name in every}
    return {
        name: np.array([math.nan if value is None else value for value in values])
        for name, values in columns.items()
        if all(value is None or isinstance(value, int | float) for value in values)
    }
