"""Numbers in 8 bits, in both orders in which matrix products read them.

It has no derivative, and so stands beside the ops of `OPS`: whoever multiplies what it gives has the derivative rule
(`crescendo.models.low_precision`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.op import check_floating, op

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


@op({name: f"crescendo.pallas_kernels.quantize_{name}" for name in ("triton", "reference")})
def quantize(x, scale, *, dtype: Any, inner: int = 1):
    r"""`x scale` in 8 bits, as it lies and with its inner axes in front: `(rows, columns)`.

    .. math::

      q = \mathrm{round}(\mathrm{clip}(x s, -m, m))

    with the nearest number of the format, of two the even one, and m its largest. A product sums over the axes that lie
    innermost of both operands (the matrix instructions of Hopper take 8 bits in no other way): rows are for sums over
    the inner axes, columns for sums over the others.

    Args:
      x: `[*outer, *inner]`, floating.
      scale: float32 scalar.
      dtype: float8_e4m3fn or float8_e5m2.
      inner: how many axes are inner ones.

    Returns:
      `[*outer, *inner]` and `[*inner, *outer]`, of `dtype`. What isn't finite is lost: the scale has to tell of it.

    Raises:
      TypeError: an array that isn't floating, or another dtype.
      ValueError: a number of inner axes that x hasn't.

    References:
      Micikevicius et al., 2022, `FP8 Formats for Deep Learning <https://arxiv.org/abs/2209.05433>`_

    >>> rows, columns = quantize(jnp.array([[1.0, 1.06], [1e3, 0.0]]), jnp.float32(1), dtype=jnp.float8_e4m3fn)
    >>> print(rows.astype(jnp.float32), columns.dtype, columns.shape)
    [[  1.   1.]
     [448.   0.]] float8_e4m3fn (2, 2)
    """
    check_floating(x=x)
    if jnp.dtype(dtype).name not in FLOAT8:
        raise TypeError(f"dtype = {jnp.dtype(dtype).name} must be one of {', '.join(FLOAT8)}")
    if not 0 < inner < x.ndim:
        raise ValueError(f"inner = {inner} must be between 1 and {x.ndim - 1} for an array {list(x.shape)}")
    return {"x": x, "scale": scale, "dtype": jnp.dtype(dtype), "inner": inner}


def power_of_two_scale(largest, most: float) -> tuple[jax.Array, jax.Array]:
    """The greatest power of two s with `largest s <= most`, and `1 / s`; both float32.

    Multiplying by a power of two rounds nothing: only the cast does. Exponents stay within 63, so that the product of
    two inverse scales is a float32: what is less than 2^-63 of the format's least number becomes 0. The inverse is NaN
    where `largest` isn't finite or needs a smaller scale, so that the results say so.

    Args:
      largest: the greatest absolute value of a tensor; 0 of one without any.
      most: the format's largest number.

    >>> print(*power_of_two_scale(jnp.float32(3.0), 448.0))
    128.0 0.0078125
    """
    largest = largest.astype(jnp.float32)
    exponent = jnp.clip(jnp.frexp(most / jnp.where(largest > 0, largest, 1.0))[1] - 1, -63, 63)
    scale = jnp.ldexp(jnp.float32(1), jnp.where(largest > 0, exponent, 0))
    return scale, jnp.where(largest * scale <= most, 1 / scale, jnp.nan)


def turned(x: jax.Array, inner: int) -> jax.Array:
    """The array with its inner axes in front.

    >>> turned(jnp.zeros((2, 3, 4)), 1).shape
    (4, 2, 3)
    """
    outer = x.ndim - inner
    return x.transpose((*range(outer, x.ndim), *range(outer)))
