"""The report's charts as PNG files, and the look that they and papers' figures share.

Colours follow Okabe and Ito's colour-blind-safe palette (lightened on a dark page); every arm has a marker of its own
too, so that no reader depends on colour.
"""

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator

from crescendo.experiments.reports.charts import Arms, Chart, batch_sizes

COLORS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#AA3C82", "#B77F00", "#2A8FC7"),
    "dark": ("#56B4E9", "#FF8A3D", "#2FC89B", "#E59BC9", "#F0B93A", "#A9D6F5"),
}
MARKERS = "os^DvPX"
INK = {"light": ("#1c2430", "#5b6675", "#dfe3e8"), "dark": ("#e8ecf1", "#9aa5b4", "#333b46")}


def render(chart: Chart, arms: Arms) -> bytes:
    """The chart as a PNG on a light ground.

    Args:
      chart: one of `charts.CHARTS`.
      arms: names and the runs behind each, in the order of the colours.
    """
    colors = [COLORS["light"][i % len(COLORS["light"])] for i in range(len(arms))]
    picture = io.BytesIO()
    with matplotlib.rc_context(style("light")), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that no font has is drawn as a box
        figure = Figure(figsize=(4.8, 3.3), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
        axes = figure.subplots()
        drawn = [(i, curve) for i, (_, runs) in enumerate(arms) for run in runs for curve in chart.curves(run)]
        for index, curve in drawn:
            marked = curve.points or len(curve.x) == 1
            axes.plot(
                curve.x,
                curve.y,
                color=colors[index],
                alpha=0.4 if curve.line == "faint" else 1,
                linewidth=1 if curve.line == "faint" else width(index),
                linestyle=":" if curve.line == "dotted" else "-",
                drawstyle="steps-post" if curve.stairs else "default",
                marker=MARKERS[index % len(MARKERS)] if marked else "",
                markersize=4,
                markevery=max(1, len(curve.x) // 10),
            )
        if chart.log:
            axes.set_yscale("log", base=chart.log)
            axes.minorticks_off()
        if chart.log == 2:
            axes.yaxis.set_major_locator(FixedLocator(batch_sizes([curve for _, curve in drawn])))
        elif chart.log:
            low, high = axes.get_ylim()
            if high < 10 * low:
                axes.yaxis.set_major_locator(MaxNLocator(5))
            else:
                axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5) if high < 1000 * low else (1,)))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: chart.format(value))
        if limits := chart.limits(arms):
            axes.set_ylim(*limits)
        axes.set(xlabel=chart.x, ylabel=chart.y)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: chart.format_x(value))
        axes.set_xlim(left=0)
        _legend(figure, arms, colors)
        figure.savefig(picture, format="png", dpi=200)
    return picture.getvalue()


def style(theme: str) -> Any:
    """Matplotlib settings for a theme."""
    ink, muted, grid = INK[theme]
    return {
        "font.size": 10.5,
        "text.color": ink,
        "text.parse_math": False,  # a run's name may hold any character
        "axes.labelcolor": muted,
        "axes.edgecolor": grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "xtick.color": grid,
        "ytick.color": grid,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "svg.hashsalt": "crescendo",
    }


def _legend(figure: Figure, arms: Arms, colors: Sequence[str]) -> None:
    """Names the arms above the axes, in one row if they fit; the figure grows with the rows."""
    names = [name if len(name) <= 36 else name[:35] + "…" for name, _ in arms]
    one_row = sum(map(len, names)) + 7 * len(names) <= 62
    columns = len(names) if one_row else max(1, 62 // (max(map(len, names)) + 7))
    figure.set_figheight(3.1 + 0.2 * math.ceil(len(names) / columns))
    handles = [_handle(i, color) for i, color in enumerate(colors)]
    figure.legend(
        handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9.5, handlelength=1.6
    )


def _handle(index: int, color: str) -> Line2D:
    """An arm's line in the legend."""
    return Line2D([], [], color=color, marker=MARKERS[index % len(MARKERS)], markersize=5, linewidth=1.8)


def width(index: int) -> float:
    """Thinner from arm to arm, so that curves that lie on each other all show."""
    return max(1.2, 3.2 - 0.8 * index)
