"""Cells: run once, cut anywhere."""

import math
import signal
import time
from typing import NamedTuple

import pytest

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import Interrupted
from crescendo.experiments.sweeps.cells import Cells


class Cell(NamedTuple):
    """A part."""

    size: int
    seed: int


EVERY = [Cell(size, seed) for size in (1, 2) for seed in (0, 1)]


def records(cells, stop_after=None):
    for number, cell in enumerate(cells.left):
        if number == stop_after:
            signal.raise_signal(signal.SIGTERM)
        yield {**cell._asdict(), "loss": 1.0}


def test_they_go_on_after_a_deadline_and_a_signal(tmp_path):
    cells = Cells(tmp_path, "cells.jsonl", EVERY, {"data": "a"})
    cells.run(records(cells), deadline=time.monotonic() - 1)
    assert cells.left == EVERY[1:]
    with pytest.raises(Interrupted, match=r"3 of 4 cells are left in .*; the same command goes on"):
        cells.check_finished()
    # The cell during which the signal comes is finished.
    cells.run(records(cells, stop_after=1), deadline=math.inf)
    assert cells.left == EVERY[3:]
    again = Cells(tmp_path, "cells.jsonl", EVERY, {"data": "a"})
    again.run(records(again), deadline=math.inf)
    again.check_finished()
    assert [(record["size"], record["seed"]) for record in again.finished] == [tuple(cell) for cell in EVERY]


def test_other_cells_may_be_asked_for_and_other_settings_not(tmp_path):
    cells = Cells(tmp_path, "cells.jsonl", EVERY, {"data": "a"})
    cells.run(records(cells), deadline=math.inf)
    more = Cells(tmp_path, "cells.jsonl", [Cell(2, 1), Cell(3, 0)], {"data": "a"})
    assert more.left == [Cell(3, 0)]
    assert [record["size"] for record in more.finished] == [2]
    with pytest.raises(UserError, match="data was a and is now b"):
        Cells(tmp_path, "cells.jsonl", EVERY, {"data": "b"})
