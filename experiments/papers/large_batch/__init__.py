"""Compare optimizers over batch sizes: the picture of the LAMB paper.

The number of epochs is fixed: every batch size sees the same examples, so a large batch makes few steps; the question
is how large it can grow before quality suffers, under each optimizer (You et al., 2020, "Large Batch Optimization for
Deep Learning", https://arxiv.org/abs/1904.00962). The learning rate follows the batch by the optimizer's own rule,
and a small sweep around it is left to the validation split; what is reported comes from the test split.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, with_config
from rich.console import Console

from crescendo import optim, parallel
from crescendo.experiments.papers import Paper
from crescendo.experiments.papers.large_batch.recipes import (
    TASKS,
    Size,
    Workload,
    fingerprint,
    load_prepared,
    save_prepared,
    split,
)
from crescendo.experiments.papers.large_batch.results import draw, summarize, table
from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runtime import command, schemas
from crescendo.experiments.runtime.cache import use_compilation_cache
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, local_path, replace_file, replace_json
from crescendo.experiments.runtime.interruption import deadline
from crescendo.experiments.runtime.text import duration
from crescendo.experiments.sweeps.batched import make_sweep
from crescendo.experiments.sweeps.cells import Cells
from crescendo.experiments.tasks.base import Task
from crescendo.pallas_kernels.console import plain_console

PAPER = Paper(
    title="Large batch optimization for deep learning: training BERT in 76 minutes",
    authors="You et al. 2020",
    arxiv="1904.00962",
    claim="With a trust ratio for each layer (LAMB) BERT trains at batches of 64k and 32k without loss of quality, in "
    "76 minutes.",
    command="crescendo large_batch --task mlm --optimizers lamb adamw "
    "--batch-sizes 64 128 256 512 1024 2048 4096 --multipliers 0.03125 0.0625 0.125 0.25 0.5 1 2 4",
    device="one NVIDIA H100",
    expected="It does not show on a small model: LAMB stays within 1% of its smallest batch's accuracy up to 128 rows, "
    "AdamW up to 256, and from 256 on AdamW is ahead.",
)

WARMUP_FRACTION = 0.1
# Of what a cell means: raised when the same settings give other numbers.
VERSION = 2
MULTIPLIERS = (0.25, 0.5, 1.0, 2.0, 4.0)

EXAMPLES = """examples:
  crescendo large_batch --task mlm --size debug
  crescendo large_batch --task images --optimizers lamb adamw --batch-sizes 64 1024 16384
  crescendo large_batch --task images --prepare images.npz
  crescendo large_batch --task images --data images.npz --minutes 8

