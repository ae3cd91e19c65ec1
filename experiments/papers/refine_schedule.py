"""Schedule refinement: train once with linear decay, refine the schedule from that run's gradient norms, train again.

Defazio et al. 2023, "Optimal Linear Decay Learning Rate Schedules and Further Refinements": the norms of one run's
gradients give the schedule that a bound on the last iterate's loss prefers (`crescendo.optim.refinement`). Any finished
run will do as the first one: its norms are in its `metrics.jsonl`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.reports.compare import comparison_table
from crescendo.experiments.reports.write import write_report
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.trainer.training import train
from crescendo.optim.refinement import GradientNorms, save_refined

EXAMPLES = """examples:
  crescendo refine_schedule
  crescendo refine_schedule --seeds 3 --peak-factor 1.25
  crescendo refine_schedule --config lm_30m.gin --set 'text_files.paths = ["books/*.txt"]'

The same command goes on where it was interrupted."""


def recorded_norms(run: Path) -> GradientNorms:
    """The l1 and l2 norms of every mean gradient of a run, before clipping; skipped steps are left out.

    Raises:
      UserError: for a run that made fewer than two steps.
    """
    train_columns = read_run(run).train
    norms = np.stack([train_columns["gradient_l1_norm"], train_columns["gradient_norm"]])
    good = np.isfinite(norms).all(axis=0) & (norms > 0).all(axis=0)
    if good.sum() < 2:
        raise UserError(f"{run} has {good.sum()} steps with a gradient norm; at least 2 make a schedule")
    # Where the step's rate was read: the middle of its batch.
    clock = train_columns["examples_seen"] - train_columns["batch_size"] / 2
    return GradientNorms(clock[good].astype(float), *norms[:, good])


def refine_schedule(
    folder: Path,
    *,
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    learning_rate: float = 1e-3,
    peak_factor: float = 1.0,
    norm: str = "l1",
    smoothing: float = 0.1,
    seeds: int = 1,
) -> dict[str, list[dict]]:
    """Runs linear decay and its refinement with every seed, prints the comparison and writes its report.

    Args:
      folder: gets a run folder for each, the refined schedules as JSON, and `report/`.
      configs: gin files that define the macros `TOTAL_EXAMPLES` and `LEARNING_RATE`, with `adamw` on `linear`.
      bindings: further gin statements.
      learning_rate: the peak of linear decay.
      peak_factor: the refined schedule's peak is that times this; a refined schedule's peak wants its own tuning.
      norm: "l1" for Adam and its kin, "l2" for SGD.
      smoothing: the width of the median filter over the norms, as a share of the run.
      seeds: how many seeds, from 0; each refines its own run.

    Returns:
      The last validation record of each run, by arm.
    """
    console = Console()
    results: dict[str, list[dict]] = {"linear": [], "refined": []}
    runs = []
    for seed in range(seeds):
        suffix = f"-seed{seed}" if seeds > 1 else ""
        schedule = folder / f"refined{suffix}.json"
        refined = [
            "adamw.learning_rate = @refined()",
            f"refined.peak = {peak_factor * learning_rate!r}",
            "refined.total = %TOTAL_EXAMPLES",
            f"refined.path = {str(schedule)!r}",
        ]
        for arm, of_arm in (("linear", []), ("refined", refined)):
            label = arm + suffix
            console.rule(label)
            every = [*bindings, f"LEARNING_RATE = {learning_rate!r}", f"train.seed = {seed}", *of_arm]
            runs.append(folder / label)
            results[arm].append(configurables.bind(train, configs, every)(run=str(folder / label), label=label))
            if arm == "linear":
                with user_values():
                    save_refined(schedule, recorded_norms(folder / label), norm=norm, smoothing=smoothing)
    page = write_report(runs, folder / "report", title="A refined schedule against linear decay")
    console.print(comparison_table(runs))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = configurables.parser(
        "Train with linear decay, refine the schedule from the gradient norms, train again.", EXAMPLES
    )
    parser.add_argument("--run", default="runs/refine_schedule", help="the folder for the runs and the report")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak of linear decay (default 1e-3)")
    parser.add_argument("--peak-factor", type=float, default=1.0, help="refined peak / linear peak (default 1)")
    parser.add_argument("--norm", default="l1", choices=["l1", "l2"], help="l1 for Adam, l2 for SGD (default l1)")
    parser.add_argument("--smoothing", type=float, default=0.1, help="median filter, share of the run (default 0.1)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default 1)")
    arguments = parser.parse_args(argv)
    for name in ("learning_rate", "peak_factor", "seeds"):
        if not getattr(arguments, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be above 0")
    refine_schedule(
        Path(arguments.run),
        configs=arguments.config or ["debug.gin"],
        bindings=arguments.set,
        learning_rate=arguments.learning_rate,
        peak_factor=arguments.peak_factor,
        norm=arguments.norm,
        smoothing=arguments.smoothing,
        seeds=arguments.seeds,
    )


if __name__ == "__main__":
    run_command(main)
