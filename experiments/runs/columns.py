"""The training records of long runs as columns: a million lines of JSON in a few seconds, by pyarrow."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from crescendo.experiments.runs.records import TRAIN_COLUMNS, Columns

if TYPE_CHECKING:
    import pyarrow

# How `to_json` begins a training record.
TRAIN = b'{"kind": "train",'


def train_columns(lines: Sequence[bytes]) -> Columns | None:
    """The numbers of training records by name, an array each, NaN for null; None for lines that aren't all sound.

    What a dict of every line would give (`run.read_run`), without making one: numbers, and those of `TRAIN_COLUMNS`.

    Args:
      lines: of JSON, each beginning with `TRAIN`; with a clock and a batch size.

    >>> lines = [TRAIN + b' "examples_seen": %d, "batch_size": 8, "loss": 3.5}' % seen for seen in (8, 16)]
    >>> columns = train_columns(lines)
    >>> columns["examples_seen"], columns["loss"]
    (array([ 8, 16]), array([3.5, 3.5]))
    """
    import pyarrow
    from pyarrow import json

    options = json.ReadOptions(block_size=1 << 24)  # a line must fit in
    try:
        table = json.read_json(pyarrow.BufferReader(b"\n".join(lines)), read_options=options)
    except pyarrow.ArrowException:
        return None
    names = table.column_names
    if len(set(names)) < len(names) or table.num_rows != len(lines):
        return None
    for name in ("examples_seen", "batch_size"):
        if name not in names or not pyarrow.types.is_int64(table.column(name).type) or table.column(name).null_count:
            return None
        if np.min(table.column(name), initial=0) < 0:
            return None
    columns = {name: _numbers(table.column(name)) for name in names}
    if any(columns.get(name, lines) is None for name in TRAIN_COLUMNS):
        return None
    none = np.full(len(lines), math.nan)
    return dict.fromkeys(TRAIN_COLUMNS, none) | {name: x for name, x in columns.items() if x is not None}


def _numbers(column: "pyarrow.ChunkedArray") -> np.ndarray | None:
    """A column's numbers; None where it holds something else."""
    from pyarrow import types

    if types.is_null(column.type):
        return np.full(len(column), math.nan)
    if not (types.is_integer(column.type) or types.is_floating(column.type)):
        return None
    return column.to_numpy()
