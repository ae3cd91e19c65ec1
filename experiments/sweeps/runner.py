"""Runs the points of a sweep.

Each is a run of the training command, in a process and a folder of its own: one that fails takes nothing with it.
"""

import contextlib
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs import own_modules
from crescendo.experiments.reports.write import Points, write_report
from crescendo.experiments.runs import kinds
from crescendo.experiments.runs.records import read_records
from crescendo.experiments.runs.run import is_complete
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import replace_json
from crescendo.experiments.runtime.interruption import Interrupted, Interruption
from crescendo.experiments.runtime.text import duration
from crescendo.experiments.sweeps import plots as sweep_plots
from crescendo.experiments.sweeps.launchers import Launcher, Process
from crescendo.experiments.sweeps.points import Point
from crescendo.experiments.trainer.training import train

_POLL_SECONDS = 0.2
_SHOWN = 20
_ENDED = ("done", "pruned", "failed")
# The codes of a run that a signal stopped, with or without time to save.
_INTERRUPTED = [code for number in (signal.SIGINT, signal.SIGTERM) for code in (128 + number, -number)]


class Job(NamedTuple):
    """A point whose process runs."""

    point: Point
    process: Process
    slot: str | None


def command(
    point: Point, folder: Path, configs: Sequence[str], bindings: Sequence[str], modules: Sequence[str] = ()
) -> list[str]:
    """The training command of a point, with those of the bindings that its run uses: it refuses others."""
    unused = configurables.unused(train, configs, bindings, point.bindings)
    bindings = [binding for binding in bindings if binding not in unused]
    parts = [sys.executable, "-m", "crescendo.experiments.train", "--run", str(folder / point.name)]
    parts += [part for module in modules for part in ("--module", module)]
    parts += ["--allow-imports"] if own_modules.ANY_IMPORTS else []
    parts += [part for config in configs for part in ("--config", config)]
    return parts + [part for binding in (*bindings, *point.bindings) for part in ("--set", binding)]


def losses(run: Path) -> list[tuple[int, float]]:
    """The validation losses of a run so far, with the examples seen."""
    path = run / "metrics.jsonl"
    records = kinds.of_kind(read_records(path), "validation", path)
    return [(record["examples_seen"], finite_loss(record["loss"])) for record in records]


