"""Train a model: `python -m crescendo.experiments.train --config debug.gin`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import hosts_lost, user_values
from crescendo.experiments.trainer.training import train
from crescendo.parallel import hosts

EXAMPLES = """examples:
  python -m crescendo.experiments.train --config debug.gin
  python -m crescendo.experiments.train --config lm_30m.gin --set 'text_files.paths = ["books/*.txt"]'
  python -m crescendo.experiments.train --config debug.gin --set 'train.total_examples = 2048' --run runs/short
  srun python -m crescendo.experiments.train --config lm_1b.gin --hosts auto

The same command goes on where an interrupted run stopped."""


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = configurables.parser("Train a model.", EXAMPLES)
    result.add_argument("--run", help="the run's folder (default: runs/NAME of the last config)")
    result.add_argument(
        "--hosts",
        metavar="auto|HOST:PORT,INDEX,COUNT",
        help="be one of several processes that share the run's folder: as JAX finds by itself (SLURM, Cloud TPU, ...), "
        "or by process 0's address, this process's number and how many there are",
    )
    result.add_argument(
        "--join-seconds", type=float, default=300.0, help="how long to wait for the other processes (default 300)"
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    if arguments.hosts:
        with user_values():
            hosts.join(arguments.hosts, timeout_seconds=arguments.join_seconds)
    configs = arguments.config or ["debug.gin"]
    bound = configurables.bind(train, configs, arguments.set)
    with hosts_lost():
        bound(run=arguments.run or f"runs/{Path(configs[-1]).stem}")


if __name__ == "__main__":
    run_command(main)
