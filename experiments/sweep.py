"""Sweeps: many runs of `train` with different bindings, resumable: `python -m crescendo.experiments.sweep`.

Every point is a run of the training command in a process and a folder of its own, so that one that fails takes nothing
with it. Grids, zips and chains are enumerated; searches are Optuna studies (TPE; the median pruner reads the validation
losses) kept in the sweep's folder.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.report import Points, write_report
from crescendo.experiments.runs.records import file_access, is_complete, read_records, replace_file
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import Interrupted, Interruption
from crescendo.experiments.sweeps import plots as sweep_plots
from crescendo.experiments.sweeps.launchers import Launcher, Local, Process, Ray
from crescendo.experiments.sweeps.points import Point, axis, enumerate_points, spaces, zipped
from crescendo.experiments.trainer.progress import duration

EXAMPLES = """examples:
  python -m crescendo.experiments.sweep --grid 'LEARNING_RATE = [1e-3, 3e-3]' --grid 'train.batch_size = [8, 32]'
  python -m crescendo.experiments.sweep --zip 'LEARNING_RATE = [1e-3, 2e-3]; train.batch_size = [8, 32]' --jobs 2
  python -m crescendo.experiments.sweep --grid 'LEARNING_RATE = [1e-3]' --chain --grid 'train.seed = [1, 2]'
  python -m crescendo.experiments.sweep --search 'LEARNING_RATE = log(1e-4, 1e-2)' --trials 20
  python -m crescendo.experiments.sweep --grid 'LEARNING_RATE = [1e-3, 3e-3]' --launcher slurm > sweep.sh
  RAY_ADDRESS=HOST:6379 python -m crescendo.experiments.sweep --search 'LEARNING_RATE = log(1e-4, 1e-2)' \\
    --trials 64 --jobs 16 --launcher ray

The same command goes on where it was interrupted: a finished point is never run again, a failed one is tried anew."""

_POLL_SECONDS = 0.2
_SHOWN = 20
_ENDED = ("done", "pruned", "failed")


class Job(NamedTuple):
    """A point whose process runs."""

    point: Point
    process: Process
    slot: str | None
    started: float


def command(point: Point, folder: Path, configs: Sequence[str], bindings: Sequence[str]) -> list[str]:
    """The training command of a point."""
    parts = [sys.executable, "-m", "crescendo.experiments.train", "--run", str(folder / point.name)]
    parts += [part for config in configs for part in ("--config", config)]
    return parts + [part for binding in (*bindings, *point.bindings) for part in ("--set", binding)]


def losses(run: Path) -> list[tuple[int, float]]:
    """The validation losses of a run so far, with the examples seen."""
    records = [record for record in read_records(run / "metrics.jsonl") if record["kind"] == "validation"]
    return [(record["examples_seen"], _finite(record["loss"])) for record in records]


def _finite(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf


class Outcomes:
    """What became of the points, by name: `sweep.json` in the sweep's folder, and the table on the screen."""

    def __init__(self, folder: Path, total: int = 0):
        self.folder, self.total = folder, total
        self.ended = 0  # before this session
        self.rows: dict[str, dict[str, Any]] = {}

    def put(self, point: Point, status: str, **more: Any) -> None:
        """Records a point's status: waiting, running, done, pruned, failed, interrupted."""
        seen = losses(self.folder / point.name)
        self.rows[point.name] = {
            "status": status,
            "values": point.values,
            "loss": seen[-1][1] if seen and math.isfinite(seen[-1][1]) else None,
            **more,
        }

    def save(self) -> None:
        """Writes the file."""
        with file_access("write", self.folder):
            replace_file(self.folder / "sweep.json", (json.dumps(self.rows, indent=2) + "\n").encode())

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
        why = lambda row: f": {row['why']}" if row.get("why") else ""  # noqa: E731
        return names, [
            (loss(row), row["status"] + why(row), [row["values"].get(name, "–") for name in names]) for row in rows
        ]

    def table(self, seconds: float = 0.0) -> Table:
        """The best and the unfinished points, and a line that counts all."""
        counts: dict[str, int] = {}
        for row in self.rows.values():
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        title = ", ".join(f"{count} {status}" for status, count in counts.items()) + f", {duration(seconds)}"
        ended = sum(counts.get(status, 0) for status in _ENDED)
        if seconds and self.ended < ended < self.total:
            left = seconds / (ended - self.ended) * (self.total - ended)
            title += f", about {duration(left)} left"
        table = Table(title=Text(title), title_justify="left", box=None, header_style="bold")
        for heading in ("point", "status", "val loss"):
            table.add_column(heading, overflow="fold")
        first = ("running", "failed", "interrupted", "done", "pruned", "waiting")
        order = sorted(self.rows.values(), key=lambda row: (first.index(row["status"]), _finite(row["loss"])))
        for row in order[:_SHOWN]:
            values = ", ".join(f"{name} = {value}" for name, value in row["values"].items())
            status = row["status"] + (f": {row['why']}" if row.get("why") else "")
            table.add_row(Text(values), Text(status), "–" if row["loss"] is None else f"{row['loss']:.4f}")
        if len(order) > _SHOWN:
            table.add_row(f"and {len(order) - _SHOWN} more", "", "")
        return table


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
      console: for the live table.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM, when the running points have saved.
    """
    free = list(launcher.slots)
    running: list[Job] = []
    pruned: set[str] = set()
    begin, more = time.monotonic(), True
    with Interruption() as interruption, Live(console=console, refresh_per_second=2, transient=True) as live:
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
                    finish(point, "done", losses(folder / point.name)[-1][1])
                    continue
                slot = free.pop()
                start = command(point, folder, configs, bindings)
                process = launcher.start(start, folder / f"{point.name}.log", slot)
                running.append(Job(point, process, slot, time.monotonic()))
                outcomes.put(point, "running")
                outcomes.save()
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
                elif code == 0 or stopped:
                    status = "interrupted"
                else:
                    status, why = "failed", f"exit code {code}: {_last_line(folder / f'{name}.log')}"
                outcomes.put(job.point, status, seconds=time.monotonic() - job.started, why=why)
                outcomes.save()
                finish(job.point, status, seen[-1][1] if seen else math.inf)
            live.update(outcomes.table(time.monotonic() - begin))
            if running:
                time.sleep(_POLL_SECONDS)
    outcomes.save()
    if interruption.requested:
        raise Interrupted(f"{interruption.requested}: the sweep in {folder} stopped; the same command goes on")


def _last_line(log: Path) -> str:
    """The last line that a process wrote, for the table."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no output"


