"""What an arm needs to reach the loss at which another one ends: steps and time at equal loss."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from crescendo.experiments.reports.compare import Arm


class Reached(NamedTuple):
    """Where an arm's validation loss first reaches the baseline's last one; None where it never does.

    Attributes:
      loss: the baseline's last validation loss, the mean over its seeds.
      steps: of the optimizer.
      seconds: of training.
      tokens: seen.
      steps_saved: 1 - steps / the baseline's steps.
      seconds_saved: 1 - seconds / the baseline's seconds.
    """

    loss: float | None
    steps: float | None
    seconds: float | None
    tokens: float | None
    steps_saved: float | None
    seconds_saved: float | None


def reached(arm: Arm, baseline: Arm) -> Reached:
    """Where `arm`, the mean over its seeds, reaches the loss at which `baseline` ends; linear between evaluations."""
    target = baseline.validation_loss
    mean = {
        name: np.mean([run.validation[name][: _shortest(arm)] for run in arm.runs], axis=0)
        for name in ("loss", "step", "seconds", "units_seen")
    }
    below = np.flatnonzero(mean["loss"] <= (-np.inf if target is None else target))
    if not len(below):
        return Reached(target, None, None, None, None, None)
    i = int(below[0])

    def at(name: str) -> float:
        if i == 0:
            return float(mean[name][0])
        before, after = mean["loss"][i - 1], mean["loss"][i]
        share = (before - target) / (before - after)
        return float(mean[name][i - 1] + share * (mean[name][i] - mean[name][i - 1]))

    steps, seconds = at("step"), at("seconds")
    steps_saved = 1 - steps / baseline.steps if baseline.steps else None
    seconds_saved = 1 - seconds / baseline.seconds if baseline.seconds else None
    return Reached(target, steps, seconds, at("units_seen"), steps_saved, seconds_saved)


def equal_loss_table(arms: Sequence[Arm]) -> Table:
    """Steps and seconds of every arm up to the first one's last validation loss."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, header_style="bold")
    table.add_column(f"to reach {_shown(arms[0].validation_loss, '.3f')} nats", overflow="fold")
    for heading in ("steps", "saved", "seconds", "saved"):
        table.add_column(heading, justify="right")
    for arm in arms:
        at = reached(arm, arms[0])
        shown = [_shown(at.steps, ",.0f"), _shown(at.steps_saved, ".1%")]
        table.add_row(Text(arm.name), *shown, _shown(at.seconds, ",.1f"), _shown(at.seconds_saved, ".1%"))
    return table


def _shortest(arm: Arm) -> int:
    """The evaluations that all of an arm's seeds have."""
    return min(len(run.validation["loss"]) for run in arm.runs)


def _shown(value: float | None, spec: str) -> str:
    return "not reached" if value is None else format(value, spec)
