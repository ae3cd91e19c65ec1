"""Measure the critical batch size along a run, by branching.

A base run trains with a small constant batch B and keeps checkpoints. From each of them branches go on with k B, k = 1,
2, 4, ..., for the same number of examples, the learning rate following by the coupling (the square root, for Adam). The
largest k that loses nothing says how large the batch may be there (Merrill et al., 2025, "Critical Batch Size
Revisited", https://arxiv.org/abs/2505.23971). The curve is what `critical_batch_following` reads.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from pydantic import Field, with_config
from rich.console import Console

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.statements import Bindings, Call, check_not_set, statements
from crescendo.experiments.papers import Paper
from crescendo.experiments.papers.critical_batch.curve import draw, make_curve, smoothed_loss
from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runs.checkpoint import Checkpoints
from crescendo.experiments.runs.run import Run, read_run
from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime import command, schemas
from crescendo.experiments.runtime.cache import use_compilation_cache
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, replace_file, replace_json
from crescendo.experiments.runtime.interruption import deadline, interrupted_at
from crescendo.experiments.runtime.text import duration
from crescendo.experiments.sweeps.cells import Cells
from crescendo.experiments.sweeps.finished import is_finished
from crescendo.experiments.trainer import loop
from crescendo.experiments.trainer.batch_sizes import FixedBatchSizes
from crescendo.experiments.trainer.session import Session, session_options
from crescendo.experiments.trainer.training import make_recorder, train
from crescendo.optim.measured import CriticalBatchCurve
from crescendo.pallas_kernels.console import plain_console

PAPER = Paper(
    title="Critical batch size revisited",
    authors="Merrill et al. 2025",
    arxiv="2505.23971",
    claim="Measured by branching, the critical batch size of OLMo 1B and 7B starts near 0, rises fast and flattens, "
    "whatever the model's size; the gradient noise scale is not a good stand-in for it.",
    command="crescendo critical_batch --config lm_30m.gin --config linux.gin --batch-size 16 --factors 1 2 4 8 16 "
    "--points 0.04 0.1 0.2 0.4 0.65 --branch-examples 6144 --seeds 2 --set 'train.evaluation_examples = 256'",
    device="one NVIDIA H100",
    expected="23, 45, 128, 181 and 181 rows of 512 tokens at 1.3M to 21.8M tokens: low, rising, flattening; the "
    "noise scale lies below by a factor of 1.0 to 2.2.",
)

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

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    examples: Annotated[int, Field(ge=1, lt=2**63)]
    factor: Annotated[int, Field(ge=1, lt=2**31)]


@with_config(schemas.STRICT)
class BranchRecord(TypedDict):
    """A line of `branches.jsonl`: a branch, and its loss at each evaluation, null where it wasn't finite."""

    seed: int
    examples: int
    factor: int
    losses: Annotated[list[float | None], Field(min_length=EVALUATIONS, max_length=EVALUATIONS)]


# The command's options for what it binds.
OPTIONS = {
    "train.batch_size": "--batch-size",
    "train.base_batch_size": "--batch-size",
    "train.seed": "--first-seed",
    "train.keep_checkpoints_at_examples": "--points",
}


