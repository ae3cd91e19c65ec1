"""Pieces of one length a step, short ones first, beside packed rows.

Pouransari et al. 2024, "Dataset Decomposition": documents are cut by the binary digits of their lengths, every step
takes pieces of one length at as many tokens, and a curriculum goes from short to long ones in cycles. All arms train on
as many tokens in rows of one shape and are evaluated on the same packed rows.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.statements import Bindings, Call, Macro
from crescendo.experiments.papers import Paper
from crescendo.experiments.runtime import command
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.sweeps.arms import check_known, compare_arms

PAPER = Paper(
    title="Dataset decomposition: faster LLM training with variable sequence length curriculum",
    authors="Pouransari et al. 2024",
    arxiv="2405.13226",
    claim="A 1B model with a context of 8,192 trains at the cost of one with 2,048 on documents that were joined and "
    "cut, and reaches its accuracy several times sooner.",
    command="crescendo dataset_decomposition --shortest 64 --group 4 --learning-rates 1e-3 2e-3 4e-3 --seeds 2 "
    "--set 'SEQUENCE_LENGTH = 512' --set 'train.batch_size = 4' --set 'text_data.documents = @text_files()' "
    "--set 'text_files.paths = [\"functions.jsonl\"]'",
    device="two CPU cores",
    expected="Short first ends within the spread of two seeds of packed rows on as many tokens, 0.013 nats a byte "
    "above.",
)

EXAMPLES = """examples:
  crescendo dataset_decomposition --set 'text_data.documents = @text_files()' \\
    --set 'text_files.paths = ["functions.jsonl"]' --set 'SEQUENCE_LENGTH = 512' --set 'train.batch_size = 4' \\
    --shortest 64 --group 4 --learning-rates 1e-3 2e-3 4e-3 --seeds 2
  crescendo dataset_decomposition --config lm_30m.gin --set 'text_files.paths = ["web/*.parquet"]' \\
    --set 'SEQUENCE_LENGTH = 4096' --set 'train.batch_size = 16' --set 'schedules.linear.warmup = 1600' \\
    --shortest 128 --group 16 --total-examples 146432 --learning-rates 1e-3 2e-3 4e-3

Documents need many lengths up to a row's; where they are longer, lengths that are rare have no place in a cycle.
The same command goes on where it was interrupted; a finished run is never run again."""

# The command's options for what the arms bind.
OPTIONS = {
    "TOTAL_EXAMPLES": "--total-examples",
    "train.total_examples": "--total-examples",
    "text_data.packing": "--arms",
    "decomposed.odds": "--arms",
    "decomposed.shortest": "--shortest",
    "decomposed.cycle": "--cycles",
    "decomposed.group": "--group",
}
# Of each arm how many times likelier a length is than the next longer one.
ODDS = {"packed": None, "even": 1.0, "grow": 2.0, "grow-fast": 100.0, "shrink": 0.5}


def make_arms(
    total_examples: int, *, arms: Sequence[str], shortest: int, cycles: int, group: int
) -> dict[str, Bindings]:
    """What each arm binds, by its name.

    Args:
      total_examples: the length of the run.
      arms: keys of `ODDS`.
      shortest: the length of the shortest pieces.
      cycles: of the curriculum in a run.
      group: examples in a row of one length.

    Raises:
      UserError: for an unknown arm, or a run that isn't whole cycles of whole groups.

    >>> make_arms(1000, arms=["packed", "grow"], shortest=64, cycles=5, group=8)["grow"]["decomposed.cycle"]
    200
    >>> make_arms(1000, arms=["grow"], shortest=64, cycles=8, group=8)
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: --total-examples 1000 must be whole cycles of whole groups, a ...
    """
    check_known("--arms", arms, [*ODDS])
    if cycles < 1 or group < 1:
        raise UserError(f"--cycles {cycles} and --group {group} must be at least 1")
    if total_examples % (cycles * group):
        raise UserError(
            f"--total-examples {total_examples} must be whole cycles of whole groups, a multiple of --cycles x --group "
            f"= {cycles * group}"
        )

    def bindings(odds: float | None) -> Bindings:
        if odds is None:
            return {"text_data.packing": None}
        settings = {"shortest": shortest, "odds": odds, "cycle": total_examples // cycles, "group": group}
        return {
            "text_data.packing": Call("decomposed"),
            **{f"decomposed.{name}": value for name, value in settings.items()},
        }

    return {name: bindings(ODDS[name]) for name in dict.fromkeys(arms)}


def dataset_decomposition(
    run: Path = Path("runs/dataset_decomposition"),
    *,
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    arms: Sequence[str] = ("packed", "even", "grow"),
    shortest: int = 32,
    cycles: int = 8,
    group: int = 8,
    total_examples: int = 6144,
    learning_rates: Sequence[float] = (),
    seeds: int = 1,
    minutes: float | None = None,
) -> dict[str, list[dict]]:
    """Compares rows of pieces of one length, in several orders, with packed rows on as many tokens.

    Every arm trains with every seed; a table is printed and a report written.

    Args:
      run: the folder for the runs, `comparison.json` and the report.
      configs: gin files that define the macro `TOTAL_EXAMPLES` and take their data from `text_data`; also
        `LEARNING_RATE` where learning rates are given.
      bindings: further gin statements.
      arms: out of packed, even (lengths come evenly), grow (short first, the odds of a length twice those of the next
        longer one), grow-fast (a hundred times), shrink (half); the first is the baseline.
      shortest: the length of the shortest pieces in tokens.
      cycles: of the curriculum in a run.
      group: so many examples in a row have one length: the batch size, or a multiple.
      total_examples: the length of each run, a multiple of cycles x group.
      learning_rates: each arm tries all with seed 0 and goes on with its best; by default the config's own.
      seeds: how many seeds, from 0.
      minutes: stop then; the same command goes on.

    Returns:
      The last validation record of each run at its arm's best learning rate, by arm.
    """
    outcomes = compare_arms(
        run,
        make_arms(total_examples, arms=arms, shortest=shortest, cycles=cycles, group=group),
        command="dataset_decomposition",
        title="Pieces of one length compared with packed rows",
        configs=configs,
        bindings=bindings,
        common={"TOTAL_EXAMPLES": total_examples, "train.total_examples": Macro("TOTAL_EXAMPLES")},
        options=OPTIONS,
        learning_rates=learning_rates,
        seeds=seeds,
        minutes=minutes,
    )
    return {name: outcome.records for name, outcome in outcomes.items()}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    return command.make_parser(dataset_decomposition, EXAMPLES, configurables.parser)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command.call(dataset_decomposition, parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
