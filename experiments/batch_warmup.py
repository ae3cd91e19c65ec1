"""A small constant batch, batch-size warmup and a large constant batch on the same tokens: `make demo`.

Warmup starts with the small batch and doubles it as training goes on, the learning rate following by the square root
(Merrill et al. 2025, "Critical Batch Size Revisited"): while the batch stays below the critical batch size, the loss
at equal tokens stays the same and steps are saved.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from crescendo.experiments import configurables
from crescendo.experiments.cli import run_command
from crescendo.experiments.errors import UserError
from crescendo.experiments.report import comparison_table, write_report
from crescendo.experiments.train import train

EXAMPLES = """examples:
  python -m crescendo.experiments.batch_warmup
  python -m crescendo.experiments.batch_warmup --seeds 3 --run runs/warmup_3_seeds
  python -m crescendo.experiments.batch_warmup --batch-size 4 --double-at 0.3 0.5 0.7

The same command goes on where it was interrupted."""


def arms(batch_size: int, double_at: Sequence[float], total_examples: int) -> dict[str, list[str]]:
    """The gin bindings of each arm, by its name; the learning rate of all is meant for the small batch.

    Args:
      batch_size: the small batch, in examples.
      double_at: shares of the run, increasing, at which the batch doubles.
      total_examples: the length of the run.

    >>> list(arms(2, [0.35, 0.65], 1000))
    ['constant-2', 'warmup-2-8', 'constant-8']
    """
    if any(not 0 < at < 1 for at in double_at) or sorted(set(double_at)) != list(double_at) or not double_at:
        raise UserError(
            f"--double-at {' '.join(map(str, double_at))}: give shares of the run between 0 and 1, increasing"
        )
    sizes = [batch_size * 2**i for i in range(len(double_at) + 1)]
    starts = [0, *(round(at * total_examples) for at in double_at)]
    large = sizes[-1]
    base = f"train.base_batch_size = {batch_size}"
    return {
        f"constant-{batch_size}": [base, f"train.batch_size = {batch_size}"],
        f"warmup-{batch_size}-{large}": [
            base,
            "train.batch_size = @staged()",
            f"staged.sizes = {sizes}",
            f"staged.starts_examples = {starts}",
        ],
        f"constant-{large}": [base, f"train.batch_size = {large}"],
    }


def batch_warmup(
    folder: Path,
    *,
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    batch_size: int = 2,
    double_at: Sequence[float] = (0.35, 0.65),
    total_examples: int = 6144,
    seeds: int = 1,
) -> dict[str, list[dict]]:
    """Runs every arm with every seed, prints the comparison and writes its report.

    Args:
      folder: gets a run folder for each, and `report/`.
      configs: gin files that define the macro `TOTAL_EXAMPLES` and everything but the batch size.
      bindings: further gin statements.
      batch_size: the small batch, in examples.
      double_at: shares of the run at which warmup doubles it.
      total_examples: the length of each run.
      seeds: how many seeds, from 0.

    Returns:
      The last validation record of each run, by arm.
    """
    console = Console()
    results: dict[str, list[dict]] = {}
    runs = []
    for seed in range(seeds):
        for name, of_arm in arms(batch_size, double_at, total_examples).items():
            label = f"{name}-seed{seed}" if seeds > 1 else name
            console.rule(label)
            every = [f"TOTAL_EXAMPLES = {total_examples}", f"train.seed = {seed}", *of_arm, *bindings]
            bound = configurables.bind(train, configs, every)
            runs.append(folder / label)
            results.setdefault(name, []).append(bound(run=str(folder / label), label=label))
    page = write_report(runs, folder / "report", title="Batch-size warmup against constant batches")
    console.print(comparison_table(runs))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = configurables.parser(__doc__.split("\n\n")[0], EXAMPLES)
    parser.add_argument("--run", default="runs/batch_warmup", help="the folder for the runs and the report")
    parser.add_argument("--batch-size", type=int, default=2, help="the small batch, in examples (default 2)")
    parser.add_argument(
        "--double-at", type=float, nargs="+", default=[0.35, 0.65], help="shares of the run (default 0.35 0.65)"
    )
    parser.add_argument("--total-examples", type=int, default=6144, help="the length of each run (default 6144)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default 1)")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds} must be at least 1")
    batch_warmup(
        Path(arguments.run),
        configs=arguments.config or ["debug.gin"],
        bindings=arguments.set,
        batch_size=arguments.batch_size,
        double_at=arguments.double_at,
        total_examples=arguments.total_examples,
        seeds=arguments.seeds,
    )


if __name__ == "__main__":
    run_command(main)
