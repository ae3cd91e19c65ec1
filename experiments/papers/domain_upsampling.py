"""Upsampling a scarce domain at the end of a run: over which part of it.

Blakeney et al. 2024, "Does your data spark joy?": while the learning rate falls, sets of a domain are weighed up, and
the model gains in that domain about what it would have gained from more of it all along. Here two texts stand for a
domain and the rest; what each arm loses on the rest is measured beside what it gains in the domain.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.statements import Bindings, Call, Macro
from crescendo.experiments.papers import Paper
from crescendo.experiments.reports.compare import compare
from crescendo.experiments.reports.held_out import held_out_table
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime import command
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.sweeps.arms import check_shares, compare_arms
from crescendo.pallas_kernels.console import plain_console

PAPER = Paper(
    title="Does your data spark joy? Performance gains from domain upsampling at the end of training",
    authors="Blakeney et al. 2024",
    arxiv="2406.03476",
    claim="Domains upsampled over the last 10% to 20% of training raise a 7B model of 1T tokens by 6.90 points on "
    "MMLU, 8.26 on GSM8K and 6.17 on HumanEval.",
    command="crescendo domain_upsampling --domain 'pages/*.txt' --seeds 3",
    device="two CPU cores",
    expected="Not measured yet over 3 seeds.",
)

EXAMPLES = """examples:
  crescendo domain_upsampling --domain 'pages/*.txt'
  crescendo domain_upsampling --domain 'maths/*.jsonl' --rest 'web/*.parquet' --config lm_30m.gin --share 0.02 \\
    --upsampled 0.3 --over 0.1 0.2 --total-examples 1171456 --seeds 3

The same command goes on where it was interrupted; a finished run is never run again."""

# The command's options for what the arms bind.
OPTIONS = {
    "TOTAL_EXAMPLES": "--total-examples",
    "train.total_examples": "--total-examples",
    "text_mixture.weights": "--share",
    "text_files.paths": "--domain",
}


def make_arms(total_examples: int, *, share: float, upsampled: float, over: Sequence[float]) -> dict[str, Bindings]:
    """What each arm binds, by its name: none upsampled, each length at the end, all of the run.

    Args:
      total_examples: the length of the run.
      share: of the domain before.
      upsampled: of the domain at the end.
      over: parts of the run at its end, increasing.

    Raises:
      UserError: for shares that aren't between 0 and 1, and parts that are no arms of their own.

    >>> list(make_arms(1000, share=0.05, upsampled=0.5, over=[0.1, 0.2]))
    ['base', 'last-10', 'last-20', 'throughout']
    >>> make_arms(1000, share=0.25, upsampled=0.5, over=[0.1])["last-10"]["text_mixture.weights"]
    {0: {'domain': 0.25, 'rest': 0.75}, 900: {'domain': 0.5, 'rest': 0.5}}
    """
    if not 0 <= share < upsampled <= 1:
        raise UserError(f"--share {share:g} must be at least 0 and below --upsampled {upsampled:g}, and that at most 1")
    check_shares("--over", over, "parts of the run")
    begins = [round((1 - part) * total_examples) for part in over]
    if len({0, *begins, total_examples}) < len(over) + 2:
        raise UserError(
            f"--over {' '.join(map(str, over))}: of {total_examples:,} examples one of these is none or all, or two "
            "are the same: raise --total-examples, or give others"
        )

    def weights(of_domain: float) -> dict[str, float]:
        return {"domain": of_domain, "rest": 1 - of_domain}

    points: dict[str, dict[int, dict[str, float]]] = {"base": {0: weights(share)}}
    for part, begin in zip(over, begins, strict=True):
        points[f"last-{100 * part:g}"] = {0: weights(share), begin: weights(upsampled)}
    points["throughout"] = {0: weights(upsampled)}
    return {name: {"text_mixture.weights": by_clock} for name, by_clock in points.items()}


def domain_upsampling(
    run: Path = Path("runs/domain_upsampling"),
    *,
    domain: Sequence[str],
    rest: Sequence[str] = (),
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    share: float = 0.05,
    upsampled: float = 0.5,
    over: Sequence[float] = (0.05, 0.1, 0.2, 0.3),
    total_examples: int = 6144,
    learning_rates: Sequence[float] = (),
    seeds: int = 1,
    minutes: float | None = None,
) -> dict[str, list[dict]]:
    """Compares parts of the run over which a scarce domain is upsampled.

    Every arm trains with every seed; tables are printed, of each arm's losses in the domain and on the rest too, and a
    report is written. The validation loss is the mean of the two.

    Args:
      run: the folder for the runs, `comparison.json` and the report.
      domain: text files of the scarce domain, or globs.
      rest: those of all else; none: the source of the standard library.
      configs: gin files that define the macro `TOTAL_EXAMPLES` and a schedule that falls; also `LEARNING_RATE` where
        learning rates are given.
      bindings: further gin statements.
      share: of the domain among the examples before it is upsampled; the first arm has it all along.
      upsampled: of the domain at the end; the last arm has it all along.
      over: parts of the run, at its end, over which the domain is upsampled.
      total_examples: the length of each run.
      learning_rates: each arm tries all with seed 0 and goes on with its best; by default the config's own.
      seeds: how many seeds, from 0.
      minutes: stop then; the same command goes on.

    Returns:
      The last validation record of each run at its arm's best learning rate, by arm.
    """
    outcomes = compare_arms(
        run,
        make_arms(total_examples, share=share, upsampled=upsampled, over=over),
        command="domain_upsampling",
        title="Upsampling of a domain compared",
        configs=configs,
        bindings=bindings,
        common={
            "TOTAL_EXAMPLES": total_examples,
            "train.total_examples": Macro("TOTAL_EXAMPLES"),
            "text_data.documents": Call("text_mixture"),
            "text_mixture.sources": {
                "domain": Call("domain/text_files"),
                "rest": Call("rest/text_files" if rest else "stdlib_text"),
            },
            "domain/text_files.paths": [*domain],
            **({"rest/text_files.paths": [*rest]} if rest else {}),
        },
        options=OPTIONS,
        learning_rates=learning_rates,
        seeds=seeds,
        minutes=minutes,
    )
    table = held_out_table(compare([read_run(folder) for outcome in outcomes.values() for folder in outcome.runs]))
    if table is not None:
        plain_console().print(table)
    return {name: outcome.records for name, outcome in outcomes.items()}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    return command.make_parser(domain_upsampling, EXAMPLES, configurables.parser)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command.call(domain_upsampling, parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
