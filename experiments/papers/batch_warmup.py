"""Compare small, growing and large batches on the same tokens.

Warmup starts with the small batch and doubles it as training goes on, the learning rate following by the square root
(Merrill et al. 2025, "Critical Batch Size Revisited"): while the batch stays below the critical batch size, the loss
at equal tokens stays the same and steps are saved. Where it doubles is set by hand, by a measured curve, by the
gradient noise scale or by the norm test. `make demo` runs it in its smallest form.
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
from crescendo.experiments.sweeps.arms import check_known, check_shares, compare_arms

PAPER = Paper(
    title="Critical batch size revisited",
    authors="Merrill et al. 2025",
    arxiv="2505.23971",
    claim="Warming the batch up along the measured curve trains OLMo 1B to the loss of the small batch, slightly below "
    "it, in 43% fewer optimizer steps.",
    command="crescendo batch_warmup --seeds 3",
    device="two CPU cores",
    expected="The growing batch ends within 0.02 nats of the small one, in 41% fewer steps; the large batch from the "
    "start ends about 0.09 nats higher.",
)

EXAMPLES = """examples:
  crescendo batch_warmup
  crescendo batch_warmup --seeds 3 --run runs/warmup_3_seeds
  crescendo batch_warmup --batch-size 4 --double-at 0.3 0.5 0.7
  crescendo batch_warmup --curve runs/critical_batch/critical_batch.json --batch-size 2 \\
    --arms constant curve noise-scale norm-test large --learning-rates 5e-4 1e-3 2e-3 --seeds 3 --minutes 8

The same command goes on where it was interrupted; a finished run is never run again."""

ARMS = ("constant", "warmup", "curve", "noise-scale", "norm-test", "large")
_GROWING = ("critical_batch_following", "noise_scale_following", "norm_test")
# The command's options for what the arms bind.
OPTIONS = {
    "TOTAL_EXAMPLES": "--total-examples",
    "train.total_examples": "--total-examples",
    "train.batch_size": "--batch-size",
    "train.base_batch_size": "--batch-size",
    "staged.sizes": "--batch-size",
    "staged.starts_examples": "--double-at",
    "critical_batch_following.curve": "--curve",
    **{f"{policy}.start": "--batch-size" for policy in _GROWING},
    **{f"{policy}.cap": "--largest" for policy in _GROWING},
}


def make_arms(
    batch_size: int,
    double_at: Sequence[float],
    total_examples: int,
    *,
    arms: Sequence[str] = ("constant", "warmup", "large"),
    largest: int | None = None,
    curve: Path | None = None,
) -> dict[str, Bindings]:
    """What each arm binds, by its name; the learning rate of all is meant for the small batch.

    Args:
      batch_size: the small batch, in examples.
      double_at: shares of the run, increasing, at which the batch of the arm "warmup" doubles.
      total_examples: the length of the run.
      arms: members of `ARMS`.
      largest: the large batch, and the cap of those that grow; where None, what the doublings lead to.
      curve: the file of a measured curve, for the arm "curve".

    >>> list(make_arms(2, [0.35, 0.65], 1000))
    ['constant-2', 'warmup-2-8', 'constant-8']
    """
    check_shares("--double-at", double_at, "shares of the run", least=1)
    check_known("--arms", arms, ARMS)
    if "curve" in arms and curve is None:
        raise UserError("the arm curve needs --curve FILE: measure one with `crescendo critical_batch`")
    sizes = [batch_size * 2**i for i in range(len(double_at) + 1)]
    largest = sizes[-1] if largest is None else largest
    if largest <= batch_size:
        raise UserError(f"--largest {largest} must be above --batch-size {batch_size}")
    base: Bindings = {"train.base_batch_size": batch_size}
    # What reads the gradient's noise off the microbatches needs two of them in the smallest batch.
    halves: Bindings = {"train.max_microbatch_examples": max(1, batch_size // 2)}

    def growing(policy: str, **further: str) -> Bindings:
        options = {"start": batch_size, "cap": largest, **further}
        return {**base, "train.batch_size": Call(policy), **{f"{policy}.{key}": options[key] for key in options}}

    every: dict[str, tuple[str, Bindings]] = {
        "constant": (f"constant-{batch_size}", {**base, "train.batch_size": batch_size}),
        "warmup": (
            f"warmup-{batch_size}-{sizes[-1]}",
            {
                **base,
                "train.batch_size": Call("staged"),
                "staged.sizes": sizes,
                "staged.starts_examples": [0, *(round(at * total_examples) for at in double_at)],
            },
        ),
        "curve": (
            f"curve-{batch_size}-{largest}",
            growing("critical_batch_following", curve=str(curve)),
        ),
        "noise-scale": (f"noise-scale-{batch_size}-{largest}", {**growing("noise_scale_following"), **halves}),
        "norm-test": (f"norm-test-{batch_size}-{largest}", {**growing("norm_test"), **halves}),
        "large": (f"constant-{largest}", {**base, "train.batch_size": largest}),
    }
    return dict(every[name] for name in dict.fromkeys(arms))


def batch_warmup(
    run: Path = Path("runs/batch_warmup"),
    *,
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    batch_size: int = 2,
    double_at: Sequence[float] = (0.35, 0.65),
    total_examples: int = 6144,
    arms: Sequence[str] = ("constant", "warmup", "large"),
    largest: int | None = None,
    curve: Path | None = None,
    learning_rates: Sequence[float] = (),
    seeds: int = 1,
    minutes: float | None = None,
) -> dict[str, list[dict]]:
    """Compares small, growing and large batches on the same tokens, each at its own best learning rate.

    Every arm trains with every seed; a table is printed and a report written.

    Args:
      run: the folder for the runs, `comparison.json` and the report.
      configs: gin files that define the macro `TOTAL_EXAMPLES` and everything but the batch size; also `LEARNING_RATE`
        where learning rates are given.
      bindings: further gin statements.
      batch_size: the small batch, in examples.
      double_at: shares of the run at which the arm "warmup" doubles the batch.
      total_examples: the length of each run.
      arms: out of constant, warmup, curve, noise-scale, norm-test and large; the first is the baseline.
      largest: the large batch, and the cap of growing ones; by default where `double_at` leads.
      curve: the file that critical_batch wrote, for the arm "curve".
      learning_rates: each arm tries all with seed 0 and goes on with its best; by default the config's own.
      seeds: how many seeds, from 0.
      minutes: stop then; the same command goes on.

    Returns:
      The last validation record of each run at its arm's best learning rate, by arm.
    """
    outcomes = compare_arms(
        run,
        make_arms(batch_size, double_at, total_examples, arms=arms, largest=largest, curve=curve),
        command="batch_warmup",
        title="Batch sizes compared on the same tokens",
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
    return command.make_parser(batch_warmup, EXAMPLES, configurables.parser)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command.call(batch_warmup, parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
