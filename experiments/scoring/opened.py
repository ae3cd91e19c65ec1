"""A run opened again: its task, and its trained parameters on the devices that are here."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crescendo import parallel
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.data.subset import on_subset
from crescendo.experiments.runs import trained
from crescendo.experiments.runs.run import Run, read_run
from crescendo.experiments.runs.state import TrainState
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.tasks.base import Task
from crescendo.experiments.trainer.microbatches import max_microbatch_examples
from crescendo.experiments.trainer.training import train


class Opened(NamedTuple):
    """What is done with a trained model over rows needs.

    Attributes:
      run: as it was read.
      task: the run's, of all rows of its data.
      layout: all devices, along `data`.
      state: with the parameters to use, and no optimizer.
      examples_seen: the checkpoint's clock.
      evaluation_examples: on how many rows the run was evaluated.
      microbatch_examples: how many rows to take at a time.
    """

    run: Run
    task: Task
    layout: parallel.Layout
    state: TrainState
    examples_seen: int
    evaluation_examples: int
    microbatch_examples: int


def open_run(folder: Path, *, data: Any = None, at: int | None = None) -> Opened:
    """Opens a run.

    Args:
      folder: the run's.
      data: others than the run's own.
      at: the checkpoint, by its examples; None: the newest.

    Raises:
      UserError: for what isn't a run of `train` with a configuration and a checkpoint, and for data that aren't what
        they were.
    """
    run = read_run(folder)
    task, evaluation_examples = _task(run, data)
    with user_values():
        layout = task.place(parallel.Layout(parallel.make_mesh()))
    shapes = jax.eval_shape(task.initialize, jax.random.key(0))
    parameters, examples_seen = trained.saved_parameters(folder, shapes, at)
    placed = jax.device_put(parameters, layout.parameters(task.logical_axes()))
    state = TrainState(placed, (), jnp.int32(0), jnp.int32(0))
    microbatch = max_microbatch_examples(task, layout, jax.default_backend())
    return Opened(run, task, layout, state, examples_seen, evaluation_examples, microbatch)


def _task(run: Run, data: Any) -> tuple[Task, int]:
    """The run's task with its own data, or with others, and on how many rows it was evaluated."""
    if not re.search(r"^\s*[^#\s]", run.config, re.MULTILINE):
        raise UserError(f"{run.folder} has no config.gin that says what it is: only runs of the command train have one")
    configurables.bind(train, [str(run.folder / "config.gin")])
    own = () if data is not None else ("data", "rows")
    given: dict[str, Any] = configurables.arguments(train, ["task", "model", "evaluation_examples", *own])
    if data is None:
        data = given["data"]
        trained_on = on_subset(data, given["rows"])
        if trained_on.fingerprint != run.info.get("fixed", {}).get("data"):
            raise UserError(
                f"the data of {run.folder} are not what they were when it trained: put them back, or name other files "
                "with evaluate --data"
            )
    with user_values():
        task = given["task"](data=data, model=given["model"].for_platform(jax.default_backend()))
    return task, given["evaluation_examples"]
