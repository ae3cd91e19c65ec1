"""Readers of what a run's folder holds, as a run that goes on reads it: run.json, records, what checkpoints say."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from fuzz import Parser

from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runs import metadata
from crescendo.experiments.runs.records import gaps
from crescendo.experiments.runs.run import read_checked_records
from crescendo.experiments.runs.state import Clock
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.health import Health
from crescendo.experiments.trainer.wall_clock import WallClock

_FIXED = {"task": "language_model", "seed": 0, "model": {"width": 16, "dtype": None}, "arrays": {".w": "float32[8, 4]"}}


def _steps() -> Iterator[dict]:
    for step in range(1, 6):
        at = {"step": step, "examples_seen": 8 * step, "tokens_seen": 1024 * step}
        row = {"loss": 2.5 / step, "update_norm": 0.1, "skipped_steps": int(step > 3), "batch_size": 8}
        yield {"kind": "train", **at, **row, "seconds": 0.1, "mfu": None}
        yield {"kind": "validation", **at, "loss": 2.5, "seconds": 0.1}
        spent = {f"{part}_seconds": 0.1 for part in ("wall", "compile", "evaluation", "saving", "lost")}
        yield {"kind": "time", **at, "seconds": 0.1, **spent}


def _records(folder: Path) -> list[Path]:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in _steps()))
    return [path]


def _go_on(path: Path) -> None:
    """As `train` reads them."""
    records = read_checked_records(path)
    gaps(records, end=40)
    Health.of(records, 40).keep([8, 16, 24], 2)
    WallClock().go_on(records, 0.1)
    min((record["loss"] for record in records if record["kind"] == "validation"), default=0.0)


def _run_json(folder: Path) -> list[Path]:
    path = folder / "run.json"
    path.write_text(json.dumps({"format": 2, "name": "a", "total_examples": 64, "fixed": _FIXED}))
    return [path]


def _metadata(folder: Path) -> list[Path]:
    meta = folder / "checkpoint" / "meta"
    meta.mkdir(parents=True)
    said = metadata.sealed(Clock(16, 2, 8, 0.5), {"format": 2, "fixed": _FIXED}, [1, 2**32 - 1], [3])
    (meta / "metadata").write_text(json.dumps(said))
    return [meta.parent]


def _read_metadata(checkpoint: Path) -> None:
    try:
        said = metadata.read(checkpoint, 16)
    except metadata.DamagedError as problem:
        raise UserError(str(problem)) from None
    # What is taken without its fingerprint is at least a clock of its number.
    assert dataclasses.asdict(Clock(**dict(said.clock)))["examples_seen"] == 16


PARSERS = [
    Parser("metrics.jsonl of a run that goes on", _records, _go_on),
    Parser("run.json of a run that goes on", _run_json, lambda path: run_folder.read_info(path.parent)),
    Parser("metadata of a checkpoint", _metadata, _read_metadata),
]
