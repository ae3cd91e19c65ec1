"""Where runs spent their seconds, and what share of them went into steps that count."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from crescendo.experiments.reports.compare import Arm
from crescendo.experiments.runs.run import Run
from crescendo.experiments.runtime.text import duration

COLUMNS = ("run", "total", "training", "compiling", "evaluating", "saving", "lost", "other", "goodput")


class Spent(NamedTuple):
    """A run's seconds by the clock on the wall, over all processes that worked on it.

    Attributes:
      total: since `train` was called.
      training: in steps that stand, skipped ones among them.
      compiling: the step, the evaluation, the first state.
      evaluating: on held-out rows.
      saving: until a checkpoint was on its way, and at the end until it was on disk.
      lost: in steps that were done again, since a process ended before it saved them.
      other: reading the data's index, restoring, and what is between the steps.
      goodput: the share of the total in steps that count: that stand and were not skipped.
    """

    total: float
    training: float
    compiling: float
    evaluating: float
    saving: float
    lost: float
    other: float
    goodput: float


def spent(run: Run) -> Spent | None:
    """Where a run's seconds went, as its newest record of them says; None where there is none."""
    if not run.time:
        return None
    total, training = run.time["wall_seconds"], run.time["seconds"]
    compiling, evaluating, saving, lost = (
        run.time[f"{part}_seconds"] for part in ("compile", "evaluation", "saving", "lost")
    )
    other = max(0.0, total - training - compiling - evaluating - saving - lost)
    goodput = (training - _skipped_seconds(run)) / total if total > 0 else math.nan
    return Spent(total, training, compiling, evaluating, saving, lost, other, goodput)


def _skipped_seconds(run: Run) -> float:
    """The seconds of the steps that changed nothing."""
    each = np.diff(run.train["seconds"], prepend=0.0)
    return float(each[np.diff(run.train["skipped_steps"], prepend=0) > 0].sum())


def cells(arm: Arm) -> list[str] | None:
    """The means over an arm's runs, a cell for each of `COLUMNS`; None where no run has recorded its seconds."""
    every = [each for run in arm.runs if (each := spent(run)) is not None]
    if not every:
        return None
    mean = Spent(*np.mean(every, axis=0).tolist())
    return [arm.name, *map(_shown, mean[:-1]), f"{mean.goodput:.0%}"]


def _shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def seconds_table(arms: Sequence[Arm]) -> Table | None:
    """The seconds of every arm, for the terminal in 80 columns; None where none has recorded them."""
    rows = [row for arm in arms if (row := cells(arm)) is not None]
    if not rows:
        return None
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold")
    table.add_column(COLUMNS[0], overflow="fold")
    for heading in COLUMNS[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, *numbers in rows:
        table.add_row(Text(name), *numbers)
    return table
