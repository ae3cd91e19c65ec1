"""Many learning rates as one program: data, order and every step stay on the device, and the batch size is traced.

For small models, of which a device trains a hundred in the time that one would take through the host.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from crescendo import optim
from crescendo.experiments.runs.state import TrainState
from crescendo.experiments.tasks.base import EXAMPLE, Context, Task
from crescendo.experiments.trainer.shapes import initial_state
from crescendo.experiments.trainer.step import make_step
from crescendo.optim import schedules
from crescendo.optim.batch_size import constant

EVALUATION_EXAMPLES = 500


def make_sweep(
    task: Task,
    make_optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    most: int,
    *,
    warmup_fraction: float,
    side_by_side: bool,
) -> Callable:
    """`(train, held_out, order, count, peaks, seed) -> (losses, scores)`, to be jitted.

    Args:
      task: what is trained, by the trainer's own step.
      make_optimizer: from the learning rate's schedule, over examples seen.
      most: of `count`.
      warmup_fraction: the part of the run over which the rate rises; it falls to 0 linearly over the rest.
      side_by_side: train the M learning rates in one batched program, or one after the other.

    The program takes the rows `train` and `held_out`, `[examples, ...]` by name, and `order`, int32
    `[microbatches, microbatch]`, which tells which example comes when. A step takes `count` of its rows. The losses are
    float32 `[M, microbatches]`, that of each step and zeros after the last; the scores `[M, held out, 3]` the sums of
    loss, correct answers and weight of each held-out example.
    """

    def train_one(train, held_out, order, count, peak, seed):
        microbatches, microbatch = order.shape
        steps, batch_size = microbatches // count, count * microbatch
        # Over the part of the run that is done, as its examples depend on the batch size.
        shape = schedules.linear(1.0, 1.0, warmup=warmup_fraction)
        optimizer = optim.adaptive_batch_size(
            make_optimizer(lambda seen: peak * shape(seen / (steps * batch_size))), constant(1), "none"
        )
        step = make_step(task, optimizer, max_gradient_norm=None)

        def one(number, state_and_losses: tuple[TrainState, jax.Array]):
            state, losses = state_and_losses
            places = number * count + jnp.arange(most)
            rows = rows_of(task, train, order[places])
            rows[EXAMPLE] = places[:, None] * microbatch + jnp.arange(microbatch)
            batch = {"rows": rows, "microbatches": count, "examples_seen": number * batch_size, "seed": seed}
            state, metrics = step(state, batch)
            return state, losses.at[number].set(metrics["loss"])

        first = initial_state(task, optimizer, seed), jnp.zeros(microbatches)
        state, losses = jax.lax.fori_loop(0, steps, one, first)
        # The step skips what isn't finite, so a run that diverged ends with numbers: they are worth none.
        scores = _scores(task, state.parameters, held_out)
        return losses, jnp.where(state.skipped_steps > 0, jnp.nan, scores)

    def sweep(train, held_out, order, count, peaks, seed):
        def one(peak):
            return train_one(train, held_out, order, count, peak, seed)

        return jax.vmap(one)(peaks) if side_by_side else jax.lax.map(one, peaks)

    return sweep


def rows_of(task: Task, arrays: dict[str, Any], numbers) -> dict[str, jax.Array]:
    """The rows of these numbers, as the task wants them; arrays that aren't there are ones, such as weights."""
    return {
        name: arrays[name][numbers].astype(row.dtype)
        if name in arrays
        else jnp.ones((*numbers.shape, *row.shape), row.dtype)
        for name, row in task.row.items()
    }


def _scores(task: Task, parameters: Any, arrays: dict[str, Any]) -> jax.Array:
    """(loss, correct, weight) of every example, float32 [examples, 3]; draws are the same for every model."""
    count = len(jax.tree.leaves(arrays)[0])

    def one(number):
        rows = {**rows_of(task, arrays, number[None]), EXAMPLE: number[None]}
        metrics = task.evaluate(parameters, rows, Context(training=False))
        (loss, weight), (correct, _) = metrics["loss"], metrics["accuracy"]
        return jnp.stack([loss, correct, weight])

    return jax.lax.map(one, jnp.arange(count), batch_size=EVALUATION_EXAMPLES)
