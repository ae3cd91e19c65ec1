"""The report's page: charts that zoom and answer to the pointer, in one file that needs no network.

The curves are those of `charts.py`; Plotly's script draws them and travels in the page. The page's own script
(`templates/report.js`) gives them the page's colours, so that they follow the reader's light or dark theme. The
page's security policy names the two scripts by their hash: nothing that stands in a run's name or config can run.
"""

import base64
import datetime
import hashlib
import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from crescendo.experiments.reports import charts, plots
from crescendo.experiments.runtime.text import visible

SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
_TEMPLATES = Path(__file__).with_name("templates")
# How Plotly writes the numbers of an axis.
_FORMATS: dict[Callable[[float], str], dict[str, Any]] = {
    charts.scientific: {"exponentformat": "e", "hoverformat": ".3~e"},
    charts.percent: {"tickformat": "~%", "hoverformat": ".3~%"},
    charts.compact: {"hoverformat": ".4~s"},
}
_UNIFIED_ARMS = 4  # more than so many values in one box hide the chart


class Figure(NamedTuple):
    """A chart of the page: its title and Plotly's traces and layout, without colours.

    A trace's `meta` is the number of its arm, whose colour the page gives it; None for the muted one.
    """

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def figure(chart: charts.Chart, arms: charts.Arms) -> Figure:
    """What Plotly draws of a chart."""
    data: list[dict[str, Any]] = []
    curves: list[charts.Curve] = []
    for index, (_, runs) in enumerate(arms):
        for run in runs:
            for curve in chart.curves(run):
                curves.append(curve)
                marked = curve.points or len(curve.x) == 1
                name = run.name if curve.label == chart.title.lower() else f"{run.name} ({curve.label})"
                data.append(
                    {
                        "x": numbers(curve.x),
                        "y": numbers(curve.y),
                        "meta": index,
                        "name": html.escape(name),  # Plotly reads tags in names
                        "mode": "lines+markers" if marked else "lines",
                        "opacity": 0.45 if curve.line == "faint" else 1,
                        "line": {
                            "width": 1.2 if curve.line == "faint" else plots.width(index),
                            "dash": "dot" if curve.line == "dotted" else "solid",
                            "shape": "hv" if curve.stairs else "linear",
                        },
                        "marker": {"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7, "maxdisplayed": 10},
                    }
                )
    y: dict[str, Any] = {"title": {"text": chart.y}, "type": "log" if chart.log else "linear"}
    if chart.log == 2:
        y |= {"tickvals": (sizes := charts.batch_sizes(curves)), "hoverformat": ",d"}
        if sizes:
            y["range"] = [math.log10(sizes[0] / 1.5), math.log10(sizes[-1] * 1.5)]
    elif chart.log:
        values = [value for trace in data for value in trace["y"] if value and value > 0] or [1.0]
        # With a format Plotly writes every tick in full, and not the last digit alone between powers of 10.
        y |= {"tickformat": "~s" if min(values) >= 1 else "~g", "hoverformat": ".4~g"}
        if 10 < max(values) / min(values) < 1000:
            y["dtick"] = "D2"  # at 1, 2 and 5; left alone it may be all nine digits, too close to each other
    else:
        y |= _FORMATS.get(chart.format, {"hoverformat": ".4f"})
    if limits := chart.limits(arms):
        y["range"] = limits
    unified = sum(len(runs) for _, runs in arms) <= _UNIFIED_ARMS
    x = {"title": {"text": chart.x}, "rangemode": "tozero"} | _FORMATS[chart.format_x]
    layout = {"xaxis": x, "yaxis": y}
    return Figure(chart.title, data, layout | {"hovermode": "x unified" if unified else "closest", "hoverdistance": 40})


def numbers(values: np.ndarray) -> list[float | None]:
    """The values in six significant digits; None, a gap, where one is not finite.

    >>> numbers(np.array([1.23456789, np.nan]))
    [1.23457, None]
    """
    finite = np.isfinite(values)
    return [float(f"{x:.6g}") if ok else None for x, ok in zip(values.tolist(), finite, strict=True)]


def render(figures: Sequence[Figure], **context: Any) -> str:
    """The page.

    Args:
      figures: in order.
      context: what the template `report.html` names besides.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [get_plotlyjs(), (_TEMPLATES / "report.js").read_text(encoding="utf-8")]
    return templates.get_template("report.html").render(
        scripts=scripts,
        policy=" ".join(map(_hash, scripts)),
        figures=[chart._asdict() for chart in figures],
        colors=plots.COLORS,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        **context,
    )


def _shown(value: Any) -> Any:
    """What the template writes: text without what a page can't show."""
    return visible(value) if type(value) is str else value


def _hash(script: str) -> str:
    """What a content security policy calls a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


class Setting(NamedTuple):
    """One setting of every run."""

    name: str
    values: list[str]
    differs: bool


def side_by_side(settings: Sequence[Mapping[str, str]]) -> list[Setting]:
    """The runs' settings side by side, those that differ first."""
    names = dict.fromkeys(name for each in settings for name in each)
    rows = [(name, [each.get(name, "–") for each in settings]) for name in names]
    lines = [Setting(name, values, len(set(values)) > 1) for name, values in rows]
    return sorted(lines, key=lambda line: not line.differs)
