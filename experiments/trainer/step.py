"""The one step that moves a run: gradients over the microbatches, then one optimizer update."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from crescendo import optim, parallel
from crescendo.experiments.runs.state import TrainState
from crescendo.experiments.tasks.base import EXAMPLE, Context, Task
from crescendo.experiments.trainer.frozen import Trainable
from crescendo.experiments.trainer.gradient_statistics import chosen_statistics, measured_gradients
from crescendo.experiments.trainer.hard import hardest
from crescendo.models.layout import ONE_DEVICE
from crescendo.parallel.accumulate import NOT_SPREAD, over_weight, squared_norm

Tree = Any


def make_step(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    max_gradient_norm: float | None,
    layout: parallel.Layout | None = None,
    statistics: Collection[str] = (),
    total_examples: int | None = None,
    trainable: Trainable | None = None,
    implementation: str | None = None,
    hard_share: float | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """`(state, batch) -> (state, metrics)`.

    Schedules are read at the middle of the batch, which is the mean of a linear one over its examples: so no batch is
    drawn at rate 0, neither the first of a warmup nor the last of a decay to 0.

    A step whose loss or gradient norm is not finite leaves parameters and optimizer as they were, one whose update is
    not finite the parameters, one that a guard doesn't let pass all but the guard's state; each is counted. The
    statistics that adapt the batch size go to the transforms as extra arguments; norms are taken before clipping.

    Args:
      task: what is trained.
      optimizer: of the parameters that are trained.
      max_gradient_norm: the mean gradient is scaled down to this l2 norm where it is longer; None: never.
      layout: where everything lives; None: on one device.
      statistics: what else to measure for the transforms, keys of `gradient_statistics.STATISTICS`.
      total_examples: the run's length, which schedules take; None where there is no run.
      trainable: which parameters are trained; None: all.
      implementation: of the task's kernels (`Context.implementation`).
      hard_share: train on this share of a batch's examples, those with the highest losses; None: on all.

    Raises:
      ValueError: an unknown statistic.
    """
    chosen_statistics(statistics)
    trainable = Trainable(jax.tree.map(lambda _: True, _shapes(task))) if trainable is None else trainable
    names = trainable.take(task.logical_axes())
    activations = ONE_DEVICE if layout is None else layout
    spread = NOT_SPREAD if layout is None else layout.spread(names)
    of_run = {} if total_examples is None else {"total_examples": total_examples}

    def split_for_update(tree: Tree) -> Tree:
        """Each device updates the part of the parameters whose optimizer state it has."""
        return tree if layout is None else layout.lay_out(layout.strategy.optimizer, tree, names)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        context = Context(activations, batch["seed"], batch["examples_seen"], implementation=implementation)

        read = batch["microbatches"] * batch["rows"][EXAMPLE].shape[1]
        of_all: dict[str, jax.Array] = {}
        if hard_share is not None:
            batch, of_all = hardest(task, state.parameters, batch, context, hard_share, layout)

        def put(trained: Tree) -> Tree:
            return trainable.put(trained, state.parameters)

        def whole_loss(trained: Tree, rows: dict):
            return task.loss(put(trained), rows, context)

        parts = None if spread.pipeline is None else task.parts(context)
        loss_fn = whole_loss if parts is None else parts.of(put)

        def mean_loss(trained: Tree) -> jax.Array:
            """Of the first microbatch, by the kernels that have second derivatives: what some optimizers ask for."""
            rows = jax.tree.map(lambda x: x[0], batch["rows"])
            plain = ONE_DEVICE if layout is None else layout.for_second_derivatives()
            twice = dataclasses.replace(context, layout=plain, implementation="reference")
            loss = task.loss(trainable.put(trained, state.parameters), rows, twice)
            return over_weight(loss.sum, loss.weight)

        trained = trainable.take(state.parameters)
        gradients, stats, extra = measured_gradients(loss_fn, trained, batch, statistics, spread)
        stats = stats._replace(batch_size=read)
        gradients, before = split_for_update(gradients), split_for_update(trained)
        loss, norm = stats.loss, jnp.sqrt(stats.squared_norm)
        l1_norm = sum(jnp.sum(jnp.abs(g)) for g in jax.tree.leaves(gradients))
        # The compiler makes a pass of what is between two barriers: over the gradients, for their norms; over them, the
        # state and the parameters, for the new state, the update and its norm; and over parameters and update.
        l1_norm, finite = jax.lax.optimization_barrier((l1_norm, jnp.isfinite(loss) & jnp.isfinite(norm)))
        if max_gradient_norm is not None:
            shrink = jnp.minimum(1.0, max_gradient_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
            gradients = jax.tree.map(lambda g: g * shrink, gradients)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(
                gradients,
                state.opt_state,
                before,
                examples_seen=batch["examples_seen"] + 0.5 * stats.batch_size,
                batch_stats=stats,
                value=loss,
                obj_fn=mean_loss,
                **of_run,
            )
            opt_state = _where(finite, opt_state, state.opt_state)
            made = updates, opt_state, jnp.sqrt(squared_norm(updates))
        updates, opt_state, update_norm = jax.lax.optimization_barrier(made)
        applied = finite & jnp.isfinite(update_norm) & optim.passed(opt_state)
        with jax.named_scope("optimizer"):
            after = _where(applied, optax.apply_updates(before, updates), before)
        bad = 1 - applied.astype(jnp.int32)
        parameters = trainable.put(after, state.parameters)
        state = TrainState(parameters, opt_state, state.skipped_steps + bad, (state.skipped_in_a_row + 1) * bad)
        own = {
            "loss": loss,
            "gradient_norm": norm,
            "gradient_l1_norm": l1_norm,
            "update_norm": update_norm,
            "next_batch_size": optim.current_batch_size(opt_state),
            "skipped_steps": state.skipped_steps,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        further = extra | of_all | optim.reported(opt_state)
        if both := own.keys() & further.keys():
            raise ValueError(
                f"a task or a state of the optimizer reports {sorted(both)[0]!r}, which the step itself does"
            )
        return state, own | further

    return step


def _where(condition: jax.Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _shapes(task: Task) -> Tree:
    return jax.eval_shape(task.initialize, jax.random.key(0))
