"""All commands under one name: `crescendo COMMAND ...` is `python -m crescendo.experiments.COMMAND ...`."""

import argparse
import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import shtab

from crescendo import experiments
from crescendo.experiments import papers
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.command import plain_parser

# Commands of the other packages, by module.
ELSEWHERE = {
    "bench_kernels": "crescendo.pallas_kernels.bench",
    "tune_kernels": "crescendo.pallas_kernels.tune",
    "plot_schedules": "crescendo.optim.plot",
}

EXAMPLES = """examples:
  crescendo train --config debug.gin
  crescendo report runs/constant-2 runs/warmup
  crescendo train --help
  crescendo completion bash > ~/.local/share/bash-completion/completions/crescendo
  crescendo completion zsh > ~/.zfunc/_crescendo    # a folder of zsh's fpath"""

# Options that take a path, by how they are spelled in every command.
_FILES = ("config", "data", "prepare", "output", "subset", "tokenizer")
_FOLDERS = ("run", "runs", "out")


class Command(NamedTuple):
    """A module with a `parser` and a `main`, and what it does: the first line of its docstring."""

    module: str
    does: str


@functools.cache
def commands() -> dict[str, Command]:
    """Every command by name, the experiments of papers among them; none is imported for this."""
    here = Path(__file__).parent
    modules = [f"{experiments.__name__}.{path.stem}" for path in sorted(here.glob("[!_]*.py"))]
    modules += [f"{papers.__name__}.{name}" for name in papers.names()]
    named = {module.rpartition(".")[2]: module for module in modules} | ELSEWHERE
    candidates = {name: _command(module) for name, module in named.items()}
    return {name: command for name, command in candidates.items() if command is not None}


def _command(module: str) -> Command | None:
    """The command that a module is; None where it has no `parser` and `main`."""
    package, *inner = module.removeprefix("crescendo.").split(".")
    specification = importlib.util.find_spec(f"crescendo.{package}")  # which imports no module of the package
    assert specification is not None
    assert specification.origin is not None
    path = Path(specification.origin).parent.joinpath(*inner)
    source = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_bytes())
    functions = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    if not {"parser", "main"} <= functions:
        return None
    line = (ast.get_docstring(source) or "").partition("\n")[0].split(": `")[0].rstrip(".")
    return Command(module, line[:1].lower() + line[1:])


def parser(complete: bool = False) -> argparse.ArgumentParser:
    """The parser of `crescendo`; with every command's own options, for which each is imported, where `complete`."""
    says = "Train at the right batch size, on the right schedule, over the right mesh."
    result = plain_parser(says, EXAMPLES, prog="crescendo")
    subcommands = result.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, does) in commands().items():
        parents = [importlib.import_module(module).parser()] if complete else []
        for action in (action for each in parents for action in each._actions if isinstance(action.dest, str)):
            if action.choices is None and action.dest in _FILES:
                action.complete = shtab.FILE
            elif action.choices is None and action.dest in _FOLDERS:
                action.complete = shtab.DIRECTORY
        subcommands.add_parser(name, parents=[_without_help(each) for each in parents], help=does)
    completion = subcommands.add_parser("completion", help="print a script that completes these commands in a shell")
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
    if arguments and arguments[0] in commands():
        module = importlib.import_module(commands()[arguments[0]].module)
        sys.argv[0] = f"crescendo {arguments[0]}"  # which its usage begins with
        module.main(arguments[1:])
        return
    options = parser().parse_args(arguments)
    print(shtab.complete(parser(complete=True), options.shell))


def run() -> None:
    """The entry point: errors of a user's are one line."""
    run_command(main)


if __name__ == "__main__":
    run()
