"""What a run records, as lines of `metrics.jsonl`.

A record is a flat dict with at least `kind` and `examples_seen`. Kinds: `train` (one a step), `validation`, `probe`
(what a probe saw), `sample` (what the model adds to a text: `prompt`, `text`), `time` (where the run's seconds went so
far), `batch_size` (a change: `from`, `to`, `reason`), `setting` (one that a run which went on was given otherwise:
`name`, `from`, `to`, as gin's text) and `warning` (`message`). Losses are in nats a token, or whatever the task's unit
is; `examples_seen`, `tokens_seen` (`images_seen`, ...) and `step` are counted after the step. Null stands for what
isn't known, and for a number that isn't finite, which JSON doesn't have.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import Appender, file_access, replace_file, to_json

Record = Mapping[str, Any]
Columns = dict[str, np.ndarray]

TRAIN_COLUMNS = (
    *("step", "examples_seen", "units_seen", "loss", "learning_rate", "batch_size", "microbatches"),
    *("gradient_norm", "skipped_steps", "seconds", "units_per_second", "mfu"),
)
VALIDATION_COLUMNS = ("step", "examples_seen", "units_seen", "loss", "seconds")


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
            records.append(_read_back(record))
    return records


def _read_back(record: dict[str, Any]) -> dict[str, Any]:
    """Of a validation everything is a number: null is one that isn't finite."""
    if record["kind"] != "validation":
        return record
    return {name: math.nan if value is None else value for name, value in record.items()}