The same command goes on where it stopped: a finished cell is never run again."""


class Cell(NamedTuple):
    """One optimizer at one batch size with one seed; its learning rates are swept together."""

    optimizer: str
    batch_size: Annotated[int, Field(ge=1, lt=2**31)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]


@with_config(schemas.STRICT)
class SweptRun(TypedDict):
    """A run of a cell's sweep; null for what wasn't finite."""

    multiplier: Annotated[float, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)] | None
    first_loss: float | None
    train_loss: float | None
    validation_loss: float | None
    validation_accuracy: Annotated[float, Field(ge=0, le=1)] | None
    test_loss: float | None
    test_accuracy: Annotated[float, Field(ge=0, le=1)] | None


@with_config(schemas.STRICT)
class CellRecord(TypedDict):
    """A line of `cells.jsonl`: a cell, and a run for each multiplier."""

    optimizer: str
    batch_size: int
    seed: int
    steps: Annotated[int, Field(ge=1)]
    seconds: Annotated[float, Field(ge=0)]
    device: str
    runs: Annotated[list[SweptRun], Field(min_length=1)]


def large_batch(
    task: str,
    run: Path | None = None,
    *,
    size: str = "full",
    optimizers: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    multipliers: Sequence[float] = MULTIPLIERS,
    epochs: float | None = None,
    train_examples: int | None = None,
    seeds: int = 1,
    minutes: float | None = None,
    data: Path | None = None,
) -> dict[str, Any]:
    """Compares optimizers over batch sizes, every batch size on the same examples.

    Runs every cell that isn't finished, then prints the table and writes `results.json` and `large_batch.png`.

    Args:
      task: mlm or images.
      run: the folder: gets run.json, a line of cells.jsonl for each cell, and the results; by default
        runs/large_batch_TASK.
      size: full, for one GPU, or debug, for a CPU.
      optimizers: names with a recipe in the task; by default the task's own choice.
      batch_sizes: in examples; by default those of `size`.
      multipliers: of the learning rate that the rule gives.
      epochs: over the training examples, the same for every batch size; by default those of `size`.
      train_examples: use only so many; by default those of `size`.
      seeds: how many, from 0, of the parameters, the order of the data and the masks.
      minutes: stop after the cell that passes it; the same command goes on.
      data: a file that --prepare wrote, where the data themselves aren't at hand.

    Returns:
      What `results.json` holds; see `summarize`.

    Raises:
      UserError: for a value out of its range, a batch larger than the data, or a folder of other settings.
      Interrupted: when `minutes` are over or the process is asked to stop, with cells left.
    """
    chosen, scale = _choose(task, size)
    names = list(dict.fromkeys(optimizers)) or list(chosen.optimizers)
    sizes = sorted(set(batch_sizes)) or list(scale.batch_sizes)
    epochs = scale.epochs if epochs is None else epochs
    for name in names:
        if name not in chosen.recipes:
            raise UserError(f"--optimizers {name}: no such optimizer; the task has {', '.join(chosen.recipes)}")
    _check_positive(batch_sizes=sizes, multipliers=multipliers, epochs=[epochs], seeds=[seeds])
    _check_positive(train_examples=[train_examples])
    stop, console = deadline(minutes), plain_console()
    folder = Path(f"runs/large_batch_{task}") if run is None else run
    arrays = chosen.prepare() if data is None else load_prepared(data, chosen)
    train = split(arrays, "train", train_examples or scale.train_examples)
    held_out = [split(arrays, name, scale.held_out_examples) for name in ("validation", "test")]
    examples = _count(train)
    total = int(epochs * examples)
    if max(sizes) > min(total, examples):
        raise UserError(
            f"--batch-sizes {max(sizes)} is larger than the data ({examples:,} training examples, {epochs:g} epochs): "
            "use smaller batches, or more data or epochs"
        )
    fixed = {
        "version": VERSION,
        "task": task,
        "model": dataclasses.asdict(scale.model),
        "recipes": {name: [*recipe[:2], dict(recipe.options)] for name, recipe in chosen.recipes.items()},
        "multipliers": list(multipliers),
        "train_examples": examples,
        "total_examples": total,
        "data": fingerprint(arrays),
    }
    use_compilation_cache()
    every = [Cell(name, size, seed) for size, name, seed in itertools.product(sizes, names, range(seeds))]
    with run_folder.locked(folder):
        cells = Cells(folder, "cells.jsonl", every, fixed, CellRecord)
        _check_swept(cells, multipliers)
        if cells.left:
            stack = jax.tree.map(lambda *parts: np.concatenate(parts), *held_out)
            inputs = jax.device_put((train, stack))
            programs = Programs(chosen, scale, chosen.make(scale.model, arrays), multipliers, total, inputs, max(sizes))
            with contextlib.closing(run_cells(programs, cells, _count(held_out[0]), console)) as records:
                cells.run(records, stop)
        summary = summarize(cells.finished, chosen, fixed)
        replace_json(folder / "results.json", summary)
        with file_access("write", folder):
            replace_file(folder / "large_batch.png", draw(summary))
        console.print(table(summary))
        console.print(f"{folder / 'results.json'}, {folder / 'large_batch.png'}", highlight=False, soft_wrap=True)
    cells.check_finished()
    return summary


def _check_swept(cells: Cells[Cell], multipliers: Sequence[float]) -> None:
    """That every finished cell has a run for each multiplier."""
    for record in cells.finished:
        if (swept := [run["multiplier"] for run in record["runs"]]) != list(multipliers):
            raise UserError(
                f"{cells.path}: {record['optimizer']} at batch {record['batch_size']} seed {record['seed']} has the "
                f"multipliers {swept}, not {list(multipliers)}: remove its line, and it is run again"
            )


def run_cells(
    programs: "Programs", cells: Cells[Cell], validation_examples: int, console: Console
) -> Generator[dict[str, Any]]:
    """The record of each cell that is left, one after the other; says how it goes."""
    # The next programs are compiled while one trains: a small model compiles longer than it trains. But few at once,
    # lest the first wait for all.
    pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 8))
    try:
        left = cells.left
        compiled = {key: pool.submit(programs.compile, *key) for key in dict.fromkeys(map(programs.key, left))}
        for cell in left:
            if not (program := compiled[programs.key(cell)]).done():
                console.print(f"compiling {cell.optimizer} at batch {cell.batch_size:,}", highlight=False)
            record = programs.run(cell, program, validation_examples)
            console.print(progress(cell, record, cells), highlight=False, soft_wrap=True)
            yield record
    finally:
        pool.shutdown(cancel_futures=True)


class Programs:
    """Compiles and runs cells on data that stay on the device.

    Args:
      workload: what to train.
      size: how large.
      task: of the workload's model and data.
      multipliers: the sweep.
      total: examples in a run.
      inputs: the training rows and the held-out rows, on the device.
      largest: of the batch sizes.
    """

    def __init__(
        self,
        workload: Workload,
        size: Size,
        task: Task,
        multipliers: Sequence[float],
        total: int,
        inputs: Any,
        largest: int,
    ):
        self._workload, self._task, self._total, self._inputs = workload, task, total, inputs
        self._multipliers, self._largest = multipliers, largest
        self._side_by_side = workload.side_by_side and jax.default_backend() != "cpu"
        members = len(multipliers) if self._side_by_side else 1
        self._microbatch_bound = max(1, size.max_microbatch_examples // members)

    def key(self, cell: Cell) -> tuple[str, int]:
        """The optimizer and the microbatch: cells that share them share a program, whatever their batch size."""
        plan = parallel.plan_batches([cell.batch_size], 1, self._microbatch_bound)
        return cell.optimizer, plan.microbatch_examples

    def compile(self, optimizer: str, microbatch: int) -> jax.stages.Compiled:
        """The whole sweep of a cell as one program; the batch size and the seed are arguments."""
        most = -(-self._largest // microbatch)
        sweep = make_sweep(
            self._task,
            functools.partial(optim.OPTIMIZERS[optimizer], **self._workload.recipes[optimizer].options),
            most,
            warmup_fraction=WARMUP_FRACTION,
            side_by_side=self._side_by_side,
        )
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._inputs)
        order = jax.ShapeDtypeStruct((self._total // microbatch, microbatch), jnp.int32)
        peaks = jax.ShapeDtypeStruct((len(self._multipliers),), jnp.float32)
        count, seed = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32)
        return jax.jit(sweep).lower(*shapes, order, count, peaks, seed).compile()

    def peaks(self, cell: Cell) -> np.ndarray:
        """The peak learning rates of a cell's sweep, float32 [multipliers]."""
        recipe = self._workload.recipes[cell.optimizer]
        factor = optim.learning_rate_factor(recipe.rule, cell.batch_size, self._workload.base_batch_size)
        return recipe.learning_rate * float(factor) * np.array(self._multipliers, np.float32)

    def run(self, cell: Cell, compiled: "Future[jax.stages.Compiled]", validation_examples: int) -> dict[str, Any]:
        """Trains the sweep of a cell; its record for `cells.jsonl`."""
        program = compiled.result()
        train, _ = self._inputs
        _, microbatch = self.key(cell)
        order = example_order(_count(train), self._total, microbatch, cell.seed)
        count, steps = cell.batch_size // microbatch, self._total // cell.batch_size
        peaks = self.peaks(cell)
        start = time.monotonic()
        inputs = *self._inputs, order, np.int32(count), peaks, np.uint32(cell.seed)
        losses, scores = jax.device_get(program(*inputs))
        losses = losses[:, :steps]
        seconds = time.monotonic() - start
        runs = []
        for i, multiplier in enumerate(self._multipliers):
            run: dict[str, Any] = {"multiplier": multiplier, "learning_rate": float(peaks[i])}
            run |= {"first_loss": losses[i][0], "train_loss": np.mean(losses[i][-max(1, len(losses[i]) // 10) :])}
            halves = {"validation": scores[i][:validation_examples], "test": scores[i][validation_examples:]}
            for name, rows in halves.items():
                loss, correct, weight = rows.sum(axis=0, dtype=np.float64)
                run |= {f"{name}_loss": loss / weight, f"{name}_accuracy": correct / weight}
            # A run that diverged has no numbers: JSON knows no NaN.
            runs.append({key: float(value) if math.isfinite(value) else None for key, value in run.items()})
        return {
            **cell._asdict(),
            "steps": steps,
            "seconds": round(seconds, 3),
            "device": jax.devices()[0].device_kind,
            "runs": runs,
        }


def example_order(examples: int, total: int, microbatch: int, seed: int) -> np.ndarray:
    """Which example comes when, int32 [total // microbatch, microbatch]: a permutation an epoch.

    The same for every batch size; what doesn't fill a last microbatch is left out.

    >>> example_order(3, total=7, microbatch=2, seed=0).shape
    (3, 2)
    """
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(examples) for _ in range(-(-total // examples))])
    microbatches = total // microbatch
    return order[: microbatches * microbatch].reshape(microbatches, microbatch).astype(np.int32)


def progress(cell: Cell, record: dict[str, Any], cells: Cells[Cell]) -> str:
    """A line on the cell just finished, and the time left: that of the mean finished cell of each batch size."""
    seconds: dict[int, list[float]] = {}
    for done in (*cells.records.values(), record):
        seconds.setdefault(done["batch_size"], []).append(done["seconds"])
    of_any = statistics.mean(itertools.chain(*seconds.values()))
    left = [each for each in cells.left if each != cell]
    seconds_left = sum(statistics.mean(seconds.get(each.batch_size, [of_any])) for each in left)
    accuracies = [run["test_accuracy"] for run in record["runs"]]
    shown = " ".join("diverged" if accuracy is None else f"{accuracy:.2%}" for accuracy in accuracies)
    return (
        f"{len(cells.cells) - len(left)}/{len(cells.cells)}  "
        f"{cell.optimizer} batch {cell.batch_size:,} seed {cell.seed}  "
        f"{record['steps']:,} steps in {record['seconds']:.1f} s  accuracy {shown}  about {duration(seconds_left)} left"
    )


def prepare(path: Path, task: str, *, train_examples: int | None = None) -> None:
    """Writes the data of a task, or its first `train_examples` and all that is held out, as one file for `--data`."""
    chosen, _ = _choose(task, "full")
    _check_positive(train_examples=[train_examples])
    arrays = chosen.prepare()
    save_prepared(path, chosen, {k: x[:train_examples] if k.startswith("train/") else x for k, x in arrays.items()})
    plain_console().print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", highlight=False, soft_wrap=True)


def _choose(task: str, size: str) -> tuple[Workload, Size]:
    if task not in TASKS:
        raise UserError(f"--task {task}: no such task; there are {', '.join(TASKS)}")
    sizes = TASKS[task].sizes
    if size not in sizes:
        raise UserError(f"--size {size}: no such size; there are {', '.join(sizes)}")
    return TASKS[task], sizes[size]


def _check_positive(**values: Sequence[float | None]) -> None:
    for name, several in values.items():
        if not several:
            raise UserError(f"--{name.replace('_', '-')} is empty: give at least one")
        for value in several:
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {value} must be above 0 and finite")


def _count(rows: Any) -> int:
    """How many examples a tree of arrays holds."""
    return len(jax.tree.leaves(rows)[0])


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = command.make_parser(large_batch, EXAMPLES)
    result.add_argument(
        "--prepare",
        type=local_path,
        metavar="PATH",
        help="write the task's data as this file for --data, and do nothing else",
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    if arguments.prepare:
        prepare(arguments.prepare, arguments.task, train_examples=arguments.train_examples)
    else:
        command.call(large_batch, arguments)
