"""Shapes, dtypes and shardings of what a training step takes and gives, before any of it exists."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from crescendo import parallel
from crescendo.experiments.runs.state import TrainState
from crescendo.experiments.tasks.base import EXAMPLE, RowArray, Task
from crescendo.experiments.trainer.frozen import Trainable
from crescendo.optim.masks import leaves_with_paths

Tree = Any


def initial_state(
    task: Task, optimizer: optax.GradientTransformationExtraArgs, seed: Any, trainable: Trainable | None = None
) -> TrainState:
    """A fresh state; pure, so that it can be jitted with output shardings or traced for its shapes."""
    parameters = task.initialize(jax.random.key(seed))
    trained = parameters if trainable is None else trainable.take(parameters)
    return TrainState(parameters, optimizer.init(trained), jnp.int32(0), jnp.int32(0))


def state_shardings(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    layout: parallel.Layout,
    trainable: Trainable | None = None,
) -> TrainState:
    """The sharding of every array.

    An array of the optimizer's belongs to the parameter whose path its own path ends with, however states are nested
    or masked, and is laid out by that parameter's names (`Layout.like_parameter`); what belongs to none is whole.

    Raises:
      ValueError: a dimension of the model that the mesh can't divide.
    """
    logical_axes = task.logical_axes()
    state = jax.eval_shape(lambda: initial_state(task, optimizer, 0, trainable))
    of_parameters = layout.parameters(logical_axes, state.parameters)
    layout.optimizer(logical_axes, state.parameters)  # raises where its dimensions can't be divided
    names = jax.tree.leaves(logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    by_path = {
        path: (axes, leaf.shape) for (path, leaf), axes in zip(leaves_with_paths(state.parameters), names, strict=True)
    }
    longest = max(map(len, by_path), default=0)

    def sharding(path: tuple[str, ...], array) -> jax.NamedSharding:
        for length in range(min(longest, len(path)), 0, -1):
            if path[-length:] in by_path:
                axes, shape = by_path[path[-length:]]
                return layout.like_parameter(layout.strategy.optimizer, axes, shape, array.shape)
        return layout.replicated

    leaves = [sharding(path, array) for path, array in leaves_with_paths(state.opt_state)]
    of_opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), leaves)
    return TrainState(of_parameters, of_opt_state, layout.replicated, layout.replicated)


def abstract_state(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    shardings: TrainState,
    trainable: Trainable | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of a state: what restoring and compiling need."""
    shapes = jax.eval_shape(lambda: initial_state(task, optimizer, 0, trainable))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def is_finite(shapes: Collection[tuple[int, ...]], state: TrainState) -> jax.Array:
    """Whether a state's floating-point arrays of these shapes are finite, a scalar."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating) and x.shape in shapes]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def row_arrays(task: Task) -> dict[str, RowArray]:
    """Every array of a batch's rows: the task's, and the number of each example."""
    return {**task.row, EXAMPLE: RowArray((), "int32", ())}


def abstract_rows(task: Task, layout: parallel.Layout, groups: int, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Rows `[groups, examples, ...]`, by name: what `put_rows` gives."""
    return {
        name: jax.ShapeDtypeStruct(
            (groups, examples, *array.shape), array.dtype, sharding=layout.rows(array.axes, leading=1)
        )
        for name, array in row_arrays(task).items()
    }


def abstract_batch(task: Task, layout: parallel.Layout, plan: parallel.BatchPlan) -> dict:
    """The input of one step: `rows` of shape `[k_max, microbatch, ...]`, their `count`, the clock and the seed."""

    def scalar(dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=layout.replicated)

    return {
        "rows": abstract_rows(task, layout, plan.max_microbatches, plan.microbatch_examples),
        "microbatches": scalar(jnp.int32),
        "examples_seen": scalar(jnp.int32),
        "seed": scalar(jnp.uint32),
    }
