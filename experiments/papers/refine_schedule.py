"""Refine a schedule by a run's gradient norms, and train again.

Defazio et al. 2023, "Optimal Linear Decay Learning Rate Schedules and Further Refinements": the norms of one run's
gradients give the schedule that a bound on the last iterate's loss prefers (`crescendo.optim.refinement`). Any finished
run will do as the first one: its norms are in its `metrics.jsonl`.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.statements import Call
from crescendo.experiments.papers import Paper
from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime import command, schemas
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.sweeps.arms import LEARNING_RATE, Trial, compare_arms
from crescendo.optim.measured import RefinedSchedule
from crescendo.optim.refinement import GradientNorms, save_refined

PAPER = Paper(
    title="Optimal linear decay learning rate schedules and further refinements",
    authors="Defazio et al. 2023",
    arxiv="2310.07831",
    claim="Schedules refined from the gradient norms of a first run end as low as linear decay or lower, on a wide "
    "range of tasks.",
    command="crescendo refine_schedule --seeds 3 --learning-rate 2e-3",
    device="one NVIDIA H100, or two CPU cores",
    expected="Refinement loses: 1.70 nats against 1.51, because the debug model's norms triple while its loss still "
    "falls. On a 30M model, whose norms are flat, it wins by 0.06 to 0.19.",
)

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
    if "gradient_l1_norm" not in train_columns:
        raise UserError(f"{run} recorded no gradient_l1_norm: train it again, or give another run")
    norms = np.stack([train_columns["gradient_l1_norm"], train_columns["gradient_norm"]])
    good = np.isfinite(norms).all(axis=0) & (norms > 0).all(axis=0)
    if good.sum() < 2:
        raise UserError(f"{run} has {good.sum()} steps with a gradient norm; at least 2 make a schedule")
    # Where the step's rate was read: the middle of its batch.
    clock = train_columns["examples_seen"] - train_columns["batch_size"] / 2
    return GradientNorms(clock[good].astype(float), *norms[:, good])


def refine_schedule(
    run: Path = Path("runs/refine_schedule"),
    *,
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    learning_rate: float = 1e-3,
    peak_factor: float = 1.0,
    norm: Literal["l1", "l2"] = "l1",
    smoothing: float = 0.1,
    seeds: int = 1,
) -> dict[str, list[dict]]:
    """Trains with linear decay, refines the schedule from the gradient norms, and trains again.

    Both train with every seed, each refined schedule from the linear run of its own; a table is printed and a report
    written.

    Args:
      run: the folder for the runs, the refined schedules as JSON, `comparison.json` and the report.
      configs: gin files that define the macro `LEARNING_RATE`, with `adamw` on `linear`.
      bindings: further gin statements.
      learning_rate: the peak of linear decay.
      peak_factor: the refined schedule's peak is that times this; a refined schedule's peak wants its own tuning.
      norm: l1 for Adam and its kin, l2 for SGD.
      smoothing: the width of the median filter over the norms, as a share of the run.
      seeds: how many seeds, from 0.

    Returns:
      The last validation record of each run, by arm.
    """
    for name, value in {"learning-rate": learning_rate, "peak-factor": peak_factor}.items():
        if not 0 < value < math.inf:
            raise UserError(f"--{name} {value} must be above 0 and finite")

    def refined(trial: Trial) -> str:
        path = trial.folder.with_name(f"{trial.folder.name}.json")
        if path.is_file() and (trial.folder / "run.json").is_file():
            # The run's configuration names the file, and not what made it.
            run_folder.check_same(trial.folder, _options(path), {"norm": norm, "smoothing": smoothing})
        with user_values():
            save_refined(path, recorded_norms(trial.before["linear"]), norm=norm, smoothing=smoothing)
        return str(path)

    outcomes = compare_arms(
        run,
        {
            "linear": {},
            "refined": {
                "adamw.learning_rate": Call("refined"),
                "refined.peak": peak_factor * learning_rate,
                "refined.path": refined,
            },
        },
        command="refine_schedule",
        title="A refined schedule against linear decay",
        configs=configs,
        bindings=bindings,
        common={LEARNING_RATE: learning_rate},
        options={LEARNING_RATE: "--learning-rate", "refined.peak": "--peak-factor F"},
        seeds=seeds,
    )
    return {name: outcome.records for name, outcome in outcomes.items()}


def _options(path: Path) -> dict[str, Any]:
    """With which a refined schedule was written."""
    content = schemas.read(path, RefinedSchedule, way_on="give another folder with --run")
    return {"norm": content.norm, "smoothing": content.smoothing}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    return command.make_parser(refine_schedule, EXAMPLES, configurables.parser)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command.call(refine_schedule, parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
