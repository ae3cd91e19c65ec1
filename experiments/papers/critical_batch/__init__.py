"""The critical batch size along a run, by branching: `python -m crescendo.experiments.papers.critical_batch`.

A base run trains with a small constant batch B and keeps checkpoints. From each of them branches go on with k B, k = 1,
2, 4, ..., for the same number of examples, the learning rate following by the coupling (the square root, for Adam). The
largest k that loses nothing says how large the batch may be there (Merrill et al., 2025, "Critical Batch Size
Revisited", https://arxiv.org/abs/2505.23971). The curve is what `critical_batch_following` reads.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.papers.critical_batch.curve import draw, make_curve, smoothed_loss
from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runs.checkpoint import Checkpoints
from crescendo.experiments.runs.results import Results
from crescendo.experiments.runs.run import is_complete, read_run
from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime.cache import use_compilation_cache
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, replace_file
from crescendo.experiments.runtime.interruption import Interrupted, Interruption, interrupted_at
from crescendo.experiments.runtime.text import duration
from crescendo.experiments.trainer import loop
from crescendo.experiments.trainer.batch_sizes import FixedBatchSizes
from crescendo.experiments.trainer.session import Session, session_options
from crescendo.experiments.trainer.training import make_recorder, train

# A branch is evaluated so often, at even intervals; its loss is the moving average of these.
EVALUATIONS = 8

EXAMPLES = """examples:
  crescendo critical_batch --batch-size 2 --branch-examples 256
  crescendo critical_batch --config lm_30m.gin --set 'text_files.paths = ["books/*.txt"]' \\
    --batch-size 16 --factors 1 2 4 8 16 --branch-examples 8192 --seeds 2 --minutes 8

