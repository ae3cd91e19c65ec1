"""What a run records, as lines of `metrics.jsonl`.

A record is a flat dict with at least `kind` and `examples_seen`. Kinds: `train` (one a step), `validation`, `probe`
(what a probe saw), `sample` (what the model adds to a text: `prompt`, `text`), `time` (where the run's seconds went so
far), `batch_size` (a change: `from`, `to`, `reason`), `setting` (one that a run which went on was given otherwise:
`name`, `from`, `to`, as gin's text), `warning` (`message`; of a skipped step `first_example` and `last_example` too)
and `rollback` (parameters and optimizer are those of checkpoint `to` again, the steps from `first_example` to
`last_example` are without effect). Losses are in nats a token, or whatever the task's unit is; `examples_seen`,
`tokens_seen` (`images_seen`, ...) and `step` are counted after the step. Null stands for what isn't known, and for a
number that isn't finite, which JSON doesn't have. Of a mixture training records have `epochs_SOURCE`, how often each
source has been read, and validation records `SOURCE/loss`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import Appender, file_access, read_file, replace_file, to_json

Record = Mapping[str, Any]
Columns = dict[str, np.ndarray]

TRAIN_COLUMNS = (
    *("step", "examples_seen", "units_seen", "loss", "learning_rate", "batch_size", "microbatches"),
    *("gradient_norm", "skipped_steps", "seconds", "units_per_second", "mfu"),
)
VALIDATION_COLUMNS = ("step", "examples_seen", "units_seen", "loss", "seconds")


class Gap(NamedTuple):
    """Examples on the clock whose training records aren't there once each.

    >>> print(Gap(96, 128)), print(Gap(96, 128, twice=True))
    the training records of the examples from 96 to 128 are missing
    the training records of the examples from 96 to 128 are there twice
    (None, None)
    """

    begin: int
    end: int
    twice: bool = False

    def __str__(self) -> str:
        return (
            f"the training records of the examples from {self.begin:,} to {self.end:,} are "
            f"{'there twice' if self.twice else 'missing'}"
        )


def gaps(records: Sequence[Record], *, begin: int = 0, end: int | None = None) -> list[Gap]:
    """Where a run's training records don't follow one another: each begins on the clock where the one before it ended.

    Args:
      records: of the run, in order.
      begin: where it began.
      end: what its clock says; None: wherever the records end.

    >>> steps = [{"kind": "train", "examples_seen": seen, "batch_size": 8} for seen in (8, 16, 40, 48)]
    >>> gaps(steps, end=56)
    [Gap(begin=16, end=32, twice=False), Gap(begin=48, end=56, twice=False)]
    """
    steps = [r for r in records if r["kind"] == "train" and (end is None or r["examples_seen"] <= end)]
    sizes = [size if isinstance(size := r.get("batch_size"), int) and 0 <= size < 2**63 else 0 for r in steps]
    return gaps_between(np.array([r["examples_seen"] for r in steps], np.int64), np.array(sizes, np.int64), begin, end)


def gaps_between(seen: np.ndarray, sizes: np.ndarray, begin: int, end: int | None = None) -> list[Gap]:
    """The same of steps by the clock after each and its batch, int64 `[steps]`."""
    ends = np.append(begin, seen)
    begins = np.append(seen - sizes, ends[-1] if end is None else end)
    at = np.flatnonzero(ends != begins)
    pairs = [(int(ends[i]), int(begins[i])) for i in at]
    return [Gap(min(pair), max(pair), twice=pair[1] < pair[0]) for pair in pairs]


def began_at(fixed: Any) -> int:
    """The clock at which a run began, by what fixes it, as `run.json` has it.

    >>> began_at({"seed": 0}), began_at({"seed": 0, "start_from": "runs/stable@4096"})
    (0, 4096)
    """
    start = fixed.get("start_from") if isinstance(fixed, Mapping) else None
    examples = str(start).rpartition("@")[2]
    return int(examples) if examples.isdecimal() and len(examples) < 19 else 0


class JsonlWriter:
    """Appends each record to a file as one line of JSON; finite floats read back bit-identically.

    Opening drops the records past `resume_at_examples` and a torn last line, so that a killed and resumed run holds
    each record once. For that the loop hands over all records up to N before it starts the checkpoint of N. Resuming
    at 0 is a fresh start: nothing is kept. A record is one unbuffered write: a SIGKILL loses none that was handed over.

    Raises:
      UserError: if the disk is full or read-only, or a line before the last is damaged.
    """

    def __init__(self, path: Path, resume_at_examples: int):
        earlier = [r for r in read_records(path) if resume_at_examples > 0 and r["examples_seen"] <= resume_at_examples]
        content = b"".join(map(to_json, earlier))
        with file_access("write", path):
            if not path.exists() or path.read_bytes() != content:
                replace_file(path, content)
        self._append = Appender(path)

    def __call__(self, record: Record) -> None:
        self._append(to_json(record))

    def close(self) -> None:
        self._append.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without a torn end; none if there is no such file.

    Raises:
      UserError: if a damaged line comes before a sound one.
    """
    return parse_records(read_lines(path), path)


def read_lines(path: Path) -> list[bytes]:
    """The lines of a `metrics.jsonl`; none if there is no such file."""
    with file_access("read", path):
        return read_file(path, limit_bytes=1 << 40).splitlines() if path.exists() else []


def parse_records(lines: Sequence[bytes], path: Path) -> list[dict[str, Any]]:
    """The records of a file's lines; see `read_records`."""
    records: list[dict[str, Any]] = []
    damaged = None
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is None:
            damaged = damaged or number
        elif damaged:
            raise UserError(f"{path} is damaged at line {damaged}: remove that line to go on without its record")
        else:
            records.append(read_back(record))
    return records


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    seen = record.get("examples_seen")
    return record if isinstance(seen, int) and 0 <= seen < 2**63 else None


def read_back(record: dict[str, Any]) -> dict[str, Any]:
    """Of a validation everything is a number: null is one that isn't finite."""
    if record["kind"] != "validation":
        return record
    return {name: math.nan if value is None else value for name, value in record.items()}
