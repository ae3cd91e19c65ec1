"""Quality against batch size at a fixed number of epochs, for each optimizer: the picture of the LAMB paper.

Every batch size sees the same examples, so a large batch makes few steps; the question is how large it can grow before
quality suffers, under each optimizer (You et al., 2020, "Large Batch Optimization for Deep Learning",
https://arxiv.org/abs/1904.00962). The learning rate follows the batch by the optimizer's own rule, and a small sweep
around it is left to the validation split; what is reported comes from the test split.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from crescendo import optim, parallel
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
from crescendo.experiments.runs.results import Results
from crescendo.experiments.runtime.cache import use_compilation_cache
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, replace_file
from crescendo.experiments.runtime.interruption import Interrupted, Interruption
from crescendo.experiments.runtime.text import duration
from crescendo.experiments.sweeps.batched import make_sweep
from crescendo.experiments.tasks.base import Task

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
    batch_size: int
    seed: int


def large_batch(
    folder: Path,
    task: str,
    *,
    size: str = "full",
    optimizers: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    multipliers: Sequence[float] = MULTIPLIERS,
    epochs: float | None = None,
    train_examples: int | None = None,
    seeds: int = 1,
    minutes: float | None = None,
    data: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Runs every cell that isn't finished, then prints the table and writes `results.json` and `large_batch.png`.

    Args:
      folder: gets `run.json`, `cells.jsonl` with a line for each finished cell, and the results.
      task: "mlm" or "images".
      size: "full", for one GPU, or "debug", for a CPU.
      optimizers: names with a recipe in the task; none: the task's own choice.
      batch_sizes: in examples; none: those of the size.
      multipliers: of the learning rate that the rule gives.
      epochs: over the training examples, the same for every batch size; None: those of the size.
      train_examples: use only so many; None: those of the size.
      seeds: how many, from 0, of the parameters, the order of the data and the masks.
      minutes: stop after the cell that passes it; None: run to the end.
      data: a file that `--prepare` wrote; None: prepare the data here.

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
    _check_positive(batch_sizes=sizes, multipliers=multipliers, epochs=[epochs], seeds=[seeds], minutes=[minutes])
    _check_positive(train_examples=[train_examples])
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
    console = Console()
    use_compilation_cache()
    with run_folder.locked(folder), Interruption() as interruption:
        results = Results(folder, "cells.jsonl", Cell)
        results.check_same(fixed)
        every = [Cell(name, size, seed) for size, name, seed in itertools.product(sizes, names, range(seeds))]
        finished = results.records
        left = [cell for cell in every if cell not in finished]
        if left:
            stack = jax.tree.map(lambda *parts: np.concatenate(parts), *held_out)
            inputs = jax.device_put((train, stack))
            programs = Programs(chosen, scale, chosen.make(scale.model, arrays), multipliers, total, inputs, max(sizes))
            deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
            # The next programs are compiled while one trains: a small model compiles longer than it trains. But
            # few at once, lest the first wait for all.
            pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 8))
            try:
                keys = dict.fromkeys(programs.key(cell) for cell in left)
                compiled = {key: pool.submit(programs.compile, *key) for key in keys}
                for cell in left:
                    if not (program := compiled[programs.key(cell)]).done():
                        console.print(f"compiling {cell.optimizer} at batch {cell.batch_size:,}", highlight=False)
                    results.add(programs.run(cell, program, _count(held_out[0])))
                    console.print(progress(cell, every, finished), highlight=False, soft_wrap=True)
                    if interruption.requested or time.monotonic() > deadline:
                        break
            finally:
                pool.shutdown(cancel_futures=True)
        summary = summarize([finished[cell] for cell in every if cell in finished], chosen, fixed)
        with file_access("write", folder):
            replace_file(folder / "results.json", (json.dumps(summary, indent=2) + "\n").encode())
            replace_file(folder / "large_batch.png", draw(summary))
        console.print(table(summary))
        console.print(f"{folder / 'results.json'}, {folder / 'large_batch.png'}", highlight=False, soft_wrap=True)
    if remaining := sum(cell not in finished for cell in every):
        raise Interrupted(f"{remaining} of {len(every)} cells are left in {folder}; the same command goes on with them")
    return summary


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


def progress(cell: Cell, every: Sequence[Cell], finished: dict[Cell, dict[str, Any]]) -> str:
    """A line on the cell just finished, and the time left: that of the mean finished cell of each batch size."""
    record = finished[cell]
    seconds: dict[int, list[float]] = {}
    for done in finished.values():
        seconds.setdefault(done["batch_size"], []).append(done["seconds"])
    of_any = statistics.mean(itertools.chain(*seconds.values()))
    left = sum(statistics.mean(seconds.get(c.batch_size, [of_any])) for c in every if c not in finished)
    accuracies = [run["test_accuracy"] for run in record["runs"]]
    shown = " ".join("diverged" if accuracy is None else f"{accuracy:.2%}" for accuracy in accuracies)
    return (
        f"{sum(c in finished for c in every)}/{len(every)}  "
        f"{cell.optimizer} batch {cell.batch_size:,} seed {cell.seed}  "
        f"{record['steps']:,} steps in {record['seconds']:.1f} s  accuracy {shown}  about {duration(left)} left"
    )


def prepare(path: Path, task: str, *, train_examples: int | None = None) -> None:
    """Writes the data of a task, or its first `train_examples` and all that is held out, as one file for `--data`."""
    chosen, _ = _choose(task, "full")
    _check_positive(train_examples=[train_examples])
    arrays = chosen.prepare()
    save_prepared(path, chosen, {k: x[:train_examples] if k.startswith("train/") else x for k, x in arrays.items()})
    Console().print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", highlight=False, soft_wrap=True)


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


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--task", required=True, help=f"{' or '.join(TASKS)}")
    add("--run", help="the run's folder (default: runs/large_batch_TASK)")
    add("--size", default="full", help="full, for one GPU, or debug, for a CPU (default full)")
    add("--optimizers", nargs="+", default=[], metavar="NAME", help="default: the task's own choice")
    add("--batch-sizes", nargs="+", type=int, default=[], metavar="N", help="in examples")
    add("--multipliers", nargs="+", type=float, default=MULTIPLIERS, metavar="X", help="of the rule's learning rate")
    add("--epochs", type=float, help="over the training examples, the same for every batch size")
    add("--train-examples", type=int, metavar="N", help="use only so many")
    add("--seeds", type=int, default=1, help="how many (default 1)")
    add("--minutes", type=float, help="stop after the cell that passes it; the same command goes on")
    add("--data", metavar="FILE.npz", help="read what --prepare wrote, where the data themselves aren't at hand")
    add("--prepare", metavar="FILE.npz", help="write the task's data as one file, and do nothing else")
    arguments = vars(parser.parse_args(argv))
    run, task, to_prepare = arguments.pop("run"), arguments.pop("task"), arguments.pop("prepare")
    if to_prepare:
        prepare(Path(to_prepare), task, train_examples=arguments["train_examples"])
    else:
        large_batch(Path(run or f"runs/large_batch_{task}"), task, **arguments)


if __name__ == "__main__":
    run_command(main)
