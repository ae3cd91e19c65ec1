"""What records hold, by kind: checked when a run is read, those of its steps and evaluations by the column.

More may be there, and so may other kinds, which probes give.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NoReturn

import numpy as np
from pydantic import Field

from crescendo.experiments.runs.records import TRAIN_COLUMNS, VALIDATION_COLUMNS, Columns
from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError

COLUMNS = {"train": TRAIN_COLUMNS, "validation": VALIDATION_COLUMNS}
# Columns without a gap.
PLACE = {"train": ("step", "examples_seen", "batch_size"), "validation": ("step", "examples_seen")}
# Whole numbers, with the least that they may be.
WHOLE = {"step": 0, "examples_seen": 0, "units_seen": 0, "batch_size": 1, "microbatches": 1, "skipped_steps": 0}
LARGEST = 1e300  # past that sums and axes overflow
AT_LEAST_0 = ("seconds", "units_per_second", "gradient_norm", "gradient_l1_norm", "mfu")

_WAY_ON = "restore the file or leave this run out"

_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(ge=0)]


class _Event(schemas.OpenSchema):
    step: _Count
    examples_seen: _Count


class _Validation(_Event):
    loss: Annotated[float, Field(allow_inf_nan=True)]


class _BatchSize(_Event):
    before: _Size = Field(alias="from")
    to: _Size
    reason: str


class _Setting(_Event):
    name: str
    before: str = Field(alias="from")
    to: str


class _Warning(_Event):
    message: str
    first_example: _Count | None = None
    last_example: _Count | None = None


class _Rollback(_Event):
    to: _Count
    first_example: _Count
    last_example: _Count
    message: str


class _Sample(_Event):
    prompt: str
    text: str


class _Time(_Event):
    seconds: _Seconds
    wall_seconds: _Seconds
    compile_seconds: _Seconds
    evaluation_seconds: _Seconds
    saving_seconds: _Seconds
    lost_seconds: _Seconds


EVENTS: Mapping[str, type[_Event]] = {
    "validation": _Validation,
    "batch_size": _BatchSize,
    "setting": _Setting,
    "warning": _Warning,
    "rollback": _Rollback,
    "sample": _Sample,
    "time": _Time,
}


def of_kind(records: Sequence[dict[str, Any]], kind: str, path: Path) -> list[dict[str, Any]]:
    """The records of one of `EVENTS`, which hold what it has.

    Args:
      records: of a run.
      kind: which.
      path: of their file.

    Raises:
      UserError: names the first value that is wrong.
    """
    found = [record for record in records if record["kind"] == kind]
    schema = EVENTS[kind]
    schemas.checked(found, list[schema], f"{path}: {kind} records")  # type: ignore[valid-type]
    return found


def columns(records: Sequence[Mapping[str, Any]], kind: str, path: Path) -> Columns:
    """The numbers of `train` or `validation` records by name, each an array with one value per record, NaN for null.

    Raises:
      UserError: names what should be a number and isn't one in one of them.
    """
    every = dict.fromkeys((*COLUMNS[kind], *(name for record in records for name in record)))
    found = {name: column([record.get(name) for record in records]) for name in every}
    for name in COLUMNS[kind]:
        if found[name] is None:
            raise UserError(f"{path}: {kind} records: {name} is no number in one of them; {_WAY_ON}")
    return {name: values for name, values in found.items() if values is not None}


def column(values: Sequence[Any]) -> np.ndarray | None:
    """The numbers as an array, NaN for null; None where something else is among them, or more than 64 bits hold.

    >>> column([1, 2]), column([0.5, None]), column([True]), column([2**70])
    (array([1, 2]), array([0.5, nan]), None, None)
    """
    kinds = set(map(type, values))
    if not kinds <= {int, float, NoneType}:
        return None
    try:
        array = np.array([np.nan if value is None else value for value in values] if NoneType in kinds else values)
    except OverflowError:
        return None
    return array if array.dtype.kind in "if" else None


def check_columns(columns: Columns, kind: str, path: Path) -> None:
    """That the columns of `train` or `validation` records are a run's: counts are whole numbers, no time is below 0.

    Raises:
      UserError: names the first value that is wrong, by its record's place among those of the kind.
    """

    def refuse(name: str, says: str, at: int | None = None) -> NoReturn:
        place = f"{kind} records: {name}" if at is None else f"{kind} record {at + 1}: {name} = {columns[name][at]:g}"
        raise UserError(f"{path}: {place} {says}; {_WAY_ON}")

    for name in PLACE[kind]:
        if len(columns[name]) and columns[name].dtype.kind != "i":
            refuse(name, "is missing or no whole number in one of them")
    for name, values in columns.items():
        if (beyond := np.isfinite(values) & (np.abs(values) > LARGEST)).any():
            refuse(name, f"is beyond {LARGEST:g}", int(np.argmax(beyond)))
    for name in columns.keys() & WHOLE.keys():
        values = columns[name]
        wrong = ~np.isnan(values) & ~(np.isfinite(values) & (values == np.floor(values)) & (values >= WHOLE[name]))
        if wrong.any():
            refuse(name, f"must be a whole number of at least {WHOLE[name]}", int(np.argmax(wrong)))
    for name in columns.keys() & set(AT_LEAST_0):
        if (below := columns[name] < 0).any():
            refuse(name, "must be at least 0", int(np.argmax(below)))
    # Training records that are missing or there twice are told of (`records.gaps`).
    if kind == "validation" and (behind := np.diff(columns["examples_seen"]) < 0).any():
        refuse("examples_seen", "lies before that of the record before", int(np.argmax(behind)) + 1)
