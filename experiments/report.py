"""Compare runs by a table, a page and pictures: `python -m crescendo.experiments.report RUN ...`.

The first run is the baseline. Runs whose names end in `-seedN` or `seed=N` and are otherwise alike form one arm, shown
as the mean of its seeds and their standard deviation.
"""

import argparse
from collections.abc import Sequence

from rich.text import Text

from crescendo.experiments.reports.compare import arms_table, compare, headline
from crescendo.experiments.reports.held_out import held_out_table
from crescendo.experiments.reports.seconds import seconds_table
from crescendo.experiments.reports.write import write_arms
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.files import local_path
from crescendo.pallas_kernels.console import plain_console


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m crescendo.experiments.report",
        description="Compare training runs: a table here, report.html and PNG plots in a folder. "
        "The first run is the baseline; runs whose names end in -seedN are averaged.",
        epilog="example: python -m crescendo.experiments.report runs/constant-2 runs/warmup --out report",
    )
    result.add_argument("runs", metavar="RUN", nargs="+", type=local_path, help="a run folder")
    result.add_argument(
        "--out", metavar="FOLDER", type=local_path, help="where to write (default: report in the first RUN)"
    )
    result.add_argument("--title", help="the page's title")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the comparison of run folders and writes its report."""
    arguments = parser().parse_args(argv)
    arms = compare([read_run(run) for run in arguments.runs])
    console = plain_console()
    console.print(arms_table(arms))
    if (held_out := held_out_table(arms)) is not None:
        console.print()
        console.print(held_out)
    if (seconds := seconds_table(arms)) is not None:
        console.print()
        console.print(seconds)
    title = arguments.title or ("Training runs compared" if len(arguments.runs) > 1 else "A training run")
    path = write_arms(arms, arguments.out or arguments.runs[0] / "report", title)
    console.print(Text(f"\n{headline(arms)}\n{path}"), soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
