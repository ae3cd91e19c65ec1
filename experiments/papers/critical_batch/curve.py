"""From the losses of branches to a curve of critical batch sizes, its file and its picture.

The rule (Merrill et al., 2025, https://arxiv.org/abs/2505.23971): branches that leave one checkpoint with k times its
batch end at losses L_k after the same tokens; k* is the largest k whose loss lies within a tolerance of that of every
smaller k. The critical batch size is between k* B and the next k B.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from crescendo.experiments.reports import charts, plots
from crescendo.experiments.runtime.text import compact

_NOISE_LABELS = ("gradient noise scale", "noise scale of the norm layers")


class CriticalBatch(NamedTuple):
    """What the branches at one point say, in examples.

    Attributes:
      value: the geometric mean of the interval; its lower end where nothing bounds it from above.
      low: k* B.
      high: the next k times B; None where k* is the largest branch.
    """

    value: float
    low: float
    high: float | None


def smoothed_loss(losses: Sequence[float], alpha: float = 0.5) -> float:
    """The exponential moving average of a branch's evaluations, at its end; NaN where one isn't finite.

    >>> smoothed_loss([4.0, 2.0, 1.0])
    2.0
    """
    average = losses[0]
    for loss in losses[1:]:
        average = (1 - alpha) * average + alpha * loss
    return average


def critical_factor(losses: Mapping[int, float], tolerance: float) -> int:
    """k*: the largest k with `L_k <= L_j + tolerance` for every j < k.

    Args:
      losses: by k; a loss that isn't finite is past every tolerance.
      tolerance: in nats.

    >>> critical_factor({1: 2.00, 2: 1.99, 4: 1.995, 8: 2.10}, tolerance=0.01)
    4
    """
    lowest, largest = math.inf, min(losses)
    for k in sorted(losses):
        if losses[k] <= lowest + tolerance:
            largest = k
        lowest = min(lowest, losses[k])
    return largest


def critical_batch_at(losses: Mapping[int, float], batch_size: int, tolerance: float) -> CriticalBatch:
    """The interval of the critical batch size from one checkpoint's branches.

    >>> critical_batch_at({1: 2.0, 2: 2.0, 4: 2.1}, batch_size=8, tolerance=0.01)
    CriticalBatch(value=22.627416997969522, low=16.0, high=32.0)
    """
    k = critical_factor(losses, tolerance)
    larger = [j for j in sorted(losses) if j > k]
    low = float(k * batch_size)
    if not larger:
        return CriticalBatch(low, low, None)
    high = float(larger[0] * batch_size)
    return CriticalBatch(math.sqrt(low * high), low, high)


def over_seeds(intervals: Sequence[CriticalBatch]) -> CriticalBatch:
    """The geometric mean of the seeds' values, and the interval that holds all of theirs.

    >>> mean = over_seeds([CriticalBatch(4.0, 2.0, 8.0), CriticalBatch(16.0, 16.0, None)])
    >>> round(mean.value, 6), mean.low, mean.high
    (8.0, 2.0, None)
    """
    highs = [each.high for each in intervals]
    return CriticalBatch(
        value=math.exp(sum(math.log(each.value) for each in intervals) / len(intervals)),
        low=min(each.low for each in intervals),
        high=None if None in highs else max(high for high in highs if high is not None),
    )


def make_curve(branches: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `critical_batch.json`, which `critical_batch_following` reads, from the branches' records.

    Args:
      branches: each with `examples` (the checkpoint's clock), `seed`, `factor` (k) and `losses` (its evaluations).
      settings: with `batch_size`, `sequence_length`, `tolerance`, `fingerprint` and what else is to be recorded.

    Returns:
      `tokens`, `critical_batch_size`, `interval`, each one value a point; `fingerprint`; `settings`; and `points`, with
      the smoothed losses of every seed by factor. Points whose branches aren't all there are left out.
    """
    curve: dict[str, Any] = {"tokens": [], "critical_batch_size": [], "interval": []}
    points = []
    for examples in sorted({branch["examples"] for branch in branches}):
        here = [branch for branch in branches if branch["examples"] == examples]
        by_seed: dict[int, dict[int, float]] = {}
        for branch in here:
            loss = smoothed_loss([math.nan if loss is None else loss for loss in branch["losses"]])
            by_seed.setdefault(branch["seed"], {})[branch["factor"]] = loss
        if len(here) < len(settings["factors"]) * settings["seeds"]:
            continue
        intervals = [
            critical_batch_at(losses, settings["batch_size"], settings["tolerance"]) for losses in by_seed.values()
        ]
        overall = over_seeds(intervals)
        curve["tokens"].append(examples * settings["sequence_length"])
        curve["critical_batch_size"].append(overall.value)
        curve["interval"].append([overall.low, overall.high])
        points.append(
            {
                "examples": examples,
                "by_seed": [
                    {"seed": seed, **each._asdict(), "losses": {str(k): losses[k] for k in sorted(losses)}}
                    for (seed, losses), each in zip(by_seed.items(), intervals, strict=True)
                ],
            }
        )
    return {**curve, "fingerprint": settings["fingerprint"], "settings": dict(settings), "points": points}


def draw(curve: Mapping[str, Any], runs: Sequence[Any]) -> bytes:
    """The critical batch size against tokens, with its intervals and both noise scales of the base runs, as a PNG.

    Args:
      curve: as `make_curve` makes it.
      runs: the base runs (`runs.run.Run`).
    """
    settings = curve["settings"]
    picture = io.BytesIO()
    colors = plots.COLORS["light"]
    with matplotlib.rc_context(plots.style("light")):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for color, name, label in zip(colors[1:], charts.NOISE_COLUMNS, _NOISE_LABELS, strict=False):
            for i, run in enumerate(runs):
                if name not in run.train:
                    continue
                noise = charts.averaged(run, name)
                axes.plot(run.train["units_seen"], noise, color=color, linewidth=1.2, label=None if i else label)
        tokens, values = np.array(curve["tokens"]), np.array(curve["critical_batch_size"])
        top = max(settings["factors"]) * settings["batch_size"]
        lows = np.array([low for low, _ in curve["interval"]])
        highs = np.array([top if high is None else high for _, high in curve["interval"]])
        axes.errorbar(
            tokens,
            values,
            yerr=[values - lows, np.maximum(highs - values, 0)],
            color=colors[0],
            marker="o",
            capsize=3,
            label="critical batch size, by branching",
        )
        unbounded = np.array([high is None for _, high in curve["interval"]], bool)
        axes.plot(tokens[unbounded], values[unbounded] * 1.12, color=colors[0], marker="^", linestyle="none")
        axes.axhline(settings["batch_size"], color=plots.INK["light"][1], linewidth=0.8, linestyle=":")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: compact(value))
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"batch size (rows of {settings['sequence_length']} tokens)")
        axes.legend(frameon=False)
        axes.set_title(f"dotted: the runs' own batch of {settings['batch_size']}", fontsize=9.5, loc="left")
        figure.savefig(picture, format="png", dpi=160)
    return picture.getvalue()
