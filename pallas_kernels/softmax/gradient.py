"""The gradient that the implementations share: of the results alone, and of x where a cap bends the logits.

`dx = y (dy - m)`, where m is the mean of dy weighted by y: `sum(y dy) / sum(y)`. The results as stored are rounded, and
add up to 1 only nearly: without the division, m would be off by as much, and drown the gradient of a row where one
entry has nearly all of the weight (bfloat16, 300 logits of standard deviation 4: errors above 5% in one row of 100).

An entry without weight has no gradient and gives none, whatever its x and dy are: what a mask hides may be NaN.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when a call is traced.

    Attributes:
      forward: `(x, mask, options) -> y`.
      backward: `(y, dy, x, options) -> dx`; x is None where there is no soft cap.
      log: whether y is a log-softmax.
    """

    forward: Callable
    backward: Callable
    log: bool
    axis: int
    scale: float
    soft_cap: float | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(options: Options, x, mask):
    """`forward` with `backward` as its gradient."""
    return options.forward(x, mask, options)


def _forward(options: Options, x, mask):
    y = options.forward(x, mask, options)
    return y, (y, None if options.soft_cap is None else x)


def _backward(options: Options, residuals, dy):
    y, x = residuals
    return options.backward(y, dy, x, options).astype(y.dtype), None


differentiable.defvjp(_forward, _backward)


def logits(x, scale: float, soft_cap: float | None):
    """`c tanh(s x / c)` in at least float32, and where an entry counts: everywhere but where x is -inf."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scaled = x * scale
    return (scaled if soft_cap is None else soft_cap * jnp.tanh(scaled / soft_cap)), x != -jnp.inf


def of_rows(y, dy, x, options: Options, axis: int):
    """The gradient of x along an axis of results y, in at least float32; x is None where there is no soft cap."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    y, total = y.astype(wide), functools.partial(jnp.sum, axis=axis, keepdims=True)
    hidden = y == (-jnp.inf if options.log else 0)
    dy = jnp.where(hidden, 0, dy.astype(wide))
    dx = dy - jnp.exp(y) * total(dy) if options.log else y * (dy - weighted_mean(total(y * dy), total(y)))
    if options.soft_cap is not None:
        value, _ = logits(x, options.scale, options.soft_cap)
        dx *= 1 - jnp.square(value / options.soft_cap)
    return jnp.where(hidden, 0, dx * options.scale)


def weighted_mean(terms, weights):
    """Of sums over a row, 0 where all weights are 0."""
    return terms / jnp.where(weights == 0, 1, weights)
