"""A run folder, read back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crescendo.experiments.runs import kinds
from crescendo.experiments.runs.columns import TRAIN, train_columns
from crescendo.experiments.runs.info import read_info
from crescendo.experiments.runs.records import (
    Columns,
    Gap,
    Record,
    began_at,
    gaps_between,
    parse_record,
    parse_records,
    read_back,
    read_lines,
    read_records,
)
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import read_file
from crescendo.experiments.runtime.text import visible

# A file of so many is worth another reader.
_MANY_LINES = 4096


def last_validation(folder: Path) -> dict:
    """The newest validation record of a run."""
    path = folder / "metrics.jsonl"
    records = kinds.of_kind(read_records(path), "validation", path)
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

    def said(self, name: str) -> Any:
        """What `run.json` says of something that it need not say.

        Raises:
          UserError: where it doesn't.
        """
        if name not in self.info:
            raise UserError(f"{self.folder / 'run.json'} has no {name}: restore it, or train the run again")
        return self.info[name]

    @property
    def name(self) -> str:
        """On one line, as it can be shown."""
        return visible(" ".join(self.info["name"].split()))


def read_run(folder: Path) -> Run:
    """Reads a run folder, also one whose run is still going on or was killed.

    Raises:
      UserError: if the folder is not a run's, or `run.json` or `metrics.jsonl` is damaged.
    """
    path, config = folder / "run.json", folder / "config.gin"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no run.json; name a folder that a training run wrote")
    info: dict[str, Any] = {**read_info(path)}
    metrics = path.with_name("metrics.jsonl")
    train, records = _read_training(metrics)
    columns = _checked_columns(train, records, metrics, f"{info.get('unit', 'token')}s_")
    seen, sizes = (columns["train"][name].astype(np.int64) for name in ("examples_seen", "batch_size"))
    return Run(
        folder=folder,
        info=info,
        config=read_file(config).decode(errors="replace") if config.exists() else "",
        train=columns["train"],
        validation=columns["validation"],
        events=[r for r in records if r["kind"] not in (*kinds.COLUMNS, "time")],
        time=next((r for r in reversed(records) if r["kind"] == "time"), {}),
        gaps=gaps_between(seen, sizes, began_at(info.get("fixed") or {})),
    )


def read_checked_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, each of which holds what its kind does: what a run that goes on takes.

    Raises:
      UserError: names the first value that is wrong, or a damaged line.
    """
    records = read_records(path)
    _checked_columns(_train_columns(records, path), records, path)
    return records


def _checked_columns(
    train: Columns, records: list[dict[str, Any]], path: Path, unit: str = "tokens_"
) -> dict[str, Columns]:
    """The columns of training and validation records, which are a run's, as the other records are.

    Args:
      train: the columns of the training records.
      records: the others, at least.
      path: of their file.
      unit: how the names of what is counted by the run's own unit begin.
    """
    validation = kinds.columns([r for r in records if r["kind"] == "validation"], "validation", path)
    columns = {"train": _with_units(train, unit), "validation": _with_units(validation, unit)}
    for kind, found in columns.items():
        kinds.check_columns(found, kind, path)
    for kind in kinds.EVENTS:
        kinds.of_kind(records, kind, path)
    return columns


def _read_training(path: Path) -> tuple[Columns, list[dict[str, Any]]]:
    """The training records of a `metrics.jsonl` as columns, and the others.

    Many lines that are all sound but for a torn end are read quickly.
    """
    lines = read_lines(path)
    if len(lines) >= _MANY_LINES:
        sound = lines if parse_record(lines[-1]) else lines[:-1]
        columns = train_columns([line for line in sound if line.startswith(TRAIN)])
        others = [parse_record(line) for line in sound if not line.startswith(TRAIN)]
        if columns is not None and all(record and record["kind"] != "train" for record in others):
            return columns, [read_back(record) for record in others if record]
    records = parse_records(lines, path)
    return _train_columns(records, path), records


def _train_columns(records: list[dict[str, Any]], path: Path) -> Columns:
    """Those of a file's training records."""
    return kinds.columns([r for r in records if r["kind"] == "train"], "train", path)


def _with_units(columns: Columns, unit: str) -> Columns:
    """The columns with what their names call by the run's unit also under `units_`."""
    named = {f"units_{name.removeprefix(unit)}": values for name, values in columns.items() if name.startswith(unit)}
    return columns | named


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a run that has reached its end and was evaluated there."""
    if not (folder / "run.json").is_file():
        return False
    run = read_run(folder)
    return bool(len(run.validation["loss"])) and run.validation["examples_seen"][-1] >= run.info["total_examples"]
