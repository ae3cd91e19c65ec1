"""A run folder, read back."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crescendo.experiments.runs.columns import TRAIN, train_columns
from crescendo.experiments.runs.records import (
    TRAIN_COLUMNS,
    VALIDATION_COLUMNS,
    Columns,
    Gap,
    Record,
    began_at,
    gaps,
    gaps_between,
    parse_record,
    parse_records,
    read_back,
    read_lines,
    read_records,
)
from crescendo.experiments.runtime.encoding import read_text
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access

# A file of so many is worth another reader.
_MANY_LINES = 4096


def last_validation(folder: Path) -> dict:
    """The newest validation record of a run."""
    records = [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == "validation"]
    if not records:
        raise UserError(f"{folder} has no validation yet: let it train to its end, or raise train.total_examples")
    return records[-1]


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
      events: the other records (`batch_size`, `sample`, `warning`, ...), in order.
      time: the newest record of where the seconds went; empty for a run of before these were written.
      gaps: where its training records don't follow one another.
    """

    folder: Path
    info: dict[str, Any]
    config: str
    train: Columns
    validation: Columns
    events: list[dict[str, Any]]
    time: Record = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)

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
            info = json.loads(read_text(path))
            config_text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or leave this run out") from None
    if missing := {"name", "total_examples"} - set(info if isinstance(info, dict) else ()):
        raise UserError(f"{path} has no {' and no '.join(sorted(missing))}; restore it or leave this run out")
    train, records, lost = _read_training(path.with_name("metrics.jsonl"), began_at(info.get("fixed")))
    unit = f"{info.get('unit', 'token')}s_"
    return Run(
        folder=folder,
        info=info,
        config=config_text,
        train=_train_columns(train, unit),
        validation=_columns([_with_units(r, unit) for r in records if r["kind"] == "validation"], VALIDATION_COLUMNS),
        events=[r for r in records if r["kind"] not in ("train", "validation", "time")],
        time=next((r for r in reversed(records) if r["kind"] == "time"), {}),
        gaps=lost,
    )


def _read_training(path: Path, begin: int) -> tuple[Columns, list[dict[str, Any]], list[Gap]]:
    """The training records of a `metrics.jsonl` as columns, the others, and where the former don't follow one another.

    Many lines that are all sound but for a torn end are read quickly.
    """
    lines = read_lines(path)
    if len(lines) >= _MANY_LINES:
        sound = lines if parse_record(lines[-1]) else lines[:-1]
        columns = train_columns([line for line in sound if line.startswith(TRAIN)])
        others = [parse_record(line) for line in sound if not line.startswith(TRAIN)]
        if columns is not None and all(record and record["kind"] != "train" for record in others):
            lost = gaps_between(columns["examples_seen"], columns["batch_size"], begin)
            return columns, [read_back(record) for record in others if record], lost
    records = parse_records(lines, path)
    return _columns([r for r in records if r["kind"] == "train"], ()), records, gaps(records, begin=begin)


def _train_columns(columns: Columns, unit: str) -> Columns:
    """Columns with at least those of every run, and what their names call by the run's unit also under `units_`."""
    columns = columns | _with_units(columns, unit)
    length = len(columns.get("examples_seen", ()))
    return {name: np.full(length, math.nan) for name in TRAIN_COLUMNS} | columns


def _with_units(record: Record, unit: str) -> dict[str, Any]:
    """The record with what its names call by the run's unit also under `units_`."""
    return {**record, **{f"units_{name.removeprefix(unit)}": x for name, x in record.items() if name.startswith(unit)}}


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a run that has reached its end and was evaluated there."""
    if not (folder / "run.json").is_file():
        return False
    run = read_run(folder)
    return bool(len(run.validation["loss"])) and run.validation["examples_seen"][-1] >= run.info["total_examples"]


def _columns(records: list[dict[str, Any]], names: tuple[str, ...]) -> Columns:
    """The records' numbers by name, each an array with one value per record."""
    every = dict.fromkeys((*names, *(name for record in records for name in record)))
    columns = {name: [record.get(name) for record in records] for name in every}
    return {
        name: np.array([math.nan if value is None else value for value in values])
        for name, values in columns.items()
        if all(value is None or isinstance(value, int | float) for value in values)
    }
