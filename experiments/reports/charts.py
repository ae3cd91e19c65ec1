"""The report's charts: what each shows of a run. The page (`page.py`) and the PNG files (`plots.py`) draw them."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from crescendo.experiments.reports.loads import loads
from crescendo.experiments.runs.records import Columns
from crescendo.experiments.runs.run import Run
from crescendo.experiments.runtime.text import compact, running_means

Arms = Sequence[tuple[str, Sequence[Run]]]

NOISE_COLUMNS = ("noise_scale", "norm_layers_noise_scale")
ROUTER_COLUMNS = ("router_entropy",)
PIECE_COLUMNS = ("piece_length",)
_MAX_POINTS = 800
_NAME = re.compile(r"[A-Za-z][\w-]{0,99}", re.ASCII)  # of a set or a source, after which files are called


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

    `columns` are those of the training records that it needs: where no run has a number in any of them, it is left out.
    `log` is the base of a logarithmic vertical axis; `limits` gives the vertical range of all runs, None for all that
    there is. `format` and `format_x` write the axes' numbers.
    """

    name: str
    title: str
    x: str
    y: str
    curves: Callable[[Run], list[Curve]]
    columns: tuple[str, ...] = ()
    log: int | None = None
    limits: Callable[[Arms], tuple[float, float] | None] = lambda arms: None
    format: Callable[[float], str] = lambda value: f"{value:g}"
    format_x: Callable[[float], str] = compact


