"""What the large-batch experiment shows: the best of each sweep, a table and the picture."""

import io
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from crescendo.experiments.papers.large_batch.recipes import TASKS, Workload
from crescendo.experiments.reports import plots

# How much quality a larger batch may cost, relative to the smallest one.
TOLERANCE = 0.01


def summarize(records: Sequence[dict[str, Any]], task: Workload, fixed: dict[str, Any]) -> dict[str, Any]:
    """The results: for each optimizer and batch size the learning rate that validation chose, and its test quality.

    Args:
      records: of the finished cells.
      task: theirs.
      fixed: the run's settings.

    Returns:
      `task`, `settings`, `points` and `kept_to`. A point, one for each optimizer and batch size, holds `multiplier`,
      whether it is `at_edge` of the sweep, `learning_rate`, `steps`, the means over the seeds `accuracy`, `loss` and
      `train_loss`, and `accuracies` of each seed. `kept_to` is for each optimizer the largest batch size up to which
      no accuracy is more than 1% (relative) below that of its smallest batch.
    """
    by_point: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        by_point.setdefault((record["optimizer"], record["batch_size"]), []).append(record)
    points = []
    for (optimizer, batch_size), cells in by_point.items():
        by_multiplier = zip(*(cell["runs"] for cell in cells), strict=True)
        best = max(by_multiplier, key=lambda runs: _mean(runs, "validation_accuracy", if_diverged=-1.0))
        points.append(
            {
                "optimizer": optimizer,
                "batch_size": batch_size,
                "multiplier": best[0]["multiplier"],
                "at_edge": best[0]["multiplier"] in (min(fixed["multipliers"]), max(fixed["multipliers"])),
                "learning_rate": best[0]["learning_rate"],
                "steps": cells[0]["steps"],
                "accuracy": _mean(best, "test_accuracy"),
                "loss": _mean(best, "test_loss"),
                "train_loss": _mean(best, "train_loss"),
                "accuracies": [run["test_accuracy"] for run in best],
                "seconds": round(sum(cell["seconds"] for cell in cells), 3),
            }
        )
    order = {name: i for i, name in enumerate(task.recipes)}
    points.sort(key=lambda point: (order[point["optimizer"]], point["batch_size"]))
    kept_to = {
        name: kept_batch_size({point["batch_size"]: point["accuracy"] for point in of_name})
        for name, of_name in itertools.groupby(points, key=lambda point: point["optimizer"])
    }
    return {"task": task.name, "settings": fixed, "points": points, "kept_to": kept_to}


def kept_batch_size(accuracies: dict[int, float | None]) -> int | None:
    """The largest batch up to which accuracy stays within 1% (relative) of the smallest batch's.

    >>> kept_batch_size({32: 0.90, 128: 0.905, 512: 0.892, 2048: 0.85})
    512
    """
    largest, (first, *_) = None, [accuracies[size] for size in sorted(accuracies)]
    for size in sorted(accuracies):
        accuracy = accuracies[size]
        if first is None or accuracy is None or accuracy < (1 - TOLERANCE) * first:
            break
        largest = size
    return largest


def _mean(runs: Sequence[dict[str, Any]], name: str, *, if_diverged: float | None = None) -> Any:
    """Over the seeds; `if_diverged` where one of them has no number."""
    values = [run[name] for run in runs]
    return if_diverged if None in values else statistics.mean(values)


def table(summary: dict[str, Any]) -> Table:
    """Test accuracy, with the multiplier that validation chose, for each optimizer and batch size."""
    sizes = sorted({point["batch_size"] for point in summary["points"]})
    task = TASKS[summary["task"]]
    result = Table(
        "optimizer",
        title=f"{task.title}: test accuracy per {task.unit} (and the learning rate's multiplier)",
        caption="! the learning rate chosen lies at the edge of the sweep: a wider one may do better",
        title_justify="left",
        caption_justify="left",
    )
    for size in sizes:
        result.add_column(f"{size:,}", justify="right")
    result.add_column(f"within {TOLERANCE:.0%} to", justify="right")
    for name, points in itertools.groupby(summary["points"], key=lambda point: point["optimizer"]):
        cells = {point["batch_size"]: point for point in points}
        shown = [
            "-" if (point := cells.get(size)) is None
            else "diverged" if point["accuracy"] is None
            else f"{point['accuracy']:.2%} ({point['multiplier']:g}{'!' if point['at_edge'] else ''})"
            for size in sizes
        ]  # fmt: skip
        largest = summary["kept_to"][name]
        result.add_row(name, *shown, "-" if largest is None else f"{largest:,}")
    return result


def draw(summary: dict[str, Any]) -> bytes:
    """Accuracy and loss on the test split against batch size, a line for each optimizer, as a PNG."""
    task, points = TASKS[summary["task"]], summary["points"]
    epochs = summary["settings"]["total_examples"] / summary["settings"]["train_examples"]
    picture = io.BytesIO()
    with matplotlib.rc_context(plots.style("light")):
        figure = Figure(figsize=(9.0, 3.9), layout="constrained")
        for axes, name, label in zip(
            figure.subplots(1, 2),
            ("accuracy", "loss"),
            ("test accuracy", f"test loss (nats per {task.unit})"),
            strict=True,
        ):
            for i, (optimizer, of_name) in enumerate(itertools.groupby(points, key=lambda point: point["optimizer"])):
                curve = [point for point in of_name if point[name] is not None]
                style = {"color": plots.COLORS["light"][i], "marker": plots.MARKERS[i], "label": optimizer}
                axes.plot([p["batch_size"] for p in curve], [p[name] for p in curve], markersize=5, **style)
            axes.set_xscale("log", base=2)
            sizes = sorted({point["batch_size"] for point in points})
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.minorticks_off()
            axes.set_xlabel("batch size (examples)")
            axes.set_ylabel(label)
        axes.legend(frameon=False)
        figure.suptitle(f"{task.title}, {epochs:g} epochs at every batch size", x=0.02, ha="left")
        figure.savefig(picture, format="png", dpi=160)
    return picture.getvalue()
