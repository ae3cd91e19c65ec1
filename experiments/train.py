"""Train a model: `python -m crescendo.experiments.train --config debug.gin`."""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.settings import settings
from crescendo.experiments.data.subset import on_subset
from crescendo.experiments.planning import run
from crescendo.experiments.planning.preview import preview
from crescendo.experiments.runtime.cli import hosts_lost, run_command
from crescendo.experiments.runtime.command import check_not_given
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.runtime.files import local_path
from crescendo.experiments.trainer.training import train
from crescendo.models.low_precision import check_device
from crescendo.pallas_kernels.console import output_console
from crescendo.parallel import hosts

EXAMPLES = """examples:
  python -m crescendo.experiments.train --config debug.gin
  python -m crescendo.experiments.train --config lm_30m.gin --set 'text_files.paths = ["books/*.txt"]'
  python -m crescendo.experiments.train --config debug.gin --set 'train.total_examples = 2048' --run runs/short
  python -m crescendo.experiments.train --config lm_1b.gin --dry-run --device H100 --devices 8
  python -m crescendo.experiments.train --config lm_124m.gin --profile 5
  python -m crescendo.experiments.train --config debug.gin --preview 5
  python -m crescendo.experiments.train --list learning_rate
  srun python -m crescendo.experiments.train --config lm_1b.gin --hosts auto

The same command goes on where an interrupted run stopped."""


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = configurables.parser("Train a model.", EXAMPLES)
    result.add_argument(
        "--run",
        type=local_path,
        help="the run's folder (default: runs/NAME of the last config, runs/RUN-again of RUN/config.gin)",
    )
    result.add_argument(
        "--hosts",
        metavar="auto|HOST:PORT,INDEX,COUNT",
        help="be one of several processes that share the run's folder: as JAX finds by itself (SLURM, Cloud TPU, ...), "
        "or by process 0's address, this process's number and how many there are",
    )
    add = result.add_argument
    add("--list", nargs="?", const="", metavar="WORD", help="print every setting, or those with a word in their name")
    add("--profile", type=int, metavar="STEPS", help="trace so many steps into RUN/profile (train.profile_steps)")
    add("--dry-run", action="store_true", help="print what the run will be and need, and train nothing")
    add("--preview", type=int, metavar="N", help="print the first N rows of text as the model sees them; train nothing")
    add("--devices", type=int, help="how many of --device (default 1)")
    run.add_options(result)
    result.add_argument(
        "--join-seconds", type=float, default=300.0, help="how long to wait for the other processes (default 300)"
    )
    return result


def default_run(configs: Sequence[str]) -> str:
    """The folder of a run that names none: after its last config, or after the run whose `config.gin` that is.

    >>> default_run(["lm_30m.gin", "books.gin"])
    'runs/books'
    """
    last = Path(configs[-1])
    if last.name == "config.gin" and last.with_name("run.json").is_file():
        return f"runs/{last.resolve().parent.name}-again"
    return f"runs/{last.stem}"


def list_settings(word: str) -> None:
    """Prints a line for each setting with the word in its name.

    Raises:
      UserError: where there is none.
    """
    table = Table("setting", "default", "range", "what it is", box=None, pad_edge=False)
    for setting in settings(train, word):
        table.add_row(*map(Text, setting))
    if not table.row_count:
        raise UserError(f"--list {word}: no setting has that in its name")
    output_console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser()
    arguments = options.parse_args(argv)
    if not arguments.dry_run:
        check_not_given(options, arguments, run.options_of(arguments), " is of a plan: add --dry-run, or leave it out")
    if arguments.hosts:
        with user_values():
            hosts.join(arguments.hosts, timeout_seconds=arguments.join_seconds)
    if arguments.list is not None:
        list_settings(arguments.list)
        return
    configs = arguments.config or ["debug.gin"]
    profiled = [] if arguments.profile is None else [f"train.profile_steps = {arguments.profile}"]
    bound = configurables.bind(train, configs, [*arguments.set, *profiled])
    if arguments.preview is not None:
        if arguments.dry_run:
            raise UserError("--preview and --dry-run each print something and train nothing: leave one out")
        given = configurables.arguments(train, ["data", "rows", "seed"])
        data = on_subset(given["data"], given["rows"])
        preview(output_console(), data, seed=given["seed"], examples=arguments.preview)
        return
    if arguments.dry_run:
        run.plan_run(
            output_console(),
            settings=configurables.resolved(train),
            arguments=functools.partial(configurables.arguments, train),
            mesh_sizes=configurables.given("mesh"),
            **run.options_of(arguments),
        )
        return
    with user_values():  # before data are prepared
        model = configurables.arguments(train, ["model"])["model"]
        check_device(getattr(model, "matmul", "dtype"))
    with hosts_lost():
        bound(run=str(arguments.run or default_run(configs)))


if __name__ == "__main__":
    run_command(main)