The same command goes on where it stopped: a finished branch is never run again. Then train with
  --set 'train.batch_size = @critical_batch_following()' --set 'critical_batch_following.curve = "FILE.json"' ..."""


class Branch(NamedTuple):
    """One continuation: from which base run, from where, and with how many times its batch."""

    seed: int
    examples: int
    factor: int


def critical_batch(
    folder: Path,
    *,
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    batch_size: int = 2,
    factors: Sequence[int] = (1, 2, 4, 8),
    points: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.7),
    branch_examples: int = 256,
    tolerance: float = 0.01,
    seeds: int = 1,
    first_seed: int = 0,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Measures the curve, and writes `critical_batch.json` and `critical_batch.png`.

    Args:
      folder: gets a run folder for each base run, `branches.jsonl` with a line for each finished branch, and the curve.
      configs: gin files that define everything but the batch size.
      bindings: further gin statements.
      batch_size: B of the base run, in examples.
      factors: the branches' k, whole numbers from 1 on; 1 itself is always run.
      points: where branches begin, as shares of the base run.
      branch_examples: the length of every branch.
      tolerance: how much a larger batch may lose, in nats.
      seeds: how many base runs.
      first_seed: the seed of the first; a second machine can take others, and the lines of their `branches.jsonl` and
        their base runs' folders be put together.
      minutes: stop after the branch, or the step of a base run, that passes it; None: run to the end.

    Returns:
      The curve; see `make_curve`.

    Raises:
      UserError: for a value out of its range, or a folder of other settings.
      Interrupted: when `minutes` are over or the process is asked to stop, with branches left.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    factors = sorted({1, *factors})
    _check(batch_size, factors, points, branch_examples, tolerance, seeds, minutes)
    console = Console()
    use_compilation_cache()
    base_bindings = [
        *bindings,
        f"train.batch_size = {batch_size}",
        f"train.base_batch_size = {batch_size}",
        f"train.max_microbatch_examples = {max(1, batch_size // 2)}",
        "train.noise_scale = @gradient_noise_scale()",
        "gradient_noise_scale.norm_layers = True",
    ]
    configurables.bind(train, configs, base_bindings)
    arguments = configurables.arguments(train)
    session = Session(**session_options(arguments), further_sizes=[k * batch_size for k in factors])
    total_examples = arguments["total_examples"]
    starts = [round(point * total_examples / batch_size) * batch_size for point in points]
    if len(set(starts)) < len(starts) or starts[-1] + branch_examples > total_examples or starts[0] == 0:
        raise UserError(
            f"--points {' '.join(map(str, points))} of {total_examples} examples: they must differ by at least "
            f"a batch, and the last must leave room for a branch of {branch_examples} examples"
        )
    settings = {
        "batch_size": batch_size,
        "factors": factors,
        "starts_examples": starts,
        "branch_examples": branch_examples,
        "evaluations": EVALUATIONS,
        "tolerance": tolerance,
        "seeds": seeds,
        "total_examples": total_examples,
        "sequence_length": session.task.units_per_example,
        "fingerprint": session.task.fingerprint,
    }
    numbers = range(first_seed, first_seed + seeds)
    every = [Branch(seed, start, factor) for seed in numbers for start in starts for factor in factors]
    with run_folder.locked(folder):
        results = Results(folder, "branches.jsonl", Branch)
        # Finished branches stay as they are: points, factors and seeds may be added.
        added = ("factors", "starts_examples", "seeds", "tolerance")
        results.check_same({name: value for name, value in settings.items() if name not in added})
        finished = results.records
        left = [branch for branch in every if branch not in finished]
        for seed in dict.fromkeys(branch.seed for branch in left):
            base = folder / f"base-seed{seed}"
            if not is_complete(base):
                console.rule(base.name)
                at = f"train.keep_checkpoints_at_examples = {starts}"
                bound = configurables.bind(train, configs, [*base_bindings, f"train.seed = {seed}", at])
                with interrupted_at(deadline):
                    bound(run=str(base), label=base.name)
        with Interruption() as interruption:
            evaluation_examples = arguments["evaluation_examples"]
            for branch, losses in run_branches(
                session, evaluation_examples, folder, left, batch_size, branch_examples, console
            ):
                # JSON knows no NaN.
                numbers_or_none = [loss if math.isfinite(loss) else None for loss in losses]
                results.add(branch._asdict() | {"losses": numbers_or_none})
                if interruption.requested or time.monotonic() > deadline:
                    break
        curve = make_curve([finished[branch] for branch in every if branch in finished], settings)
        if curve["tokens"]:
            runs = [read_run(folder / f"base-seed{seed}") for seed in numbers]
            with file_access("write", folder):
                replace_file(folder / "critical_batch.json", (json.dumps(curve, indent=2) + "\n").encode())
                replace_file(folder / "critical_batch.png", draw(curve, runs))
            for tokens, value, (low, high) in zip(*(curve[key] for key in _COLUMNS), strict=True):
                bound_above = f"{high:,.0f}" if high else "?"
                line = f"{tokens:>13,} tokens: critical batch size {value:,.0f} examples, {low:,.0f} to {bound_above}"
                console.print(line, highlight=False)
            console.print(f"{folder / 'critical_batch.json'}, {folder / 'critical_batch.png'}", soft_wrap=True)
    if remaining := sum(branch not in finished for branch in every):
        raise Interrupted(f"{remaining} of {len(every)} branches are left in {folder}; the same command goes on")
    return curve


_COLUMNS = ("tokens", "critical_batch_size", "interval")


def run_branches(
    session: Session,
    evaluation_examples: int,
    folder: Path,
    branches: Sequence[Branch],
    batch_size: int,
    branch_examples: int,
    console: Console,
) -> Iterator[tuple[Branch, list[float]]]:
    """Each branch with its losses on held-out rows, at even intervals up to its end.

    Args:
      session: of the base run, whose step serves every branch's batch.
      evaluation_examples: how many held-out rows.
      folder: with the base runs.
      branches: which ones.
      batch_size: of the base run.
      branch_examples: the length of a branch.
      console: says how it goes.
    """
    if not branches:
        return
    begin, evaluate = time.monotonic(), session.evaluation(evaluation_examples)
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=session.shardings)
    loaded: tuple[int, int] | None = None
    for number, branch in enumerate(branches):
        if loaded != (branch.seed, branch.examples):
            with Checkpoints(folder / f"base-seed{branch.seed}" / "checkpoints", read_only=True) as checkpoints:
                restored, clock = checkpoints.restore_at(branch.examples, session.abstract_state)
            loaded = (branch.seed, branch.examples)
        losses = _run_branch(session, evaluate, copy(restored), clock, branch, batch_size, branch_examples)
        left = (time.monotonic() - begin) / (number + 1) * (len(branches) - number - 1)
        console.print(
            f"{number + 1}/{len(branches)}  seed {branch.seed}  from {branch.examples:,} examples  batch "
            f"{branch.factor} x {batch_size}  loss {smoothed_loss(losses):.4f}  about {duration(left)} left",
            highlight=False,
            soft_wrap=True,
        )
        yield branch, losses


def _run_branch(
    session: Session,
    evaluate: Callable[[TrainState], dict[str, float]],
    state: TrainState,
    clock: Clock,
    branch: Branch,
    batch_size: int,
    branch_examples: int,
) -> list[float]:
    start, size, losses = clock.examples_seen, branch.factor * batch_size, list[float]()

    def add_loss(clock: Clock, state: TrainState) -> None:
        del clock
        losses.append(evaluate(state)["loss"])

    # One event for each evaluation: a large batch may pass several of their places in one step.
    events = [
        loop.Event(add_loss, at_examples=(start + round(branch_examples * i / EVALUATIONS),))
        for i in range(1, EVALUATIONS + 1)
    ]
    loop.run(
        session,
        state,
        dataclasses.replace(clock, batch_size=size),
        end=start + branch_examples,
        recorder=make_recorder(session, lambda record: None),
        feed=session.feed(branch.seed),
        batch_sizes=FixedBatchSizes(size),
        events=events,
        max_bad_steps=sys.maxsize,  # a branch that diverges is a result too
    )
    return losses


def _check(
    batch_size: int,
    factors: Sequence[int],
    points: Sequence[float],
    branch_examples: int,
    tolerance: float,
    seeds: int,
    minutes: float | None,
) -> None:
    """That the command's values lie in their ranges."""
    if batch_size < 2:
        raise UserError(f"--batch-size {batch_size} must be at least 2: the noise scale compares its halves")
    for k in factors:
        if k < 1:
            raise UserError(f"--factors {k} must be at least 1: branches multiply the base run's batch")
    if not points or any(not 0 < point < 1 for point in points) or list(points) != sorted(points):
        raise UserError(f"--points {' '.join(map(str, points))}: give shares of the run between 0 and 1, increasing")
    largest = max(factors) * batch_size
    if branch_examples < 1 or branch_examples % largest:
        above = -(-max(1, branch_examples) // largest) * largest
        raise UserError(
            f"--branch-examples {branch_examples} must be whole batches of the largest branch, {largest} examples: "
            f"use {above}"
        )
    for name, value in {"tolerance": tolerance, "minutes": minutes, "seeds": seeds}.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value} must be above 0 and finite")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = configurables.parser("Measure the critical batch size along a run, by branching.", EXAMPLES)
    add = parser.add_argument
    add("--run", default="runs/critical_batch", help="the folder for the runs and the curve")
    add("--batch-size", type=int, default=2, help="B of the base run, in examples (default 2)")
    add("--factors", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="of the branches (default 1 2 4 8)")
    add(
        *("--points",),
        type=float,
        nargs="+",
        default=[0.05, 0.1, 0.2, 0.4, 0.7],
        metavar="SHARE",
        help="of the base run, where branches begin (default 0.05 0.1 0.2 0.4 0.7)",
    )
    add("--branch-examples", type=int, default=256, help="the length of a branch (default 256)")
    add("--tolerance", type=float, default=0.01, help="what a larger batch may lose, in nats (default 0.01)")
    add("--seeds", type=int, default=1, help="how many base runs (default 1)")
    add("--first-seed", type=int, default=0, help="the first one's seed (default 0)")
    add("--minutes", type=float, help="stop then; the same command goes on")
    arguments = vars(parser.parse_args(argv))
    critical_batch(
        Path(arguments.pop("run")),
        configs=arguments.pop("config") or ["debug.gin"],
        bindings=arguments.pop("set"),
        **arguments,
    )


if __name__ == "__main__":
    run_command(main)