def finite_loss(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf


class Outcomes:
    """What became of the points, by name: `sweep.json` in the sweep's folder, and the table on the screen."""

    def __init__(self, folder: Path, total: int = 0):
        self.folder, self.total = folder, total
        self.ended = 0  # before this session
        self.rows: dict[str, dict[str, Any]] = {}

    def put(self, point: Point, status: str, why: str = "") -> None:
        """Records a point's status: waiting, running, done, pruned, failed (and why), interrupted."""
        path = self.folder / point.name / "metrics.jsonl"
        records = read_records(path)
        seen = [finite_loss(record["loss"]) for record in kinds.of_kind(records, "validation", path)]
        times = [record["wall_seconds"] for record in kinds.of_kind(records, "time", path)]
        self.rows[point.name] = {
            "status": status,
            "values": point.values,
            "loss": seen[-1] if seen and math.isfinite(seen[-1]) else None,
            "seconds": times[-1] if times else None,
            **({"why": why} if why else {}),
        }

    def said(self, point: Point, seconds: float) -> str:
        """A point in a line: how many have ended, its status, loss and values, and how long the others will take."""
        row = self.rows[point.name]
        ended = sum(row["status"] in _ENDED for row in self.rows.values())
        parts = [
            f"{ended}/{self.total}  {_status(row)}",
            "" if row["loss"] is None else f"loss {row['loss']:.4f}",
            "" if row["seconds"] is None or row["status"] == "running" else f"in {duration(row['seconds'])}",
            _values(row) or point.name,
            self._left(seconds),
        ]
        return "  ".join(filter(None, parts))

    def _left(self, seconds: float) -> str:
        """How long the points that haven't ended will take, by those that ended in `seconds`; nothing where unknown."""
        ended = sum(row["status"] in _ENDED for row in self.rows.values())
        if not seconds or not self.ended < ended < self.total:
            return ""
        return f"about {duration(seconds / (ended - self.ended) * (self.total - ended))} left"

    def save(self) -> None:
        """Writes the file."""
        replace_json(self.folder / "sweep.json", self.rows)

    def ranked(self) -> list[tuple[str, dict[str, Any]]]:
        """The finished points with a finite loss, best first."""
        done = [(name, row) for name, row in self.rows.items() if row["status"] == "done" and row["loss"] is not None]
        return sorted(done, key=lambda entry: entry[1]["loss"])

    def points(self) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
        """For the report: the values' names, and of each point its loss, status and values; the best first."""
        ranked = [row for _, row in self.ranked()]
        rows = ranked + [row for row in self.rows.values() if row not in ranked]
        names = list(dict.fromkeys(name for row in rows for name in row["values"]))
        loss = lambda row: "–" if row["loss"] is None else f"{row['loss']:.4f}"  # noqa: E731
        return names, [(loss(row), _status(row), [row["values"].get(name, "–") for name in names]) for row in rows]

    def table(self, seconds: float = 0.0) -> Table:
        """The best and the unfinished points, and a line that counts all."""
        counts: dict[str, int] = {}
        for row in self.rows.values():
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        shown = [f"{count} {status}" for status, count in counts.items()]
        shown += [duration(seconds)] if seconds else []
        title = ", ".join(filter(None, [*shown, self._left(seconds)]))
        table = Table(title=Text(title), title_justify="left", box=None, header_style="bold")
        for heading in ("point", "status", "val loss"):
            table.add_column(heading, overflow="fold")
        table.add_column("seconds", justify="right")
        first = ("running", "failed", "interrupted", "done", "pruned", "waiting")
        order = sorted(self.rows.values(), key=lambda row: (first.index(row["status"]), finite_loss(row["loss"])))
        for row in order[:_SHOWN]:
            loss = "–" if row["loss"] is None else f"{row['loss']:.4f}"
            took = "–" if row["seconds"] is None else f"{row['seconds']:,.1f}"
            table.add_row(Text(_values(row)), Text(_status(row)), loss, took)
        if len(order) > _SHOWN:
            table.add_row(f"and {len(order) - _SHOWN} more")
        return table


def _values(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in row["values"].items())


def _status(row: Mapping[str, Any]) -> str:
    return row["status"] + (f": {row['why']}" if row.get("why") else "")


@contextlib.contextmanager
def _ended(running: Sequence[Job]) -> Iterator[None]:
    """What still runs at its end, as where nobody reads a pipe that the sweep writes to, saves and ends with it."""
    try:
        yield
    finally:
        for job in running:
            job.process.terminate()


def run_points(
    folder: Path,
    draw: Callable[[], Point | None],
    finish: Callable[[Point, str, float], None],
    prune: Callable[[Point], bool],
    outcomes: Outcomes,
    *,
    configs: Sequence[str],
    bindings: Sequence[str],
    launcher: Launcher,
    console: Console,
    modules: Sequence[str] = (),
) -> None:
    """Runs what `draw` gives until it gives None, as many at once as the launcher has slots.

    Args:
      folder: of the sweep; each point gets a run folder in it and its output in `NAME.log`.
      draw: the next point.
      finish: told of each point's end: its status and its last validation loss.
      prune: asked again and again whether a running point is to be given up.
      outcomes: the record of all points.
      configs: gin files.
      bindings: gin statements of every point.
      launcher: where the runs execute.
      console: for the live table; where it is no terminal, a line at the beginning and the end of each point.
      modules: of the user's own.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM, when the running points have saved.
    """
    free = list(launcher.slots)
    running: list[Job] = []
    pruned: set[str] = set()
    begin, more = time.monotonic(), True

    def say(point: Point) -> None:
        if not console.is_terminal:
            line = outcomes.said(point, time.monotonic() - begin)
            console.print(line, highlight=False, soft_wrap=True)

    with (
        _ended(running),
        Interruption() as interruption,
        Live(console=console, refresh_per_second=2, transient=True) as live,
    ):
        stopped = False
        while more or running:
            while more and free and not interruption.requested:
                point = draw()
                more = point is not None
                if point is None:
                    break
                if is_complete(folder / point.name):
                    outcomes.put(point, "done")
                    outcomes.ended += 1
                    say(point)
                    finish(point, "done", losses(folder / point.name)[-1][1])
                    continue
                slot = free.pop()
                start = command(point, folder, configs, bindings, modules)
                process = launcher.start(start, folder / f"{point.name}.log", slot)
                running.append(Job(point, process, slot))
                outcomes.put(point, "running")
                outcomes.save()
                say(point)
            if interruption.requested and not stopped:
                stopped, more = True, False
                for job in running:
                    job.process.terminate()
            for job in list(running):
                code = job.process.poll()
                if code is None:
                    outcomes.put(job.point, "running")
                    if job.point.name not in pruned and not stopped and prune(job.point):
                        pruned.add(job.point.name)
                        job.process.terminate()
                    continue
                running.remove(job)
                free.append(job.slot)
                name = job.point.name
                seen = losses(folder / name)
                why = ""
                if is_complete(folder / name):
                    status = "done"
                elif name in pruned:
                    status = "pruned"
                elif stopped or code in _INTERRUPTED:
                    status = "interrupted"
                else:
                    status, why = "failed", f"exit code {code}: {_last_line(folder / f'{name}.log')}"
                outcomes.put(job.point, status, why)
                outcomes.save()
                say(job.point)
                finish(job.point, status, seen[-1][1] if seen else math.inf)
            live.update(outcomes.table(time.monotonic() - begin))
            if running:
                time.sleep(_POLL_SECONDS)
    outcomes.save()
    if interruption.requested:
        raise Interrupted(
            f"{interruption.requested}: the sweep in {folder} stopped; the same command goes on", interruption.requested
        )


def _last_line(log: Path) -> str:
    """The last line that a process wrote, for the table."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no output"


def slurm_script(
    points: Sequence[Point],
    folder: Path,
    configs: Sequence[str],
    bindings: Sequence[str],
    modules: Sequence[str],
    report: Sequence[str],
) -> str:
    """A SLURM array script with a task for each point; resources are the reader's to fill in.

    Args:
      points: of the sweep.
      folder: of the sweep.
      configs: gin files.
      bindings: gin statements of every point.
      modules: of the user's own.
      report: the command that makes the report when the tasks have ended.
    """
    lines = [
        "#!/bin/bash",
        f"#SBATCH --array=0-{len(points) - 1}",
        f"#SBATCH --output={shlex.quote(str(folder))}/slurm-%A_%a.log",
        "#SBATCH --requeue",
        "# Add the partition, the time and the GPUs of one run. A task that is started again goes on where it stopped.",
        "# When the tasks have ended, the table and the report of what has finished:",
        f"#   {shlex.join(report)}",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for i, point in enumerate(points):
        lines.append(f"{i}) exec {shlex.join(command(point, folder, configs, bindings, modules))} ;;")
    return "\n".join([*lines, "esac", ""])


def finish_sweep(folder: Path, outcomes: Outcomes, console: Console, best: int = 6) -> None:
    """Prints the table, writes the report of the best runs and the plots over all points."""
    outcomes.save()
    ranked = outcomes.ranked()
    console.print(outcomes.table())
    if not ranked:
        raise UserError(f"no point of {folder} has finished with a finite loss: see the .log files there")
    points = Points(*outcomes.points(), figures=sweep_plots.figures([row for _, row in ranked]))
    runs = [folder / name for name, _ in ranked[:best]]
    page = write_report(runs, folder / "report", title="A sweep and its best runs", sweep=points)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