def critical_batch(
    run: Path = Path("runs/critical_batch"),
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
    """Measures the critical batch size along a run, by branching.

    Writes `critical_batch.json` and `critical_batch.png`.

    Args:
      run: the folder: gets a run folder for each base run, a line of branches.jsonl for each branch, and the curve.
      configs: gin files that define everything but the batch size.
      bindings: further gin statements.
      batch_size: B of the base run, in examples.
      factors: k of the branches, 1 or more; 1 itself is always run.
      points: where branches begin, as shares of the base run.
      branch_examples: the length of every branch.
      tolerance: how much a larger batch may lose, in nats.
      seeds: how many base runs.
      first_seed: the seed of the first; a second machine can take others, and the lines of their branches.jsonl and
        their base runs' folders be put together.
      minutes: stop after the branch, or the step of a base run, that passes it; the same command goes on.

    Returns:
      The curve; see `make_curve`.

    Raises:
      UserError: for a value out of its range, or a folder of other settings.
      Interrupted: when `minutes` are over or the process is asked to stop, with branches left.
    """
    factors = sorted({1, *factors})
    _check(batch_size, factors, points, branch_examples, tolerance, seeds)
    stop, console = deadline(minutes), plain_console()
    use_compilation_cache()
    base: Bindings = {
        "train.batch_size": batch_size,
        "train.base_batch_size": batch_size,
        "train.max_microbatch_examples": max(1, batch_size // 2),
        "train.noise_scale": Call("gradient_noise_scale"),
        "gradient_noise_scale.norm_layers": True,
    }
    check_not_set("critical_batch", {**dict.fromkeys(base), **OPTIONS}, bindings)
    configurables.bind(train, configs, bindings, own=statements(base))
    arguments = configurables.arguments(train)
    for name in ("stop_at_loss", "stop_after_minutes", "stop_after_tokens"):
        if arguments[name] is not None:
            raise UserError(f"train.{name} = {arguments[name]}: branches begin all along the base run: leave it out")
    session = Session(**session_options(arguments), further_sizes=[k * batch_size for k in factors])
    starts = _starts(points, arguments["total_examples"], batch_size, branch_examples)
    # What finished branches and those to come have in common; points, factors and seeds may be added.
    fixed = {
        "batch_size": batch_size,
        "branch_examples": branch_examples,
        "evaluations": EVALUATIONS,
        "total_examples": arguments["total_examples"],
        "sequence_length": session.task.units_per_example,
        "fingerprint": session.task.fingerprint,
    }
    settings = {**fixed, "factors": factors, "starts_examples": starts, "tolerance": tolerance, "seeds": seeds}
    numbers = range(first_seed, first_seed + seeds)
    every = [Branch(seed, start, factor) for seed in numbers for start in starts for factor in factors]
    with run_folder.locked(run):
        branches = Cells(run, "branches.jsonl", every, fixed, BranchRecord)
        for seed in numbers:
            name = f"base-seed{seed}"
            of_seed = statements({"train.seed": seed, "train.keep_checkpoints_at_examples": starts})
            bound = configurables.bind(train, configs, bindings, own=[*statements(base), *of_seed])
            finished = is_finished(run / name, but_for=["train.keep_checkpoints_at_examples"])
            if not finished and any(branch.seed == seed for branch in branches.left):
                console.rule(name)
                with interrupted_at(stop):
                    bound(run=str(run / name), label=name)
        rows = arguments["evaluation_examples"]
        branches.run(run_branches(session, rows, run, branches.left, batch_size, branch_examples, console), stop)
        curve = make_curve(branches.finished, settings)
        if curve["tokens"]:
            _show(run, curve, [read_run(run / f"base-seed{seed}") for seed in numbers], console)
    branches.check_finished()
    return curve


def _starts(points: Sequence[float], total_examples: int, batch_size: int, branch_examples: int) -> list[int]:
    """Where the branches begin, in examples: at ends of the base run's batches."""
    starts = [round(point * total_examples / batch_size) * batch_size for point in points]
    if len(set(starts)) < len(starts) or starts[-1] + branch_examples > total_examples or starts[0] == 0:
        raise UserError(
            f"--points {' '.join(map(str, points))} of {total_examples} examples: they must differ by at least "
            f"a batch, and the last must leave room for a branch of {branch_examples} examples"
        )
    return starts


def _show(folder: Path, curve: dict[str, Any], runs: Sequence[Run], console: Console) -> None:
    """Writes the curve and its picture, and prints a line for each point."""
    replace_json(folder / "critical_batch.json", CriticalBatchCurve.model_validate(curve).model_dump())
    with file_access("write", folder):
        replace_file(folder / "critical_batch.png", draw(curve, runs))
    columns = (curve[key] for key in ("tokens", "critical_batch_size", "interval"))
    for tokens, value, (low, high) in zip(*columns, strict=True):
        bound_above = f"{high:,.0f}" if high else "?"
        line = f"{tokens:>13,} tokens: critical batch size {value:,.0f} examples, {low:,.0f} to {bound_above}"
        console.print(line, highlight=False)
    console.print(f"{folder / 'critical_batch.json'}, {folder / 'critical_batch.png'}", soft_wrap=True)


def run_branches(
    session: Session,
    evaluation_examples: int,
    folder: Path,
    branches: Sequence[Branch],
    batch_size: int,
    branch_examples: int,
    console: Console,
) -> Iterator[dict[str, Any]]:
    """The record of each branch: its fields, and `losses` on held-out rows at even intervals up to its end.

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
        yield {**branch._asdict(), "losses": losses}


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
    for name, value in {"tolerance": tolerance, "seeds": seeds}.items():
        if not 0 < value < math.inf:
            raise UserError(f"--{name} {value} must be above 0 and finite")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    return command.make_parser(critical_batch, EXAMPLES, configurables.parser)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command.call(critical_batch, parser().parse_args(argv))
