"""Batch sizes compared on the same tokens: small, growing and large ones. `make demo` runs it in its smallest form.

Warmup starts with the small batch and doubles it as training goes on, the learning rate following by the square root
(Merrill et al. 2025, "Critical Batch Size Revisited"): while the batch stays below the critical batch size, the loss
at equal tokens stays the same and steps are saved. Where it doubles is set by hand, by a measured curve, by the
gradient noise scale or by the norm test.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.reports.compare import compare, comparison_table
from crescendo.experiments.reports.equal_loss import equal_loss_table, reached
from crescendo.experiments.reports.write import write_report
from crescendo.experiments.runs.run import is_complete, last_validation, read_run
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, replace_file
from crescendo.experiments.runtime.interruption import interrupted_at
from crescendo.experiments.trainer.training import train

EXAMPLES = """examples:
  crescendo batch_warmup
  crescendo batch_warmup --seeds 3 --run runs/warmup_3_seeds
  crescendo batch_warmup --batch-size 4 --double-at 0.3 0.5 0.7
  crescendo batch_warmup --curve runs/critical_batch/critical_batch.json --batch-size 2 \\
    --arms constant curve noise-scale norm-test large --learning-rates 5e-4 1e-3 2e-3 --seeds 3 --minutes 8

The same command goes on where it was interrupted; a finished run is never run again."""

ARMS = ("constant", "warmup", "curve", "noise-scale", "norm-test", "large")


def arms(
    batch_size: int,
    double_at: Sequence[float],
    total_examples: int,
    *,
    chosen: Sequence[str] = ("constant", "warmup", "large"),
    largest: int | None = None,
    curve: str | None = None,
) -> dict[str, list[str]]:
    """The gin bindings of each arm, by its name; the learning rate of all is meant for the small batch.

    Args:
      batch_size: the small batch, in examples.
      double_at: shares of the run, increasing, at which the batch of the arm "warmup" doubles.
      total_examples: the length of the run.
      chosen: members of `ARMS`.
      largest: the large batch, and the cap of those that grow; where None, what the doublings lead to.
      curve: the file of a measured curve, for the arm "curve".

    >>> list(arms(2, [0.35, 0.65], 1000))
    ['constant-2', 'warmup-2-8', 'constant-8']
    """
    if any(not 0 < at < 1 for at in double_at) or sorted(set(double_at)) != list(double_at) or not double_at:
        raise UserError(
            f"--double-at {' '.join(map(str, double_at))}: give shares of the run between 0 and 1, increasing"
        )
    for name in chosen:
        if name not in ARMS:
            raise UserError(f"--arms {name}: no such arm; there are {', '.join(ARMS)}")
    if "curve" in chosen and curve is None:
        raise UserError("the arm curve needs --curve FILE: measure one with `crescendo critical_batch`")
    sizes = [batch_size * 2**i for i in range(len(double_at) + 1)]
    largest = sizes[-1] if largest is None else largest
    if largest <= batch_size:
        raise UserError(f"--largest {largest} must be above --batch-size {batch_size}")
    base = f"train.base_batch_size = {batch_size}"
    # What reads the gradient's noise off the microbatches needs two of them in the smallest batch.
    halves = f"train.max_microbatch_examples = {max(1, batch_size // 2)}"

    def growing(policy: str, *further: str) -> list[str]:
        start_and_cap = (f"{policy}.start = {batch_size}", f"{policy}.cap = {largest}")
        return [base, f"train.batch_size = @{policy}()", *start_and_cap, *further]

    makers: dict[str, tuple[str, Callable[[], list[str]]]] = {
        "constant": (f"constant-{batch_size}", lambda: [base, f"train.batch_size = {batch_size}"]),
        "warmup": (
            f"warmup-{batch_size}-{sizes[-1]}",
            lambda: [
                base,
                "train.batch_size = @staged()",
                f"staged.sizes = {sizes}",
                f"staged.starts_examples = {[0, *(round(at * total_examples) for at in double_at)]}",
            ],
        ),
        "curve": (
            f"curve-{batch_size}-{largest}",
            lambda: growing(
                "critical_batch_following",
                f"critical_batch_following.curve = {curve!r}",
                "critical_batch_following.sequence_length = %SEQUENCE_LENGTH",
            ),
        ),
        "noise-scale": (f"noise-scale-{batch_size}-{largest}", lambda: growing("noise_scale_following", halves)),
        "norm-test": (f"norm-test-{batch_size}-{largest}", lambda: growing("norm_test", halves)),
        "large": (f"constant-{largest}", lambda: [base, f"train.batch_size = {largest}"]),
    }
    return {makers[name][0]: makers[name][1]() for name in dict.fromkeys(chosen)}


def batch_warmup(
    folder: Path,
    *,
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    batch_size: int = 2,
    double_at: Sequence[float] = (0.35, 0.65),
    total_examples: int = 6144,
    chosen: Sequence[str] = ("constant", "warmup", "large"),
    largest: int | None = None,
    curve: str | None = None,
    learning_rates: Sequence[float] = (),
    seeds: int = 1,
    minutes: float | None = None,
) -> dict[str, list[dict]]:
    """Runs every arm, at its own best learning rate, with every seed; prints the comparison and writes its report.

    Args:
      folder: gets a run folder for each, `comparison.json` and `report/`.
      configs: gin files that define the macro `TOTAL_EXAMPLES` and everything but the batch size; also `LEARNING_RATE`
        where learning rates are given.
      bindings: further gin statements.
      batch_size: the small batch, in examples.
      double_at: shares of the run at which the arm "warmup" doubles it.
      total_examples: the length of each run.
      chosen: the arms; the first is the baseline.
      largest: the large batch; None: what `double_at` leads to.
      curve: the file of a measured curve of critical batch sizes.
      learning_rates: each arm tries all of them with seed 0 and goes on with its best; none: the config's own.
      seeds: how many seeds, from 0.
      minutes: stop then, resumable; None: run to the end.

    Returns:
      The last validation record of each run at its arm's best learning rate, by arm.
    """
    console = Console()
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def run(name: str, of_arm: Sequence[str], rate: float | None, seed: int) -> tuple[Path, dict]:
        swept = "" if rate is None else f"-lr{rate:g}"
        label = name + swept + (f"-seed{seed}" if swept or seeds > 1 else "")
        if is_complete(folder / label):
            return folder / label, last_validation(folder / label)
        console.rule(label)
        every = [f"TOTAL_EXAMPLES = {total_examples}", f"train.seed = {seed}", *of_arm, *bindings]
        every += [] if rate is None else [f"LEARNING_RATE = {rate!r}"]
        with interrupted_at(deadline):
            return folder / label, configurables.bind(train, configs, every)(run=str(folder / label), label=label)

    results: dict[str, list[dict]] = {}
    runs, sweeps = [], {}
    of_arms = arms(batch_size, double_at, total_examples, chosen=chosen, largest=largest, curve=curve)
    rates: list[float | None] = [*learning_rates] or [None]
    for name, of_arm in of_arms.items():
        first = {rate: run(name, of_arm, rate, 0) for rate in rates}
        losses = {rate: record["loss"] for rate, (_, record) in first.items()}
        best = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
        sweeps[name] = {"best": best, "losses": {f"{rate:g}": loss for rate, loss in losses.items() if rate}}
        of_best = [first[best], *(run(name, of_arm, best, seed) for seed in range(1, seeds))]
        runs += [path for path, _ in of_best]
        results[name] = [record for _, record in of_best]
    page = write_report(runs, folder / "report", title="Batch sizes compared on the same tokens")
    compared = compare([read_run(path) for path in runs])
    summary = [
        {
            "arm": name,
            "learning_rate": sweeps[name]["best"],
            "sweep": sweeps[name]["losses"],
            "losses": [record["loss"] for record in results[name]],
            "steps": arm.steps,
            "steps_saved": arm.steps_saved,
            "seconds": arm.seconds,
            "at_equal_loss": reached(arm, compared[0])._asdict(),
        }
        for name, arm in zip(of_arms, compared, strict=True)
    ]
    with file_access("write", folder):
        replace_file(folder / "comparison.json", (json.dumps(summary, indent=2) + "\n").encode())
    console.print(comparison_table(runs))
    console.print(equal_loss_table(compared))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = configurables.parser(__doc__.split("\n\n")[0], EXAMPLES)
    add = parser.add_argument
    add("--run", default="runs/batch_warmup", help="the folder for the runs and the report")
    add("--batch-size", type=int, default=2, help="the small batch, in examples (default 2)")
    add("--double-at", type=float, nargs="+", default=[0.35, 0.65], help="shares of the run (default 0.35 0.65)")
    add("--total-examples", type=int, default=6144, help="the length of each run (default 6144)")
    add(
        *("--arms",),
        nargs="+",
        default=["constant", "warmup", "large"],
        metavar="ARM",
        help=f"out of {', '.join(ARMS)}; the first is the baseline (default constant warmup large)",
    )
    add("--largest", type=int, help="the large batch and the cap of growing ones (default: where --double-at leads)")
    add("--curve", metavar="FILE", help="what critical_batch measured, for the arm curve")
    add("--learning-rates", type=float, nargs="+", default=[], help="each arm tries all and goes on with its best")
    add("--seeds", type=int, default=1, help="how many seeds (default 1)")
    add("--minutes", type=float, help="stop then; the same command goes on")
    arguments = vars(parser.parse_args(argv))
    if arguments["seeds"] < 1:
        raise UserError(f"--seeds {arguments['seeds']} must be at least 1")
    batch_warmup(
        Path(arguments.pop("run")),
        configs=arguments.pop("config") or ["debug.gin"],
        bindings=arguments.pop("set"),
        chosen=arguments.pop("arms"),
        **arguments,
    )


if __name__ == "__main__":
    run_command(main)
