"""Training on the hard examples of each batch: all are read, and those with the highest losses make the gradient."""

from typing import Any

import jax
import jax.numpy as jnp

from crescendo import parallel
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.base import EXAMPLE, Context, Task
from crescendo.experiments.trainer.shapes import row_arrays
from crescendo.optim.batch_size import BatchSizePolicy
from crescendo.parallel.accumulate import over_weight

Tree = Any
PARTS = 4096
"""A share is a whole number of such parts, so that the device counts examples in integers."""


def check_hard(share: float, layout: parallel.Layout, policy: BatchSizePolicy, *, measured: bool) -> None:
    """That a run can train on the hard examples of its batches.

    Args:
      share: of a batch.
      layout: where rows lie.
      policy: of the batch size.
      measured: whether the gradient's noise or other statistics of it are asked for.

    Raises:
      UserError: stages, rows that are split, or something that takes the batch's gradient for a fair sample.
    """
    if not round(share * PARTS):
        raise UserError(f"train.hard_share = {share:g} is below 1/{PARTS}, the smallest share: raise it")
    for axis in ("stage", "sequence"):
        if layout.sizes[axis] > 1:
            raise UserError(
                f"train.hard_share compares the losses of whole rows by all layers, and mesh.{axis} = "
                f"{layout.sizes[axis]} splits them: use {axis} = 1"
            )
    if measured or policy.min_microbatches > 1:
        raise UserError(
            "train.hard_share trains on chosen examples, whose gradients say nothing of the noise of a batch: leave "
            "out train.noise_scale and batch-size policies that measure gradients, or train.hard_share"
        )


def flops_factor(share: float | None) -> float:
    """What reading an example and training on a share of them costs beside training on all: 1/3 for the losses.

    >>> flops_factor(None), round(flops_factor(0.5), 3)
    (1.0, 0.833)
    """
    return 1.0 if share is None else 1 / 3 + share


def hardest(
    task: Task, parameters: Tree, batch: dict, context: Context, share: float, layout: parallel.Layout | None = None
) -> tuple[dict, dict[str, jax.Array]]:
    """The batch with the share of its examples that have the highest losses, and what to record of all.

    Of n examples ceil(share n) are kept, those with the highest losses in training (the sum over the weight, with the
    draws that they are then trained with); of equal ones the first. They stay in order, and fill as few microbatches as
    they need; the rest of the last one is zeros, which weigh nothing. A loss that isn't finite is the highest, so that
    the step is skipped.

    Args:
      task: what is trained.
      parameters: all of them.
      batch: the input of a step, see `abstract_batch`.
      context: of the step.
      share: in (0, 1].
      layout: where everything lives; None: on one device.

    References:
      Kawaguchi and Lu 2020, "Ordered SGD: A new stochastic optimization framework for empirical risk minimization"
      (https://arxiv.org/abs/1907.04371).
    """
    rows, count = batch["rows"], batch["microbatches"]
    k_max, microbatch = rows[EXAMPLE].shape
    implementation = context.implementation or (None if layout is None else layout.implementation)
    of_row = Context(seed=context.seed, examples_seen=context.examples_seen, implementation=implementation)

    def row_loss(row: dict) -> jax.Array:
        loss = task.loss(parameters, jax.tree.map(lambda x: x[None], row), of_row)
        return over_weight(loss.sum, loss.weight)

    def losses_of(i, losses_KM: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), rows)
        return losses_KM.at[i].set(jax.vmap(row_loss)(own))

    losses_N = jax.lax.fori_loop(0, count, losses_of, jnp.zeros((k_max, microbatch), jnp.float32)).ravel()
    read, numbers = count * microbatch, jnp.arange(k_max * microbatch)
    parts = round(share * PARTS)
    kept = read // PARTS * parts + -(-(read % PARTS * parts) // PARTS)
    ordered = jnp.where(jnp.isfinite(losses_N), losses_N, jnp.inf)
    ranked = jnp.argsort(jnp.where(numbers < read, -ordered, jnp.inf), stable=True)
    # Behind those that are kept come numbers that no example has.
    chosen = jnp.sort(jnp.where(numbers < kept, ranked, len(numbers)))

    def take(name: str) -> jax.Array:
        x = rows[name].reshape(-1, *rows[name].shape[2:])
        x = jnp.take(x, chosen, axis=0, mode="fill", fill_value=0).reshape(rows[name].shape)
        if layout is None:
            return x
        return jax.lax.with_sharding_constraint(x, layout.rows(row_arrays(task)[name].axes, leading=1))

    of_all = jnp.sum(losses_N) / read
    smaller = {**batch, "rows": {name: take(name) for name in rows}, "microbatches": -(-kept // microbatch)}
    return smaller, {"loss_of_all": of_all}
