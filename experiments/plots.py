"""The report's charts, each drawn for a light and a dark page.

Colours follow Okabe and Ito's colour-blind-safe palette (lightened on a dark page); every arm has a marker of its own
too, so that no reader depends on colour.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from crescendo.experiments.metrics import Columns, Run
from crescendo.experiments.progress import RunningMean, compact

Arms = Sequence[tuple[str, Sequence[Run]]]

COLORS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#AA3C82", "#B77F00", "#2A8FC7"),
    "dark": ("#56B4E9", "#FF8A3D", "#2FC89B", "#E59BC9", "#F0B93A", "#A9D6F5"),
}
MARKERS = "os^DvPX"
INK = {"light": ("#1c2430", "#5b6675", "#dfe3e8"), "dark": ("#e8ecf1", "#9aa5b4", "#333b46")}
_MAX_POINTS = 800
NOISE_COLUMNS = ("noise_scale", "norm_layers_noise_scale")
TRUST_COLUMNS = ("trust_ratio_median", "trust_ratio_min", "trust_ratio_max")


class Chart(NamedTuple):
    """A chart: the name of its file, its title, and what draws it, `draw(axes, arms, colors)`.

    `columns` are those of the training records that it shows: where no run has any of them, it is left out.
    """

    name: str
    title: str
    draw: Callable[[Axes, Arms, Sequence[str]], None]
    columns: tuple[str, ...] = ("loss",)


def render(chart: Chart, arms: Arms, *, theme: str, file_format: str) -> bytes:
    """The chart as a picture on a transparent (SVG) or plain (PNG) ground.

    Args:
      chart: one of `CHARTS`.
      arms: names and the runs behind each, in the order of the colours.
      theme: `light` or `dark`.
      file_format: `svg` or `png`.
    """
    colors = [COLORS[theme][i % len(COLORS[theme])] for i in range(len(arms))]
    picture = io.BytesIO()
    with matplotlib.rc_context(style(theme)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that no font has is drawn as a box
        figure = Figure(figsize=(4.8, 3.3), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
        axes = figure.subplots()
        chart.draw(axes, arms, colors)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        axes.set_xlim(left=0)
        _legend(figure, arms, colors)
        metadata = {"Date": None} if file_format == "svg" else None
        figure.savefig(picture, format=file_format, dpi=200, transparent=file_format == "svg", metadata=metadata)
    return picture.getvalue()


def interactive(chart: Chart, arms: Arms) -> dict[str, Any]:
    """The chart's curves as they are drawn, for a script to draw: `traces` and `axes`, in JSON's own types.

    Args:
      chart: one of `CHARTS`.
      arms: names and the runs behind each.
    """
    figure = Figure()
    axes = figure.subplots()
    marks = [f"#{index:06x}" for index in range(len(arms))]  # not colours: whose curve it is
    chart.draw(axes, arms, marks)
    traces = [
        {
            "arm": marks.index(str(line.get_color())),
            "x": _numbers(line.get_xdata()),
            "y": _numbers(line.get_ydata()),
            "width": float(line.get_linewidth()),
            "opacity": float(line.get_alpha() or 1.0),
            "dash": "dot" if line.get_linestyle() == ":" else "solid",
            "markers": line.get_marker() not in ("", "None", None),
            "steps": False,
        }
        for line in axes.lines
    ]
    for stairs in axes.patches:
        values, edges, _ = stairs.get_data()  # type: ignore[attr-defined]
        traces.append(
            {
                "arm": marks.index(to_hex(stairs.get_edgecolor())),
                "x": _numbers(edges),
                "y": _numbers([*values, *values[-1:]]),
                "width": float(stairs.get_linewidth()),
                "opacity": 1.0,
                "dash": "solid",
                "markers": False,
                "steps": True,
            }
        )
    scale, limits = axes.get_yscale(), sorted(axes.get_ylim())
    return {
        "traces": traces,
        "axes": {
            "x": axes.get_xlabel(),
            "y": axes.get_ylabel(),
            "log": scale == "log",
            "limits": [math.log10(x) for x in limits] if scale == "log" else [float(x) for x in limits],
            # Ticks that were chosen one by one, such as the batch sizes of a run.
            "ticks": _numbers(axes.get_yticks()) if isinstance(axes.yaxis.get_major_locator(), FixedLocator) else None,
        },
    }


def _numbers(values: Any) -> list[float | None]:
    """As floats of six digits; JSON knows no NaN."""
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in np.asarray(values, float).tolist()]


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


def _loss_against(x: str, label: str) -> Callable[[Axes, Arms, Sequence[str]], None]:
    """Draws the losses against a column: validation with markers, smoothed training faintly."""

    def draw(axes: Axes, arms: Arms, colors: Sequence[str]) -> None:
        lows, highs = [], []
        for index, run, color in _each(arms, colors):
            train, validation = _thin(run.train | {"loss": averaged(run, "loss")}), run.validation
            marker = "." if len(train[x]) == 1 else ""
            axes.plot(train[x], train["loss"], color=color, alpha=0.4, linewidth=1, marker=marker)
            every = max(1, len(validation[x]) // 10)
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(
                validation[x],
                validation["loss"],
                color=color,
                linewidth=1.6,
                marker=marker,
                markersize=4,
                markevery=every,
            )
            for curve in (train, validation):
                finite = np.isfinite(curve["loss"])
                late = finite & (curve["examples_seen"] >= 0.1 * run.info["total_examples"])
                lows += curve["loss"][finite].tolist()
                highs += curve["loss"][late][:1].tolist()
        # The fall from the untrained loss would hide the differences that matter: it leaves the chart at the top.
        if highs and max(highs) > min(lows):
            margin = 0.05 * (max(highs) - min(lows))
            axes.set_ylim(min(lows) - margin, max(highs) + margin)
        axes.set_xlabel(label)
        axes.set_ylabel("loss (nats per token)")

    return draw


def _batch_size(axes: Axes, arms: Arms, colors: Sequence[str]) -> None:
    """Draws the batch size against tokens as stairs: a step's batch covers the tokens before its record."""
    sizes: set[int] = set()
    for index, run, color in _each(arms, colors):
        batch_size, tokens = run.train["batch_size"], run.train["tokens_seen"]
        if len(tokens) > 1 and batch_size[-1] < batch_size[-2]:
            batch_size, tokens = batch_size[:-1], tokens[:-1]  # the last step takes the examples that are left
        if len(tokens):
            change = np.flatnonzero(np.diff(batch_size)) + 1
            edges = np.concatenate([[0], tokens[change - 1], tokens[-1:]])
            axes.stairs(
                batch_size[np.concatenate([[0], change])], edges, baseline=None, color=color, linewidth=_width(index)
            )
            sizes.update(np.unique(batch_size).tolist())
    axes.set_yscale("log", base=2)
    axes.set_ylabel("batch size (examples)")
    axes.set_xlabel("tokens")
    if 0 < len(sizes) <= 8:
        axes.set_yticks(sorted(sizes))
        axes.set_ylim(min(sizes) / 1.5, max(sizes) * 1.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()


def _learning_rate(axes: Axes, arms: Arms, colors: Sequence[str]) -> None:
    """Draws the learning rate against tokens."""
    for index, run, color in _each(arms, colors):
        train = _thin(run.train)
        marker = "." if len(train["tokens_seen"]) == 1 else ""
        axes.plot(train["tokens_seen"], train["learning_rate"], color=color, linewidth=_width(index), marker=marker)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(_scientific)
    axes.set_xlabel("tokens")
    axes.set_ylabel("learning rate")


def _noise_scale(axes: Axes, arms: Arms, colors: Sequence[str]) -> None:
    """Draws the noise scale, averaged over 2% of the run, against tokens; that of norm layers dotted."""
    for _, run, color in _each(arms, colors):
        for name, line in zip(NOISE_COLUMNS, ("-", ":"), strict=True):
            if name in run.train:
                curve = _thin({"tokens_seen": run.train["tokens_seen"], name: averaged(run, name)})
                axes.plot(curve["tokens_seen"], curve[name], color=color, linewidth=1.6, linestyle=line)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))
    axes.set_xlabel("tokens")
    axes.set_ylabel("noise scale (examples)")


