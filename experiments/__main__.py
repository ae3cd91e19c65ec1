"""All commands under one name: `crescendo COMMAND ...` is `python -m crescendo.experiments.COMMAND ...`."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest import mock

import shtab

from crescendo.experiments.runtime.cli import run_command


class Command(NamedTuple):
    """A module with a `main`, and what it does."""

    module: str
    does: str


PAPERS = "crescendo.experiments.papers"
COMMANDS = {
    "train": Command("crescendo.experiments.train", "train a model"),
    "report": Command("crescendo.experiments.report", "compare runs: a table, a page and pictures"),
    "sweep": Command("crescendo.experiments.sweep", "train over grids or a search of settings"),
    "batch_warmup": Command(f"{PAPERS}.batch_warmup", "compare small, growing and large batches"),
    "critical_batch": Command(
        "crescendo.experiments.papers.critical_batch", "measure the critical batch size along a run"
    ),
    "refine_schedule": Command(
        "crescendo.experiments.papers.refine_schedule", "refine a schedule by a run's gradient norms"
    ),
    "large_batch": Command(f"{PAPERS}.large_batch", "compare optimizers over batch sizes"),
    "generate": Command("crescendo.experiments.generate", "continue a text with a trained model"),
    "export": Command("crescendo.experiments.export", "write a trained model for others' tools"),
    "import_hf": Command("crescendo.experiments.import_hf", "go on with a model of Hugging Face's"),
    "describe": Command("crescendo.experiments.describe", "plan a model over a mesh: memory and traffic"),
    "doctor": Command("crescendo.experiments.doctor", "say what this machine offers a run"),
    "benchmark": Command("crescendo.experiments.benchmark", "time training steps and optimizers"),
    "bench_kernels": Command("crescendo.pallas_kernels.bench", "time kernels beside their peers"),
    "tune_kernels": Command("crescendo.pallas_kernels.tune", "choose kernels' tiles by timing them"),
    "plot_schedules": Command("crescendo.optim.plot", "draw schedules"),
}

EXAMPLES = """examples:
  crescendo train --config debug.gin
  crescendo report runs/constant-2 runs/warmup
  crescendo train --help
  crescendo completion bash > ~/.local/share/bash-completion/completions/crescendo
  crescendo completion zsh > ~/.zfunc/_crescendo    # a folder of zsh's fpath"""

# Options that take a path, by how they are spelled in every command.
_FILES = ("config", "data", "prepare", "output", "tokenizer")
_FOLDERS = ("run", "runs", "out")


class _Parsing(Exception):  # noqa: N818 (no error)
    """A command has built its parser."""


def parser_of(main: Callable[[Sequence[str]], object]) -> argparse.ArgumentParser:
    """The parser of a command, caught where the command begins to parse."""
    found: list[argparse.ArgumentParser] = []

    def stop(self: argparse.ArgumentParser, *arguments: object) -> None:
        found.append(self)
        raise _Parsing

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            main([])
        except _Parsing:
            return found[0]
    raise AssertionError(f"{main.__module__}.main parses no arguments")


def parser(complete: bool = False) -> argparse.ArgumentParser:
    """The parser of `crescendo`; with every command's own options, for which each is imported, where `complete`."""
    result = argparse.ArgumentParser(
        prog="crescendo",
        description="Train at the right batch size, on the right schedule, over the right mesh.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = result.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, does) in COMMANDS.items():
        parents = [parser_of(importlib.import_module(module).main)] if complete else []
        for action in (action for each in parents for action in each._actions if isinstance(action.dest, str)):
            if action.choices is None and action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.choices is None and action.dest in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        commands.add_parser(name, parents=[_without_help(each) for each in parents], help=does)
    completion = commands.add_parser("completion", help="print a script that completes these commands in a shell")
    completion.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return result


def _without_help(each: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser without `--help`, which the one that takes it over adds itself."""
    each._actions = [action for action in each._actions if action.dest != "help"]
    for group in each._action_groups:
        group._group_actions = [action for action in group._group_actions if action.dest != "help"]
    return each


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        importlib.import_module(COMMANDS[arguments[0]].module).main(arguments[1:])
        return
    options = parser().parse_args(arguments)
    print(shtab.complete(parser(complete=True), options.shell))


def run() -> None:
    """The entry point: errors of a user's are one line."""
    run_command(main)


if __name__ == "__main__":
    run()