def search(folder: Path, texts: Sequence[str], trials: int, outcomes: Outcomes, seed: int = 0, **options: Any) -> None:
    """Runs an Optuna study until it has so many trials that ended, pruned ones included.

    The study is `study.db` (SQLite) in the folder. A trial that was running when a sweep was interrupted goes on first.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = spaces(texts)
    with file_access("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / 'study.db').resolve()}",
        study_name="sweep",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )
    ended = 0
    left, trial_of = [], {}
    reported: dict[str, int] = {}
    for frozen in study.get_trials(deepcopy=False):
        if frozen.params and set(frozen.params) != set(distributions):
            raise UserError(
                f"{folder} searched {sorted(frozen.params)}, not {sorted(distributions)}: give another --run"
            )
        if frozen.state == optuna.trial.TrialState.RUNNING:
            left.append(frozen)
            reported[_trial_point(frozen).name] = len(frozen.intermediate_values)
        elif frozen.state != optuna.trial.TrialState.FAIL:
            ended += 1
            status = "done" if frozen.state == optuna.trial.TrialState.COMPLETE else "pruned"
            outcomes.put(_trial_point(frozen), status)
            outcomes.ended += 1
    budget = max(0, trials - ended)

    def draw() -> Point | None:
        nonlocal budget
        if budget == 0:
            return None
        budget -= 1
        # Optuna has no public way to take up a trial that another process left running.
        trial = optuna.trial.Trial(study, left.pop(0)._trial_id) if left else study.ask(distributions)
        point = _trial_point(trial)
        trial_of[point.name] = trial
        return point

    def report(point: Point) -> bool:
        """Tells the trial of the losses that it doesn't know yet; whether there were any."""
        new = losses(folder / point.name)[reported.get(point.name, 0) :]
        for examples, loss in new:
            trial_of[point.name].report(loss, examples)
        reported[point.name] = reported.get(point.name, 0) + len(new)
        return bool(new)

    def prune(point: Point) -> bool:
        return report(point) and trial_of[point.name].should_prune()

    def finish(point: Point, status: str, loss: float) -> None:
        report(point)  # the pruner compares others with those of a run that ended between two looks too
        states = optuna.trial.TrialState
        if status == "done" and math.isfinite(loss):
            study.tell(trial_of[point.name], loss)
        elif status == "pruned":
            study.tell(trial_of[point.name], state=states.PRUNED)
        elif status != "interrupted":
            study.tell(trial_of[point.name], state=states.FAIL)

    run_points(folder, draw, finish, prune, outcomes, **options)