def _throughput(axes: Axes, arms: Arms, colors: Sequence[str]) -> None:
    """Draws the throughput, averaged over 2% of the run, against tokens."""
    for index, run, color in _each(arms, colors):
        curve = _thin(
            {"tokens_seen": run.train["tokens_seen"], "tokens_per_second": averaged(run, "tokens_per_second")}
        )
        axes.plot(curve["tokens_seen"], curve["tokens_per_second"], color=color, linewidth=_width(index))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))
    axes.set_xlabel("tokens")
    axes.set_ylabel("tokens a second")


def _trust_ratios(axes: Axes, arms: Arms, colors: Sequence[str]) -> None:
    """Draws the median of the layers' trust ratios against tokens, and the least and the greatest dotted."""
    for _, run, color in _each(arms, colors):
        for name, line in zip(TRUST_COLUMNS, ("-", ":", ":"), strict=True):
            if name in run.train:
                curve = _thin({"tokens_seen": run.train["tokens_seen"], name: averaged(run, name)})
                axes.plot(curve["tokens_seen"], curve[name], color=color, linewidth=1.6, linestyle=line)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("trust ratio")


def _scientific(value: float, _: float) -> str:
    """A tick's label: 0.00025 is `2.5e-4`."""
    return np.format_float_scientific(float(f"{value:.3g}"), trim="-", exp_digits=1) if value else "0"


