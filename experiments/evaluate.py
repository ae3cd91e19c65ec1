"""Evaluate a trained run on held-out sets or other files: `python -m crescendo.experiments.evaluate RUN`."""

import argparse
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from crescendo.experiments.configs import own_modules
from crescendo.experiments.data.text_data import TextData, held_out_text
from crescendo.experiments.data.text_files import text_files
from crescendo.experiments.reports.held_out import means_table
from crescendo.experiments.reports.loads import with_extremes
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.cache import use_compilation_cache
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.command import plain_parser
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import local_path
from crescendo.experiments.scoring.opened import open_run
from crescendo.experiments.tasks.base import Task
from crescendo.experiments.trainer.evaluate import (
    evaluation_program,
    make_evaluation,
    validation_mean,
    validation_weights,
)
from crescendo.pallas_kernels.console import plain_console

EXAMPLES = """examples:
  crescendo evaluate runs/debug
  crescendo evaluate runs/books --data old='old/*.txt' news='news/*.jsonl.zst'
  crescendo evaluate runs/books --data chapter.txt --at 4096 --examples 2000

On its own held-out sets a run is given the rows that it was given while it trained, so that the numbers are those of
its records. Nothing is written into its folder."""


class Evaluation(NamedTuple):
    """What is known of a checkpoint on a held-out set: of how many of its rows, and their means by name."""

    rows: int
    of_rows: int
    means: Mapping[str, float]


def evaluate(
    folder: Path, *, data: TextData | None = None, at: int | None = None, examples: int | None = None
) -> tuple[Task, int, dict[str, Evaluation]]:
    """Evaluates a run's checkpoint.

    Args:
      folder: the run's.
      data: held-out sets; None: the run's own.
      at: the checkpoint, by its examples; None: the newest.
      examples: how many rows of each set; None: as many as while it trained.

    Returns:
      The run's task, the checkpoint's examples, and what there is to say by held-out set; "validation" comes first,
      also where it is a mean of others.

    Raises:
      UserError: for what isn't a run of `train` with a configuration and a checkpoint, and for data that aren't what
        they were.
    """
    opened = open_run(folder, data=data, at=at)
    task, layout, state, microbatch = opened.task, opened.layout, opened.state, opened.microbatch_examples
    count = opened.evaluation_examples if examples is None else examples
    evaluations = {}

    @functools.cache
    def program(groups: int) -> jax.stages.Compiled:
        return evaluation_program(task, layout, state, groups, microbatch).compile()

    for name, rows in task.held_out.items():
        call = make_evaluation(task, name, layout, program, evaluation_examples=count, microbatch_examples=microbatch)
        evaluations[name] = Evaluation(min(count, len(rows)), len(rows), call(state))
    if mean := validation_mean(task, {name: each.means for name, each in evaluations.items()}):
        parts = [evaluations[name] for name in validation_weights(task)]
        of_parts = sum(each.rows for each in parts), sum(each.of_rows for each in parts)
        evaluations = {"validation": Evaluation(*of_parts, mean), **evaluations}
    return task, opened.examples_seen, evaluations


def _sets(folder: Path, words: Sequence[str], field: str) -> TextData:
    """The held-out sets that `--data` names, in tokens and rows of the run's."""
    paths: dict[str, list[str]] = {}
    for word in words:
        name, _, path = word.partition("=") if re.match(r"[A-Za-z][\w-]*=", word) else ("data", "", word)
        paths.setdefault(name, []).append(path)
    length, tokenizer = read_run(folder).said("sequence_length"), folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{folder} has no tokenizer.json, so that it can't read files: leave --data out")
    try:
        sets = {name: text_files(files, field=field) for name, files in paths.items()}
        return held_out_text(sets, tokenizer=str(tokenizer), sequence_length=length)
    except UserError as error:
        said = str(error).replace("text_files.paths", "--data").replace("text_files.field", "--field")
        raise UserError(said) from None


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = plain_parser("Evaluate a trained run on its held-out sets or on other files.", EXAMPLES)
    own_modules.add_option(result)
    add = result.add_argument
    add("run", type=local_path, metavar="RUN", help="a run's folder")
    says = "text files or globs, in sets by name (default: the run's own held-out sets)"
    add("--data", nargs="+", metavar="[NAME=]PATH", help=says)
    add("--field", default="text", help="of .json, .jsonl and .parquet files (default text)")
    add("--at", type=int, metavar="EXAMPLES", help="the checkpoint (default: the newest)")
    add("--examples", type=int, metavar="N", help="rows of each set (default: as in training)")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    if arguments.examples is not None and arguments.examples < 1:
        raise UserError(f"--examples {arguments.examples} must be at least 1")
    use_compilation_cache()
    data = _sets(arguments.run, arguments.data, arguments.field) if arguments.data else None
    task, seen, evaluations = evaluate(arguments.run, data=data, at=arguments.at, examples=arguments.examples)
    console = plain_console()
    console.print(f"{arguments.run} at {seen:,} examples", highlight=False, soft_wrap=True)
    lines = [
        ((name, f"{rows:,}" if rows == of_rows else f"{rows:,} of {of_rows:,}"), with_extremes(means))
        for name, (rows, of_rows, means) in evaluations.items()
    ]
    console.print(means_table(lines, ("held-out set", "rows"), task.unit))


if __name__ == "__main__":
    run_command(main)
