"""The derivative rule: of the results alone, and of x where a cap bends the logits.

`dx = y (dy - m)`, where m is the mean of dy weighted by y: `sum(y dy) / sum(y)`. The results as stored are rounded, and
add up to 1 only nearly: without the division, m would be off by as much, and drown the gradient of a row where one
entry has nearly all of the weight (bfloat16, 300 logits of standard deviation 4: errors above 5% in one row of 100).

An entry without weight has no gradient and gives none, whatever its x and dy are: what a mask hides may be NaN.

Of `Passes`, `forward(call, x, mask or None)` gives `(y,)`, `backward(call, y, dy, x or None)` `(dx,)`, along the last
axis; x is there where there is a soft cap. What XLA splits goes along `call.axis`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.rows import Passes


class Call(NamedTuple):
    """What is fixed when a call is traced.

    Attributes:
      log: whether y is a log-softmax.
      axis, scale, soft_cap: see the op.
    """

    log: bool
    axis: int
    scale: float
    soft_cap: float | None


def run(kernels: Passes, x, axis: int, scale: float, soft_cap: float | None, mask, *, log: bool):
    """The op by way of the passes."""
    if mask is not None:
        mask = jnp.broadcast_to(mask, x.shape)
    if kernels.split_by_xla:
        return _softmax(kernels, Call(log, axis, scale, soft_cap), x, mask)
    last = lambda a: jnp.moveaxis(jnp.atleast_2d(a), axis - x.ndim, -1)  # noqa: E731
    moved, mask = last(x), None if mask is None else last(mask)
    y = _softmax(kernels, Call(log, -1, scale, soft_cap), moved, mask)
    return jnp.moveaxis(y.reshape(moved.shape[-x.ndim :]), -1, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax(kernels: Passes, call: Call, x, mask):
    return kernels.on_rows(functools.partial(kernels.forward, call), x, mask)(x, mask)[0]


def _forward(kernels: Passes, call: Call, x, mask):
    y = kernels.on_rows(functools.partial(kernels.forward, call), x, mask)(x, mask)[0]
    return y, (y, None if call.soft_cap is None else x)


def _backward(kernels: Passes, call: Call, kept, dy):
    y, x = kept
    arrays = y, dy.astype(y.dtype), x
    return kernels.on_rows(functools.partial(kernels.backward, call), *arrays)(*arrays)[0].astype(y.dtype), None


_softmax.defvjp(_forward, _backward)


def logits(x, scale: float, soft_cap: float | None):
    """`c tanh(s x / c)` in at least float32, and where an entry counts: everywhere but where x is -inf."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scaled = x * scale
    return (scaled if soft_cap is None else soft_cap * jnp.tanh(scaled / soft_cap)), x != -jnp.inf


def of_rows(y, dy, x, call: Call, axis: int):
    """The gradient of x along an axis of results y, in at least float32; x is None where there is no soft cap."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    y, total = y.astype(wide), functools.partial(jnp.sum, axis=axis, keepdims=True)
    hidden = y == (-jnp.inf if call.log else 0)
    dy = jnp.where(hidden, 0, dy.astype(wide))
    dx = dy - jnp.exp(y) * total(dy) if call.log else y * (dy - weighted_mean(total(y * dy), total(y)))
    if call.soft_cap is not None:
        value, _ = logits(x, call.scale, call.soft_cap)
        dx *= 1 - jnp.square(value / call.soft_cap)
    return jnp.where(hidden, 0, dx * call.scale)


def weighted_mean(terms, weights):
    """Of sums over a row, 0 where all weights are 0."""
    return terms / jnp.where(weights == 0, 1, weights)
