"""The report's charts: what each shows of a run, and its picture as a PNG; the page itself draws the same curves.

Colours follow Okabe and Ito's colour-blind-safe palette (lightened on a dark page); every arm has a marker of its own
too, so that no reader depends on colour.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from crescendo.experiments.runs.records import Columns
from crescendo.experiments.runs.run import Run
from crescendo.experiments.runtime.text import RunningMean, compact

Arms = Sequence[tuple[str, Sequence[Run]]]

COLORS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#AA3C82", "#B77F00", "#2A8FC7"),
    "dark": ("#56B4E9", "#FF8A3D", "#2FC89B", "#E59BC9", "#F0B93A", "#A9D6F5"),
}
MARKERS = "os^DvPX"
INK = {"light": ("#1c2430", "#5b6675", "#dfe3e8"), "dark": ("#e8ecf1", "#9aa5b4", "#333b46")}
_MAX_POINTS = 800
NOISE_COLUMNS = ("noise_scale", "norm_layers_noise_scale")


class Curve(NamedTuple):
    """A line of a chart: what it is of, its points, whether it is `solid`, `faint` or `dotted`, and how it is joined.

    `stairs`: each value holds up to the next x. `points`: the values are few, and marked.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    line: str = "solid"
    stairs: bool = False
    points: bool = False


class Chart(NamedTuple):
    """A chart: the name of its file, its title, the axes' labels, and what it shows of a run.

    `columns` are those of the training records that it needs: where no run has any of them, it is left out. `log` is
    the base of a logarithmic vertical axis; `limits` gives the vertical range of all runs, None for all that there is.
    """

    name: str
    title: str
    x: str
    y: str
    curves: Callable[[Run], list[Curve]]
    columns: tuple[str, ...] = ("loss",)
    log: int | None = None
    limits: Callable[[Arms], tuple[float, float] | None] = lambda arms: None
    format: Callable[[float], str] = lambda value: f"{value:g}"


def render(chart: Chart, arms: Arms) -> bytes:
    """The chart as a PNG on a light ground.

    Args:
      chart: one of `CHARTS`.
      arms: names and the runs behind each, in the order of the colours.
    """
    colors = [COLORS["light"][i % len(COLORS["light"])] for i in range(len(arms))]
    picture = io.BytesIO()
    with matplotlib.rc_context(style("light")), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that no font has is drawn as a box
        figure = Figure(figsize=(4.8, 3.3), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
        axes = figure.subplots()
        for index, (_, runs) in enumerate(arms):
            for curve in (curve for run in runs for curve in chart.curves(run)):
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
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: chart.format(value))
        if limits := chart.limits(arms):
            axes.set_ylim(*limits)
        axes.set(xlabel=chart.x, ylabel=chart.y)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
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


def _loss_against(x: str) -> Callable[[Run], list[Curve]]:
    """The losses against a column: training averaged over 2% of the run, and validation."""

    def curves(run: Run) -> list[Curve]:
        train, validation = _thin(run.train | {"loss": averaged(run, "loss")}), run.validation
        return [
            Curve("training", train[x], train["loss"], "faint"),
            Curve("validation", validation[x], validation["loss"], points=True),
        ]

    return curves


def loss_limits(arms: Arms) -> tuple[float, float] | None:
    """From the lowest loss to the highest at a tenth of a run.

    The fall from the untrained loss would hide the differences that matter: it leaves the chart at the top.
    """
    lows, highs = [], []
    for run in (run for _, runs in arms for run in runs):
        seen = _thin(run.train)["examples_seen"], run.validation["examples_seen"]
        for curve, examples in zip(_loss_against("step")(run), seen, strict=True):
            finite = np.isfinite(curve.y)
            lows += curve.y[finite].tolist()
            highs += curve.y[finite & (examples >= 0.1 * run.info["total_examples"])][:1].tolist()
    if not highs or max(highs) <= min(lows):
        return None
    margin = 0.05 * (max(highs) - min(lows))
    return min(lows) - margin, max(highs) + margin


def _batch_size(run: Run) -> list[Curve]:
    """The batch size as stairs: a step's batch covers the tokens before its record."""
    batch_size, tokens = run.train["batch_size"], run.train["units_seen"]
    if len(tokens) > 1 and batch_size[-1] < batch_size[-2]:
        batch_size, tokens = batch_size[:-1], tokens[:-1]  # the last step takes the examples that are left
    if not len(tokens):
        return []
    change = np.flatnonzero(np.diff(batch_size)) + 1
    edges = np.concatenate([[0], tokens[change - 1], tokens[-1:]])
    return [Curve("batch size", edges, batch_size[np.concatenate([[0], change, [-1]])], stairs=True)]


