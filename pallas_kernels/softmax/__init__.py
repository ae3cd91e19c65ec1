"""Softmax and log-softmax: rows that fit on chip are read once and written once."""

import functools
import math
import numbers

import jax.numpy as jnp

from crescendo.pallas_kernels.op import check_floating, check_number, op
from crescendo.pallas_kernels.sharded import alike
from crescendo.pallas_kernels.softmax import gradient

MODULES = {
    name: f"crescendo.pallas_kernels.softmax.{name}"
    for name in ("triton", "mosaic_gpu", "mosaic_tpu", "xla", "reference")
}


@op(MODULES, run=functools.partial(gradient.run, log=False))
def softmax(x, axis=-1, *, scale=None, soft_cap=None, mask=None):
    r"""`exp(l) / sum(exp(l))` along an axis, computed in float32 at least.

    .. math::

      l = c \tanh(s x / c), \qquad y_i = e^{l_i - \max l} / \sum_j e^{l_j - \max l}

    Args:
      x: of any shape; float32, bfloat16, float16 or float64. Entries of -inf count nothing, whatever scale and cap
        would make of them; where all of a row are -inf or masked the result and the gradient are 0.
      axis: along which the results add up to 1.
      scale: s, multiplies x; None: 1.
      soft_cap: c, above 0; None: the logits as they are.
      mask: bool, broadcastable to x, False where an entry counts nothing. It may hold anything there, NaN too, and so
        may its cotangent.

    Returns:
      In the shape and dtype of x.

    Raises:
      ValueError: an axis that x doesn't have, a mask that doesn't broadcast, options out of range.
      TypeError: an x that is not floating, a mask that is not bool, an axis that is no integer, options that are no
        Python numbers.

    References:
      Milakov and Gimelshein, 2018, `Online normalizer calculation for softmax <https://arxiv.org/abs/1805.02867>`_;
      Dukhan and Ablavatski, 2020, `The Two-Pass Softmax Algorithm <https://arxiv.org/abs/2001.04438>`_, for rows
      that don't fit on chip

    >>> print(softmax(jnp.array([0.0, -jnp.inf, 0.0])), softmax(jnp.zeros(2), mask=jnp.array([False, False])))
    [0.5 0.  0.5] [0. 0.]
    """
    return _checked(x, axis, scale, soft_cap, mask)


@op(MODULES, run=functools.partial(gradient.run, log=True))
def log_softmax(x, axis=-1, *, scale=None, soft_cap=None, mask=None):
    """`log(softmax(x))`, exact where the softmax itself would underflow; -inf where an entry counts nothing.

    Arguments, errors and references as for `softmax`. Entries of -inf have no gradient and give none.

    >>> print(log_softmax(jnp.array([0.0, -1e4])), log_softmax(jnp.array([0.0, 0.0]), mask=jnp.array([True, False])))
    [     0. -10000.] [  0. -inf]
    """
    return _checked(x, axis, scale, soft_cap, mask)


def _checked(x, axis, scale, soft_cap, mask) -> dict:
    check_floating(x=x)
    if not isinstance(axis, numbers.Integral):
        raise TypeError(f"axis = {axis!r} must be an integer")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis = {axis} is none of the axes of x {list(x.shape)}")
    check_number("scale", scale, optional=True)
    check_number("soft_cap", soft_cap, optional=True)
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap = {soft_cap} must be positive and finite, or None")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale = {scale} must be finite, or None")
    if mask is not None:
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask is {mask.dtype} and must be bool")
        try:
            fits = jnp.broadcast_shapes(mask.shape, x.shape) == tuple(x.shape)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"mask {list(mask.shape)} must broadcast to x {list(x.shape)}")
    x, mask = alike(x, mask)
    scale = 1.0 if scale is None else float(scale)
    if scale <= 0:
        # What is -inf counts nothing, though times a negative number it would be the largest, and NaN times 0.
        counts = x != -jnp.inf
        x, mask = jnp.where(counts, x, 0), counts if mask is None else counts & mask
    return {
        "x": x,
        "axis": axis % x.ndim,
        "scale": scale,
        "soft_cap": None if soft_cap is None else float(soft_cap),
        "mask": mask,
    }
