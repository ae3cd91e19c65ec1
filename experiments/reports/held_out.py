"""What was measured on held-out sets: a table for the terminal, and the entries of the page's."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from crescendo.experiments.reports.compare import Arm
from crescendo.experiments.reports.loads import with_extremes
from crescendo.experiments.runs.records import VALIDATION_COLUMNS
from crescendo.experiments.runs.run import Run
from crescendo.experiments.runtime.text import visible


def by_set(means: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The means of an evaluation by held-out set: what has no set before its name is of "validation".

    >>> by_set({"loss": 2.0, "news/loss": 3.0})
    {'validation': {'loss': 2.0}, 'news': {'loss': 3.0}}
    """
    sets: dict[str, dict[str, float]] = {}
    for name, value in means.items():
        held_out, _, metric = name.rpartition("/")
        sets.setdefault(held_out or "validation", {})[metric] = value
    return sets


def last_means(run: Run) -> dict[str, float]:
    """The means of a run's last evaluation, of experts' loads the extremes; none before it."""
    places = {"step", "examples_seen", "seconds", "units_seen", f"{run.unit}s_seen"}
    assert places >= {*VALIDATION_COLUMNS} - {"loss"}
    means = {name: float(x[-1]) for name, x in run.validation.items() if name not in places and len(x)}
    sets = {held_out: with_extremes(own) for held_out, own in by_set(means).items()}
    return {
        metric if held_out == "validation" else f"{held_out}/{metric}": value
        for held_out, own in sets.items()
        for metric, value in own.items()
    }


def means_table(lines: Sequence[tuple[Sequence[str], Mapping[str, float]]], first: Sequence[str], unit: str) -> Table:
    """Means side by side, a line each.

    Args:
      lines: what each is of, in words, and the means by name.
      first: the headings of the words.
      unit: of the loss.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")
    names = list(dict.fromkeys(["loss", *(name for _, means in lines for name in means)]))
    headings = {"loss": f"loss\n(nats/{unit})", "bits_per_byte": "bits\nper byte"}
    for heading in first:
        table.add_column(heading, overflow="fold")
    for name in names:
        table.add_column(Text(headings.get(name, visible(name).replace("_", "\n"))), justify="right", no_wrap=True)
    for words, means in lines:
        table.add_row(
            *map(Text, map(visible, words)), *(f"{means[name]:.4f}" if name in means else "–" for name in names)
        )
    return table


def held_out_table(arms: Sequence[Arm]) -> Table | None:
    """Each arm on each held-out set, the means over its seeds; None where "validation" is the only set."""
    lines = []
    for arm in arms:
        every = [last_means(run) for run in arm.runs]
        names = dict.fromkeys(name for means in every for name in means)
        means = {name: float(np.mean([each[name] for each in every if name in each])) for name in names}
        lines += [((arm.name, held_out), own) for held_out, own in by_set(means).items()]
    if {held_out for (_, held_out), _ in lines} <= {"validation"}:
        return None
    return means_table(lines, ("run", "set"), arms[0].runs[0].unit)