CHARTS = (
    Chart("loss_tokens", "Loss against tokens", _loss_against("tokens_seen", "tokens")),
    Chart("loss_steps", "Loss against steps", _loss_against("step", "optimizer steps")),
    Chart("batch_size", "Batch size", _batch_size),
    Chart("learning_rate", "Learning rate", _learning_rate),
    Chart("throughput", "Throughput", _throughput, ("tokens_per_second",)),
    Chart("noise_scale", "Gradient noise scale (dotted: of norm layers)", _noise_scale, NOISE_COLUMNS),
    Chart("trust_ratio", "Trust ratios of layers (dotted: least, greatest)", _trust_ratios, TRUST_COLUMNS),
)


def charts_of(arms: Arms) -> list[Chart]:
    """The charts for which some run has the columns."""
    known = {name for _, runs in arms for run in runs for name in run.train}
    return [chart for chart in CHARTS if known & set(chart.columns)]


def averaged(run: Run, name: str) -> np.ndarray:
    """A training column averaged over the last 2% of the run's examples; NaN until there is a finite value."""
    mean = RunningMean(0.02 * run.info["total_examples"])
    return np.array([mean.add(x, size) for x, size in zip(run.train[name], run.train["batch_size"], strict=True)])


def _each(arms: Arms, colors: Sequence[str]) -> Iterator[tuple[int, Run, str]]:
    """Every run with its arm's index and colour."""
    for index, ((_, runs), color) in enumerate(zip(arms, colors, strict=True)):
        for run in runs:
            yield index, run, color


def _width(index: int) -> float:
    """Thinner from arm to arm, so that curves that lie on each other all show."""
    return max(1.2, 3.2 - 0.8 * index)


def _thin(columns: Columns) -> Columns:
    """At most `_MAX_POINTS` of the records, evenly spaced, with the first and the last."""
    length = len(next(iter(columns.values())))
    keep = np.unique(np.linspace(0, length - 1, min(length, _MAX_POINTS)).round().astype(int))
    return {name: values[keep] for name, values in columns.items()}
