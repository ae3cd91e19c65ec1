"""What a model makes of each row: its loss, the norm of its gradient, its features."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from crescendo.experiments.runs.state import TrainState
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.scoring.opened import Opened
from crescendo.experiments.tasks.base import Context
from crescendo.experiments.trainer.evaluate import evaluation_parameters, make_row_losses, over_rows
from crescendo.models.norm_probes import example_squared_norms, norm_probes, norm_scales, with_probes
from crescendo.parallel.accumulate import over_weight

Measure = Callable[[np.ndarray], np.ndarray]


def losses(opened: Opened) -> Measure:
    """Row numbers to losses, float32 `[rows]`: what the task evaluates, its sum over its weight, in nats a unit."""
    task = opened.task
    call = make_row_losses(task, task.train, opened.layout, microbatch_examples=opened.microbatch_examples)
    return functools.partial(call, opened.state)


def gradient_norms(opened: Opened) -> Measure:
    """Row numbers to the l2 norms of the gradients of their losses, float32 `[rows]`.

    Of the gradients those with respect to the normalisation layers' scales are taken, which the backward pass has for
    each row on its way (`crescendo.models.norm_probes`), so that a row costs what a step's does and no more.

    Raises:
      UserError: for a model whose normalisation layers don't give them.
    """
    task, layout = opened.task, opened.layout
    if not task.per_example_norms or not norm_scales(opened.state.parameters):
        raise UserError(
            f"--score gradient_norm: this {task.name} model has no normalisation layers that give their gradients per "
            "example: use --score loss"
        )
    context = Context(layout=layout, training=False)
    of_one = Context(training=False, implementation="reference")

    @functools.partial(jax.jit, out_shardings=layout.replicated)
    def norms(state: TrainState, batch) -> jax.Array:
        rows, parameters = jax.tree.map(lambda x: x[0], batch), evaluation_parameters(state)

        def loss(probes) -> jax.Array:
            return task.evaluate(with_probes(parameters, probes), rows, context)["loss"][0]

        def weight(row) -> jax.Array:  # the loss beside it is never computed
            return task.evaluate(parameters, jax.tree.map(lambda x: x[None], row), of_one)["loss"][1]

        squares = example_squared_norms(jax.grad(loss)(norm_probes(parameters, opened.microbatch_examples)))
        weights = jax.vmap(weight)(rows)
        return over_weight(jnp.sqrt(squares), weights)

    return _over_training_rows(opened, norms)


def features(opened: Opened) -> Measure:
    """Row numbers to what the model makes of the rows (`Task.features`), float32 `[rows, D]`.

    Raises:
      UserError: for a task that doesn't give them.
    """
    if not hasattr(opened.task, "features"):
        raise UserError(
            f"the task {opened.task.name} has no method features(parameters, rows, context), by which rows compare: "
            "give it one, or use --score loss"
        )
    context = Context(layout=opened.layout, training=False)

    @functools.partial(jax.jit, out_shardings=opened.layout.replicated)
    def call(state: TrainState, batch) -> jax.Array:
        rows = jax.tree.map(lambda x: x[0], batch)
        return opened.task.features(evaluation_parameters(state), rows, context)

    return _over_training_rows(opened, call)


def _over_training_rows(opened: Opened, program: Callable) -> Measure:
    task, examples = opened.task, opened.microbatch_examples
    return functools.partial(
        over_rows(program, task, task.train, opened.layout, microbatch_examples=examples), opened.state
    )