def _loss_against(x: str, scale: Callable[[Run], float] = lambda run: 1) -> Callable[[Run], list[Curve]]:
    """The losses against a column times a number: training averaged over 2% of the run, and validation."""

    def curves(run: Run) -> list[Curve]:
        train, validation = _thin(run.train | {"loss": averaged(run, "loss")}), run.validation
        return [
            Curve("training", scale(run) * train[x], train["loss"], "faint"),
            Curve("validation", scale(run) * validation[x], validation["loss"], points=True),
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


def _flops(run: Run) -> float:
    """Of the model, forward and backward, for one of what the run counts; NaN where it isn't recorded."""
    return run.info.get(f"flops_per_{run.unit}", math.nan)


def _gradient_norm(run: Run) -> list[Curve]:
    """The norm of each step, and its average over 2% of the run."""
    columns = _thin({name: run.train[name] for name in ("units_seen", "gradient_norm")})
    mean = _thin({"units_seen": run.train["units_seen"], "mean": averaged(run, "gradient_norm")})
    return [
        Curve("of each step", columns["units_seen"], columns["gradient_norm"], "faint"),
        Curve("averaged", mean["units_seen"], mean["mean"]),
    ]


def _against_tokens(*columns: tuple[str, str, str], mean: bool) -> Callable[[Run], list[Curve]]:
    """Training columns, `(name, label, line)` each, against tokens; averaged over 2% of the run where `mean`."""

    def curves(run: Run) -> list[Curve]:
        available = [each for each in columns if each[0] in run.train]
        every = {name: averaged(run, name) if mean else run.train[name] for name, _, _ in available}
        thin = _thin({"units_seen": run.train["units_seen"], **every})
        return [Curve(label, thin["units_seen"], thin[name], line) for name, label, line in available]

    return curves


def _loads(run: Run) -> list[Curve]:
    """The load of every expert at the last evaluation, layer after layer."""
    found = loads({name: float(x[-1]) for name, x in run.validation.items() if len(x)})
    if found is None:
        return []
    steps = np.append(found.ravel(), found[-1, -1])  # the last one has a width too
    return [Curve("load of each expert", np.arange(len(steps)), steps, stairs=True)]


def _spread_of_loads(run: Run) -> list[Curve]:
    """The least and the largest load at each evaluation, over all experts of all layers."""
    columns, x = run.validation, run.validation["units_seen"]
    every = [loads({name: float(values[i]) for name, values in columns.items()}) for i in range(len(x))]
    extremes = [(math.nan, math.nan) if each is None else (each.min(), each.max()) for each in every]
    if not extremes:
        return []
    least, largest = np.array(extremes).T
    return [Curve("largest", x, largest, points=True), Curve("least", x, least, "dotted", points=True)]


def scientific(value: float) -> str:
    """A tick's label.

    >>> scientific(0.00025)
    '2.5e-4'
    """
    return np.format_float_scientific(float(f"{value:.3g}"), trim="-", exp_digits=1) if value else "0"


def percent(value: float) -> str:
    """A tick's label.

    >>> percent(0.425), percent(0.4)
    ('42.5%', '40%')
    """
    return f"{100 * value:.3g}%"


def batch_sizes(curves: Sequence[Curve]) -> list[float]:
    """The ticks of an axis of batch sizes: those that occur, or eight of them."""
    sizes = sorted({float(size) for curve in curves for size in curve.y if size})
    return sizes[:: -(-len(sizes) // 8) or 1]


def _from_zero(column: str) -> Callable[[Arms], tuple[float, float] | None]:
    """The vertical range from 0 to a little above a column's largest value."""

    def limits(arms: Arms) -> tuple[float, float] | None:
        values = [run.train[column] for _, runs in arms for run in runs if column in run.train]
        top = max((float(each[np.isfinite(each)].max(initial=0.0)) for each in values), default=0.0)
        return (0.0, 1.05 * top) if top > 0 else None

    return limits


_LOSS = "loss (nats per token)"
CHARTS = (
    Chart("loss_tokens", "Loss against tokens", "tokens", _LOSS, _loss_against("units_seen"), limits=loss_limits),
    Chart("loss_steps", "Loss against steps", "optimizer steps", _LOSS, _loss_against("step"), limits=loss_limits),
    Chart(
        *("loss_seconds", "Loss against time", "seconds of training", _LOSS),
        _loss_against("seconds"),
        limits=loss_limits,
    ),
    Chart(
        *("loss_flops", "Loss against compute", "FLOPs of the model", _LOSS),
        _loss_against("units_seen", _flops),
        limits=loss_limits,
        format_x=scientific,
    ),
    Chart("batch_size", "Batch size", "tokens", "batch size (examples)", _batch_size, log=2, format=compact),
    Chart(
        *("learning_rate", "Learning rate", "tokens", "learning rate"),
        _against_tokens(("learning_rate", "learning rate", "solid"), mean=False),
        limits=_from_zero("learning_rate"),
        format=scientific,
    ),
    Chart(
        *("gradient_norm", "Gradient norm (faint: of each step)", "tokens", "gradient norm before clipping"),
        _gradient_norm,
        columns=("gradient_norm",),
        log=10,
    ),
    Chart(
        *("throughput", "Throughput", "tokens", "tokens per second"),
        _against_tokens(("units_per_second", "throughput", "solid"), mean=True),
        limits=_from_zero("units_per_second"),
        format=compact,
    ),
    Chart(
        *("mfu", "Model FLOPs utilisation (MFU)", "tokens", "MFU"),
        _against_tokens(("mfu", "MFU", "solid"), mean=True),
        columns=("mfu",),
        limits=_from_zero("mfu"),
        format=percent,
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
    Chart(
        *("piece_length", "Length of pieces", "tokens", "tokens of a piece, mean of the batch"),
        _against_tokens(("piece_length", "length", "solid"), mean=False),
        columns=PIECE_COLUMNS,
        log=2,
        format=compact,
    ),
    Chart(
        *(
            "expert_load",
            "Load of experts (at the last evaluation)",
            "experts, layer after layer",
            "times an even share",
        ),
        _loads,
        columns=ROUTER_COLUMNS,
    ),
    Chart(
        *("expert_extremes", "Largest load of an expert (dotted: least)", "tokens", "times an even share"),
        _spread_of_loads,
        columns=ROUTER_COLUMNS,
    ),
    Chart(
        *("router_entropy", "Entropy of the router", "tokens", "nats, mean over layers"),
        _against_tokens(("router_entropy", "entropy", "solid"), mean=True),
        columns=ROUTER_COLUMNS,
    ),
    Chart(
        *("dropped_share", "Choices of tokens that found no room", "tokens", "share, mean over layers"),
        _against_tokens(("dropped_share", "dropped", "solid"), mean=True),
        columns=ROUTER_COLUMNS,
        format=percent,
    ),
)


def _named_charts(runs: Sequence[Run]) -> list[Chart]:
    """Those of which there is one for each held-out set beside "validation", and one for each source of a mixture."""
    sets = {name.removesuffix("/loss"): name for run in runs for name in run.validation if name.endswith("/loss")}
    sources = {name.removeprefix("epochs_"): name for run in runs for name in run.train if name.startswith("epochs_")}
    return [
        *(
            Chart(f"loss_on_{of}", f"Loss on {of}", "tokens", _LOSS, functools.partial(_held_out_loss, column))
            for of, column in sets.items()
            if _NAME.fullmatch(of)
        ),
        *(
            Chart(
                *(f"epochs_{of}", f"Passes over {of}", "tokens", "passes"),
                _against_tokens((column, "passes", "solid"), mean=False),
                limits=_from_zero(column),
            )
            for of, column in sources.items()
            if _NAME.fullmatch(of)
        ),
    ]


def _held_out_loss(column: str, run: Run) -> list[Curve]:
    """The loss on a held-out set at each evaluation."""
    validation = run.validation
    return [Curve("loss", validation["units_seen"], validation[column], points=True)] if column in validation else []


def charts_of(arms: Arms) -> list[Chart]:
    """The charts for which some run has the numbers, in the words of what the runs count."""
    every = [run for _, runs in arms for run in runs]
    known = {name for run in every for name, values in run.train.items() if np.isfinite(values).any()}
    return [
        chart._replace(title=in_units(chart.title, every), x=in_units(chart.x, every), y=in_units(chart.y, every))
        for chart in (*CHARTS, *_named_charts(every))
        if not chart.columns or known & set(chart.columns)
    ]


def in_units(text: str, runs: Sequence[Run]) -> str:
    """The text with "token" replaced by what the runs count; by "unit" where they count different things."""
    units = {run.unit for run in runs}
    return text.replace("token", units.pop() if len(units) == 1 else "unit")


def averaged(run: Run, name: str) -> np.ndarray:
    """A training column averaged over the last 2% of the run's examples; NaN until there is a finite value."""
    return running_means(run.train[name], run.train["batch_size"], 0.02 * run.info["total_examples"])


def _thin(columns: Columns) -> Columns:
    """At most `_MAX_POINTS` of the records, evenly spaced, with the first and the last."""
    length = len(next(iter(columns.values())))
    keep = np.unique(np.linspace(0, length - 1, min(length, _MAX_POINTS)).round().astype(int))
    return {name: values[keep] for name, values in columns.items()}
