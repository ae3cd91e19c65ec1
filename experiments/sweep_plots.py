"""A sweep's pictures: parallel coordinates, and the valley of the loss over the learning rate."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from crescendo.experiments import plots

Row = Mapping[str, Any]


def _number(text: str) -> float:
    """The value as a number; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _heights(values: Sequence[str]) -> list[float]:
    """Where the values lie on an axis from 0 to 1: by logarithm where all are above 0, by rank of their text else."""
    numbers = [_number(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        kinds = sorted(set(values))
        numbers = [float(kinds.index(value)) for value in values]
    elif min(numbers) > 0:
        numbers = [math.log(number) for number in numbers]
    low, high = min(numbers), max(numbers)
    return [0.5 if high == low else (number - low) / (high - low) for number in numbers]


def _parallel(figure: Figure, rows: Sequence[Row], names: Sequence[str]) -> None:
    axes = figure.subplots()
    columns = [[row["values"][name] for row in rows] for name in names]
    columns.append([f"{row['loss']:.6g}" for row in rows])
    heights = [_heights(column) for column in columns]
    colors = matplotlib.colormaps["viridis"]
    # The worst are drawn first, so that the best lie on top.
    for i in reversed(range(len(rows))):
        axes.plot([height[i] for height in heights], color=colors(heights[-1][i]), linewidth=2.5 if i == 0 else 1)
    for x, (column, height) in enumerate(zip(columns, heights, strict=True)):
        axes.axvline(x, color=plots.INK["light"][2], linewidth=0.8, zorder=0)
        for at, value in {at: value for at, value in zip(height, column, strict=True) if at in (0, 0.5, 1)}.items():
            axes.text(x + 0.02, at, value, fontsize=7)
    axes.set_xticks(range(len(columns)), [*(name.split(".")[-1] for name in names), "val loss"])
    axes.set_yticks([])
    axes.grid(visible=False)


def _valley(figure: Figure, rows: Sequence[Row], rate: str, others: Sequence[str]) -> None:
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = ", ".join(f"{name.split('.')[-1]} = {row['values'][name]}" for name in others)
        lines.setdefault(label, []).append((float(row["values"][rate]), row["loss"]))
    many = len(lines) > len(plots.MARKERS)  # a search: a cloud of points, not lines
    for i, (label, points) in enumerate(
        {"": [p for ps in lines.values() for p in ps]}.items() if many else lines.items()
    ):
        axes.plot(
            *zip(*sorted(points), strict=True),
            marker=plots.MARKERS[i],
            color=plots.COLORS["light"][i % len(plots.COLORS["light"])],
            linestyle="none" if many else "-",
            label=label or None,
        )
    axes.set_xscale("log")
    axes.set_xlabel(rate)
    axes.set_ylabel("validation loss (nats)")
    if not many and any(lines):
        axes.legend(frameon=False, fontsize=7)


def draw(rows: Sequence[Row]) -> dict[str, bytes]:
    """The pictures as PNG by name; the valley only where every row has a learning rate or a peak.

    Args:
      rows: with `values` (gin text by binding) and a finite `loss`, best first.
    """
    names = [name for name in rows[0]["values"] if all(name in row["values"] for row in rows)]
    rates = [name for name in names if name.lower().endswith(("learning_rate", "peak"))]
    rates = [name for name in rates if all(_number(row["values"][name]) > 0 for row in rows)]
    pictures = {}
    with matplotlib.rc_context(plots.style("light")):
        figures = {"parallel_coordinates": Figure(figsize=(1.6 * len(names) + 2.5, 4), layout="constrained")}
        _parallel(figures["parallel_coordinates"], rows, names)
        if rates:
            figures["learning_rate_valley"] = Figure(figsize=(5.5, 4), layout="constrained")
            _valley(figures["learning_rate_valley"], rows, rates[0], [name for name in names if name != rates[0]])
        for name, figure in figures.items():
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=160)
            pictures[name] = picture.getvalue()
    return pictures
