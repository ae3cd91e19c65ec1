"""A sweep's charts for its report: parallel coordinates, and the valley of the loss over the learning rate."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from crescendo.experiments.reports.page import SYMBOLS, Figure

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


def _short(name: str) -> str:
    return name.split(".")[-1]


def _setting(row: Row, names: Sequence[str]) -> str:
    """The point's values in a line, as Plotly shows text."""
    return html.escape(", ".join(f"{_short(name)} = {_brief(row['values'][name])}" for name in names))


def _brief(text: str) -> str:
    """A number in four digits; other text as it is."""
    return f"{float(text):.4g}" if math.isfinite(_number(text)) else text


def parallel_coordinates(rows: Sequence[Row], names: Sequence[str]) -> Figure:
    """A line for each point through an axis for each value, and the loss last; the best one is strong."""
    columns = [[row["values"][name] for row in rows] for name in names] + [[repr(row["loss"]) for row in rows]]
    heights = [_heights(column) for column in columns]
    x = list(range(len(columns)))
    data: list[dict[str, Any]] = []
    # The worst are drawn first, so that the best lie on top; the weaker the worse.
    for i in reversed(range(len(rows))):
        label = f"{_setting(rows[i], names)}: {rows[i]['loss']:.4f}"
        data.append(
            {
                "x": x,
                "y": [round(height[i], 5) for height in heights],
                "meta": 0 if i == 0 else None,
                "mode": "lines+markers",
                "opacity": 1 if i == 0 else 0.2 + 0.5 * (1 - heights[-1][i]),
                "line": {"width": 3 if i == 0 else 1.3, "shape": "spline", "smoothing": 0.4},
                "marker": {"size": 7 if i == 0 else 4},
                "hovertemplate": f"{label}<extra></extra>",
                "name": label,
            }
        )
    marks = [
        {
            "x": at,
            "y": height,
            "text": html.escape(_brief(value)),
            "showarrow": False,
            "yshift": 13 if height == 1 else -13,
            "font": {"size": 11},
        }
        for at, (column, levels) in enumerate(zip(columns, heights, strict=True))
        for height, value in dict(zip(levels, column, strict=True)).items()
        if height in (0, 1) or min(levels) == max(levels)
    ]
    labels = [*map(html.escape, map(_short, names)), "val loss"]
    # In two rows, so that neighbours have room on a phone.
    ticks = {"tickvals": x, "ticktext": ["<br>" * (i % 2) + label for i, label in enumerate(labels)], "tickangle": 0}
    margin = 0.35
    layout = {
        "xaxis": ticks | {"range": [-margin, len(x) - 1 + margin], "tickfont": {"size": 12}},
        "yaxis": {"showticklabels": False, "showgrid": False, "range": [-0.15, 1.15]},
        "annotations": marks,
        "hovermode": "closest",
    }
    return Figure("Parallel coordinates", data, layout)


def learning_rate_valley(rows: Sequence[Row], rate: str, others: Sequence[str]) -> Figure:
    """The loss over the learning rate: a line for each setting of the other values, or a cloud where these are many."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(_setting(row, others), []).append(row)
    cloud = len(lines) > len(SYMBOLS)  # a search: points, not lines
    if cloud:
        lines = {"": list(rows)}
    data: list[dict[str, Any]] = []
    for i, (label, members) in enumerate(lines.items()):
        members = sorted(members, key=lambda row: float(row["values"][rate]))
        data.append(
            {
                "x": [float(row["values"][rate]) for row in members],
                "y": [row["loss"] for row in members],
                "meta": i,
                "mode": "markers" if cloud else "lines+markers",
                "marker": {"size": 8, "symbol": SYMBOLS[i]},
                "line": {"width": 2},
                "text": [f"{_setting(row, [rate, *others])}: {row['loss']:.4f}" for row in members],
                "hovertemplate": "%{text}<extra></extra>",
                "name": label,
                "showlegend": not cloud and len(lines) > 1,
            }
        )
    low, high = min(row["loss"] for row in rows), sorted(row["loss"] for row in rows)[(3 * len(rows)) // 4]
    shown = [
        loss for row in rows if (loss := row["loss"]) <= high + (high - low)
    ]  # what diverged would flatten the rest
    margin = 0.08 * (max(shown) - low) or 0.01
    rates = sorted({float(row["values"][rate]) for row in rows})
    ticks = {"tickvals": rates} if len(rates) <= 6 else {"dtick": 1 if rates[-1] > 30 * rates[0] else "D2"}
    layout = {
        "xaxis": {"type": "log", "title": {"text": html.escape(rate)}, "tickformat": "~e", **ticks},
        "yaxis": {
            "title": {"text": "validation loss (nats per token)"},
            "range": [low - margin, max(shown) + margin],
            "hoverformat": ".4f",
        },
        "hovermode": "closest",
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "itemclick": False},
        "height": 320 + 20 * sum(trace["showlegend"] for trace in data),
    }
    return Figure(f"Loss over {html.escape(_short(rate))}", data, layout)


def figures(rows: Sequence[Row]) -> list[Figure]:
    """The charts over all points; the valley only where every row has a learning rate or a peak.

    Args:
      rows: with `values` (gin text by binding) and a finite `loss`, best first.
    """
    names = [name for name in rows[0]["values"] if all(name in row["values"] for row in rows)]
    rates = [name for name in names if name.lower().endswith(("learning_rate", "peak"))]
    rates = [name for name in rates if all(_number(row["values"][name]) > 0 for row in rows)]
    charts = [parallel_coordinates(rows, names)]
    if rates:
        charts.append(learning_rate_valley(rows, rates[0], [name for name in names if name != rates[0]]))
    return charts
