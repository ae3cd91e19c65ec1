"""Draw schedules: `python -m crescendo.optim.plot NAME... [--output schedules.png]`.

A NAME is a schedule's, with arguments after a colon if need be: `wsd:shape=sqrt,decay=300`. No name: all that need no
more than a peak and a length.
"""

import argparse
import ast
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import optax

from crescendo.optim import SCHEDULES

# What a schedule needs to be drawn besides the peak and the length.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "power": {"batch_size": 128, "tokens_per_count": 1e7},
    "infinite": {"cooldown": 300},
}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(
        prog="python -m crescendo.optim.plot",
        description="Draw schedules as a PNG.",
        epilog="example: python -m crescendo.optim.plot linear wsd:decay=300 rex --output curves.png",
    )
    result.add_argument("names", nargs="*", metavar="NAME[:KEY=VALUE,...]", help=f"of {', '.join(SCHEDULES)}")
    result.add_argument("--peak", type=float, default=0.02, help="the highest rate (default %(default)s)")
    result.add_argument("--total", type=float, default=1000, help="the schedules' length (default %(default)s)")
    result.add_argument("--warmup", type=float, default=50, help="the warmup's length (default %(default)s)")
    result.add_argument("--output", type=Path, default=Path("schedules.png"), help="default %(default)s")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    options = parser().parse_args(arguments)
    names = options.names or [name for name in SCHEDULES if _is_complete(name)]
    try:
        curves = {name: parse(name, options.peak, options.total, options.warmup) for name in names}
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    draw(curves, options.total).savefig(options.output, dpi=150)
    print(options.output)


def parse(text: str, peak: float, total: float, warmup: float) -> optax.Schedule:
    """The schedule that `NAME:KEY=VALUE,...` means.

    Raises:
      ValueError: an unknown name, or arguments that aren't KEY=VALUE.
      TypeError: an argument that the schedule doesn't take.

    >>> float(parse("wsd:shape=sqrt,decay=50", 1.0, 100, 0)(50))
    1.0
    """
    name, _, assignments = text.partition(":")
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: use one of {', '.join(SCHEDULES)}")
    given: dict[str, Any] = {"warmup": warmup} | _ARGUMENTS.get(name, {})
    for assignment in filter(None, assignments.split(",")):
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} in {text!r} is not KEY=VALUE")
        given[key] = _literal(value)
    return SCHEDULES[name](peak, total, **given)


def _is_complete(name: str) -> bool:
    """Whether a schedule needs nothing that isn't known here, such as a file."""
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty}
    return needed <= {"peak", "total", *_ARGUMENTS.get(name, {})}


def draw(curves: dict[str, optax.Schedule], total: float) -> matplotlib.figure.Figure:
    """All curves over counts from 0 to `total`, in one figure."""
    counts = np.linspace(0, total, 1001)
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, schedule in curves.items():
        axes.plot(counts, np.asarray(schedule(counts)), label=name)
    axes.set(xlabel="count (examples, steps or tokens)", ylabel="learning rate", xlim=(0, total))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _literal(text: str) -> object:
    """A number or other literal; what isn't one is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
