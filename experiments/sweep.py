"""Train over grids or a search of settings: `python -m crescendo.experiments.sweep`.

Every point is a run of the training command in a process and a folder of its own, so that one that fails takes nothing
with it. Grids, zips and chains are enumerated; searches are Optuna studies (TPE; the median pruner reads the validation
losses) kept in the sweep's folder.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.runs.run import is_complete
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, local_path
from crescendo.experiments.sweeps.finished import check_points, check_used
from crescendo.experiments.sweeps.launchers import Local, Ray
from crescendo.experiments.sweeps.points import axis, enumerate_points, samples, spaces, zipped
from crescendo.experiments.sweeps.runner import Outcomes, finish_sweep, run_points, slurm_script
from crescendo.pallas_kernels.console import plain_console

EXAMPLES = """examples:
  python -m crescendo.experiments.sweep --grid 'LEARNING_RATE = [1e-3, 3e-3]' --grid 'train.batch_size = [8, 32]'
  python -m crescendo.experiments.sweep --zip 'LEARNING_RATE = [1e-3, 2e-3]; train.batch_size = [8, 32]' --jobs 2
  python -m crescendo.experiments.sweep --grid 'LEARNING_RATE = [1e-3]' --chain --grid 'train.seed = [1, 2]'
  python -m crescendo.experiments.sweep --search 'LEARNING_RATE = log(1e-4, 1e-2)' --trials 20
  python -m crescendo.experiments.sweep --grid 'LEARNING_RATE = [1e-3, 3e-3]' --launcher slurm > sweep.sh
  RAY_ADDRESS=HOST:6379 python -m crescendo.experiments.sweep --search 'LEARNING_RATE = log(1e-4, 1e-2)' \\
    --trials 64 --jobs 16 --launcher ray

When a SLURM array has ended, the same command with --launcher none writes its table and report.
The same command goes on where it was interrupted: a finished point is never run again, a failed one is tried anew.
Another configuration needs another --run."""


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = configurables.parser("Train at many settings: grids, zips, chains of them, or a search.", EXAMPLES)
    add = result.add_argument
    add("--grid", dest="parts", action="append", type=axis, metavar="'NAME = [VALUE, ...]'")
    add("--zip", dest="parts", action="append", type=zipped, metavar="'A = [...]; B = [...]'")
    add("--chain", dest="parts", action="append_const", const=None, help="what follows comes after, not times, before")
    add("--search", action="append", default=[], metavar="'NAME = log(LOW, HIGH)'", help="or uniform, int, choice")
    add("--trials", type=int, default=20, help="of a search (default 20)")
    add("--jobs", type=int, default=1, help="runs at once; here, NVIDIA GPUs are divided among them (default 1)")
    add(
        "--launcher",
        choices=["local", "ray", "slurm", "none"],
        default="local",
        help="ray: on the cluster at RAY_ADDRESS, a GPU each; slurm: print an array script; none: start nothing, and "
        "make the report of what has finished (default local)",
    )
    add("--run", type=local_path, default=Path("runs/sweep"), help="the folder for the runs and the report")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    typed = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(typed)
    configs, folder, console = arguments.config or ["debug.gin"], arguments.run, plain_console()
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
    tried = points or samples(spaces(arguments.search))
    check_used(tried, configs, arguments.set, "--grid" if points else "--search")
    check_points(folder, points, configs, arguments.set)
    if arguments.launcher == "slurm":
        if not points:
            raise UserError("--launcher slurm needs --grid or --zip: a search draws its points one after the other")
        report = [sys.executable, "-m", "crescendo.experiments.sweep", *_without_launcher(typed), "--launcher", "none"]
        print(slurm_script(points, folder, configs, arguments.set, arguments.module, report), end="")
        print(f"when the array has ended, the table and the report: {shlex.join(report)}", file=sys.stderr)
        return
    if arguments.launcher == "none" and not folder.is_dir():
        raise UserError(f"--run {folder}: no such folder, so no sweep to report")
    with file_access("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    outcomes = Outcomes(folder, arguments.trials if arguments.search else len(points))
    launcher = (Ray if arguments.launcher == "ray" else Local)(arguments.jobs)
    options = {"configs": configs, "bindings": arguments.set, "modules": arguments.module}
    options |= {"launcher": launcher, "console": console}
    if arguments.search:
        from crescendo.experiments.sweeps.search import search  # Optuna takes a second to import

        trials = 0 if arguments.launcher == "none" else arguments.trials
        search(folder, arguments.search, trials, outcomes, **options)
    elif arguments.launcher == "none":
        for point in points:
            begun = (folder / point.name / "run.json").exists()
            status = "done" if is_complete(folder / point.name) else "interrupted" if begun else "waiting"
            outcomes.put(point, status)
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


def _without_launcher(words: Sequence[str]) -> list[str]:
    """The command's words but for `--launcher`'s."""
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if before != "--launcher" and word.partition("=")[0] != "--launcher"]


if __name__ == "__main__":
    run_command(main)