def _trial_point(trial: optuna.trial.Trial | optuna.trial.FrozenTrial) -> Point:
    # A choice is gin text already; a number's repr is.
    return Point(f"trial-{trial.number:04}", {name: str(value) for name, value in trial.params.items()})


def slurm_script(points: Sequence[Point], folder: Path, configs: Sequence[str], bindings: Sequence[str]) -> str:
    """A SLURM array script with a task for each point; resources are the reader's to fill in."""
    lines = [
        "#!/bin/bash",
        f"#SBATCH --array=0-{len(points) - 1}",
        f"#SBATCH --output={shlex.quote(str(folder))}/slurm-%A_%a.log",
        "#SBATCH --requeue",
        "# Add the partition, the time and the GPUs of one run. A task that is started again goes on where it stopped.",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for i, point in enumerate(points):
        lines.append(f"{i}) exec {shlex.join(command(point, folder, configs, bindings))} ;;")
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = configurables.parser("Train at many settings: grids, zips, chains of them, or a search.", EXAMPLES)
    add = parser.add_argument
    add("--grid", dest="parts", action="append", type=axis, metavar="'NAME = [VALUE, ...]'")
    add("--zip", dest="parts", action="append", type=zipped, metavar="'A = [...]; B = [...]'")
    add("--chain", dest="parts", action="append_const", const=None, help="what follows comes after, not times, before")
    add("--search", action="append", default=[], metavar="'NAME = log(LOW, HIGH)'", help="or uniform, int, choice")
    add("--trials", type=int, default=20, help="of a search (default 20)")
    add("--jobs", type=int, default=1, help="runs at once; here, NVIDIA GPUs are divided among them (default 1)")
    add(
        "--launcher",
        choices=["local", "ray", "slurm"],
        default="local",
        help="ray: on the cluster at RAY_ADDRESS, a GPU each; slurm: print an array script (default local)",
    )
    add("--run", default="runs/sweep", help="the folder for the runs and the report")
    arguments = parser.parse_args(argv)
    configs, folder, console = arguments.config or ["debug.gin"], Path(arguments.run), Console()
    if bool(arguments.parts) == bool(arguments.search):
        raise UserError("give either --grid and --zip or --search; a search takes a list as NAME = choice(VALUE, ...)")
    for name in ("jobs", "trials"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} must be at least 1")
    links: list[list] = [[]]
    for part in arguments.parts or ():
        if part is None:
            links.append([])
        else:
            links[-1].append(part)
    if arguments.parts and not all(links):
        raise UserError("--chain stands between two groups of --grid and --zip; one side has none")
    points = enumerate_points(links) if arguments.parts else []
    if arguments.launcher == "slurm":
        if not points:
            raise UserError("--launcher slurm needs --grid or --zip: a search draws its points one after the other")
        print(slurm_script(points, folder, configs, arguments.set), end="")
        return
    with file_access("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    outcomes = Outcomes(folder, arguments.trials if arguments.search else len(points))
    launcher = (Ray if arguments.launcher == "ray" else Local)(arguments.jobs)
    options = {"configs": configs, "bindings": arguments.set, "launcher": launcher, "console": console}
    if arguments.search:
        search(folder, arguments.search, arguments.trials, outcomes, **options)
    else:
        for point in points:
            outcomes.put(point, "waiting")
        waiting = iter(points)
        run_points(
            folder,
            draw=lambda: next(waiting, None),
            finish=lambda point, status, loss: None,
            prune=lambda point: False,
            outcomes=outcomes,
            **options,
        )
    finish_sweep(folder, outcomes, console)


if __name__ == "__main__":
    run_command(main)
