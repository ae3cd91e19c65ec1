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
      squared_norms: float32 `[k_max, ...]`, what was measured of microbatch i's mean gradient `g_i / w_i`, by default
        `||g_i / w_i||^2`; 0 from the count on.
    """

    loss_sum: jax.Array
    weight: jax.Array
    gradients: Tree
    squared_norms: Tree


def squared_norm(tree: Tree) -> jax.Array:
    """The sum of squares of all entries, in float32."""
    return sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.float32(0))


def accumulate(
    loss_fn: Callable,
    parameters: Tree,
    microbatches: Tree,
    count: jax.Array,
    *,
    measure: Callable[[Tree], Tree] = squared_norm,
) -> Accumulated:
    """Adds up loss and gradients over the first `count` of `k_max` microbatches.

    The trip count is traced, so a batch of another size is the same program: a change of batch size never recompiles.

    Args:
      loss_fn: `(parameters, microbatch) -> (loss_sum, weight)`, both scalars.
      parameters: a tree of arrays.
      microbatches: a tree of arrays `[k_max, microbatch, ...]`.
      count: int32 scalar in `[1, k_max]`.
      measure: from a microbatch's gradients to a tree of sums of their squares.

    >>> loss = lambda w, x: (jnp.sum(w * x), jnp.float32(x.size))
    >>> total = accumulate(loss, jnp.float32(2), jnp.arange(6.0).reshape(3, 2), jnp.int32(2))
    >>> float(total.loss_sum), float(total.weight), float(total.gradients)
    (12.0, 4.0, 6.0)
    """

    def one(index, k_max, loss_sum, weight, gradients) -> Accumulated:
        squares = jax.tree.map(lambda x: x / jnp.square(jnp.maximum(weight, 1.0)), measure(gradients))
        rows = jax.tree.map(lambda x: jnp.zeros((k_max, *x.shape)).at[index].set(x), squares)
        return Accumulated(loss_sum, weight, gradients, rows)

    return _sum_over_microbatches(one, loss_fn, parameters, microbatches, count)


class Deviations(NamedTuple):
    """How the microbatches' mean gradients `g_i` lie about the batch's, `g`.

    Attributes:
      dot_products: float32 `[k_max]`, `<g_i, g>`; 0 from the count on.
      squares: float32, `sum_i (g_i - g)^2`, entry by entry, the parameters' tree.
    """

    dot_products: jax.Array
    squares: Tree


def deviations(
    loss_fn: Callable, parameters: Tree, microbatches: Tree, count: jax.Array, mean_gradients: Tree
) -> Deviations:
    """Computes every microbatch's gradient again, to compare it with the batch's: as expensive as `accumulate`.

    Args:
      loss_fn, parameters, microbatches, count: as given to `accumulate`.
      mean_gradients: `g`, its gradients over its weight.

    >>> loss = lambda w, x: (jnp.sum(w * x), jnp.float32(x.size))
    >>> found = deviations(loss, jnp.float32(2), jnp.arange(6.0).reshape(3, 2), jnp.int32(2), jnp.float32(1.5))
    >>> print(found.dot_products, found.squares)
    [0.75 3.75 0.  ] 2.0
    """

    def one(index, k_max, loss_sum, weight, gradients) -> Deviations:
        means = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), gradients)
        dot_product = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), means, mean_gradients)))
        squares = jax.tree.map(lambda a, b: jnp.square(a - b), means, mean_gradients)
        return Deviations(jnp.zeros(k_max).at[index].set(dot_product), squares)

    return _sum_over_microbatches(one, loss_fn, parameters, microbatches, count)


def _sum_over_microbatches(one: Callable, loss_fn: Callable, parameters: Tree, microbatches: Tree, count: jax.Array):
    """The sum of `one(index, k_max, loss_sum, weight, gradients in float32)` over the first `count` microbatches."""
    k_max = jax.tree.leaves(microbatches)[0].shape[0]
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def term(index):
        microbatch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), microbatches)
        (loss_sum, weight), gradients = value_and_grad(parameters, microbatch)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        return one(index, k_max, loss_sum, weight, gradients)

    if k_max == 1:
        return term(0)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(term, 0))
    return jax.lax.fori_loop(0, count, lambda index, total: jax.tree.map(jnp.add, total, term(index)), zero)
