"""Gradients of a batch of any size, one fixed-shape microbatch at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any


class Accumulated(NamedTuple):
    """Sums over the microbatches of one batch.

    Attributes:
      loss_sum: float32.
      weight: float32, what `loss_sum` and `gradients` are divided by to get means.
      gradients: of `loss_sum`, float32, the parameters' tree.
      squared_norms: float32 `[k_max]`, `||g_i / w_i||^2` of microbatch i's mean gradient; 0 from the count on.
    """

    loss_sum: jax.Array
    weight: jax.Array
    gradients: Tree
    squared_norms: jax.Array


def squared_norm(tree: Tree) -> jax.Array:
    """The sum of squares of all entries, in float32."""
    return sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.float32(0))


def accumulate(loss_fn: Callable, parameters: Tree, microbatches: Tree, count: jax.Array) -> Accumulated:
    """Adds up loss and gradients over the first `count` of `k_max` microbatches.

    The trip count is traced, so a batch of another size is the same program: a change of batch size never recompiles.

    Args:
      loss_fn: `(parameters, microbatch) -> (loss_sum, weight)`, both scalars.
      parameters: a tree of arrays.
      microbatches: a tree of arrays `[k_max, microbatch, ...]`.
      count: int32 scalar in `[1, k_max]`.

    >>> loss = lambda w, x: (jnp.sum(w * x), jnp.float32(x.size))
    >>> total = accumulate(loss, jnp.float32(2), jnp.arange(6.0).reshape(3, 2), jnp.int32(2))
    >>> float(total.loss_sum), float(total.weight), float(total.gradients)
    (12.0, 4.0, 6.0)
    """
    k_max = jax.tree.leaves(microbatches)[0].shape[0]
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def one(index) -> Accumulated:
        microbatch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), microbatches)
        (loss_sum, weight), gradients = value_and_grad(parameters, microbatch)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        squared = squared_norm(gradients) / jnp.square(jnp.maximum(weight, 1.0))
        return Accumulated(loss_sum, weight, gradients, jnp.zeros(k_max).at[index].set(squared))

    if k_max == 1:
        return one(0)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
    return jax.lax.fori_loop(0, count, lambda index, total: jax.tree.map(jnp.add, total, one(index)), zero)