def _against_tokens(*columns: tuple[str, str, str], mean: bool) -> Callable[[Run], list[Curve]]:
    """Training columns, `(name, label, line)` each, against tokens; averaged over 2% of the run where `mean`."""

    def curves(run: Run) -> list[Curve]:
        available = [each for each in columns if each[0] in run.train]
        every = {name: averaged(run, name) if mean else run.train[name] for name, _, _ in available}
        thin = _thin({"units_seen": run.train["units_seen"], **every})
        return [Curve(label, thin["units_seen"], thin[name], line) for name, label, line in available]

    return curves


def scientific(value: float) -> str:
    """A tick's label.

    >>> scientific(0.00025)
    '2.5e-4'
    """
    return np.format_float_scientific(float(f"{value:.3g}"), trim="-", exp_digits=1) if value else "0"


def _from_zero(column: str) -> Callable[[Arms], tuple[float, float] | None]:
    """The vertical range from 0 to a little above a column's largest value."""

    def limits(arms: Arms) -> tuple[float, float] | None:
        values = [run.train[column] for _, runs in arms for run in runs]
        top = max((float(x) for each in values for x in each[np.isfinite(each)]), default=0.0)
        return (0.0, 1.05 * top) if top > 0 else None

    return limits


_LOSS = "loss (nats per token)"
CHARTS = (
    Chart("loss_tokens", "Loss against tokens", "tokens", _LOSS, _loss_against("units_seen"), limits=loss_limits),
    Chart("loss_steps", "Loss against steps", "optimizer steps", _LOSS, _loss_against("step"), limits=loss_limits),
    Chart("batch_size", "Batch size", "tokens", "batch size (examples)", _batch_size, log=2, format=compact),
    Chart(
        *("learning_rate", "Learning rate", "tokens", "learning rate"),
        _against_tokens(("learning_rate", "learning rate", "solid"), mean=False),
        limits=_from_zero("learning_rate"),
        format=scientific,
    ),
    Chart(
        *("throughput", "Throughput", "tokens", "tokens per second"),
        _against_tokens(("units_per_second", "throughput", "solid"), mean=True),
        limits=_from_zero("units_per_second"),
        format=compact,
    ),
    Chart(
        *("noise_scale", "Gradient noise scale (dotted: of norm layers)", "tokens", "noise scale (examples)"),
        _against_tokens(
            ("noise_scale", "all parameters", "solid"), ("norm_layers_noise_scale", "norm layers", "dotted"), mean=True
        ),
        columns=NOISE_COLUMNS,
        log=10,
        format=compact,
    ),
    Chart(
        *("trust_ratio", "Trust ratios of the layers (dotted: least and largest)", "tokens", "trust ratio"),
        _against_tokens(
            ("trust_ratio_median", "median", "solid"),
            ("trust_ratio_min", "least", "dotted"),
            ("trust_ratio_max", "largest", "dotted"),
            mean=True,
        ),
        columns=("trust_ratio_median",),
        log=10,
    ),
)


def charts_of(arms: Arms) -> list[Chart]:
    """The charts for which some run has the columns, in the words of what the runs count."""
    every = [run for _, runs in arms for run in runs]
    known = {name for run in every for name in run.train}
    return [
        chart._replace(title=in_units(chart.title, every), x=in_units(chart.x, every), y=in_units(chart.y, every))
        for chart in CHARTS
        if known & set(chart.columns)
    ]


def in_units(text: str, runs: Sequence[Run]) -> str:
    """The text with "token" replaced by what the runs count; by "unit" where they count different things."""
    units = {run.unit for run in runs}
    return text.replace("token", units.pop() if len(units) == 1 else "unit")


def averaged(run: Run, name: str) -> np.ndarray:
    """A training column averaged over the last 2% of the run's examples; NaN until there is a finite value."""
    mean = RunningMean(0.02 * run.info["total_examples"])
    return np.array([mean.add(x, size) for x, size in zip(run.train[name], run.train["batch_size"], strict=True)])


def width(index: int) -> float:
    """Thinner from arm to arm, so that curves that lie on each other all show."""
    return max(1.2, 3.2 - 0.8 * index)


def _thin(columns: Columns) -> Columns:
    """At most `_MAX_POINTS` of the records, evenly spaced, with the first and the last."""
    length = len(next(iter(columns.values())))
    keep = np.unique(np.linspace(0, length - 1, min(length, _MAX_POINTS)).round().astype(int))
    return {name: values[keep] for name, values in columns.items()}
