"""What the implementations share: rows in groups with a scale each, and the gradient as one pass over the rows.

A group is an example where per-example gradients of the scale are asked for, and otherwise some share of the rows:
either way the kernels see `[G, R, D]` and `[G, D]`, a mesh may split the groups, and each group's gradient of the
scale is summed apart from the others'.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Of rows that belong to no example; a mesh of so many devices can still split them.
MAX_GROUPS = 64


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The passes of one implementation.

    Attributes:
      forward: `(x_GRD, residual_GRD or None, scale_GD, eps) -> (y, h)`.
      backward: `(h, scale_GD, dy, dh or None, eps) -> (dx, dscale_GD float32)`.
      rotary_forward: `(x_BTHE, scale_BE, cosine_BTC, sine_BTC, eps) -> y`, C = E / 2.
      rotary_backward: `(x, scale, cosine, sine, dy, eps) -> (dx, dscale_BE float32)`.
    """

    forward: Callable
    backward: Callable
    rotary_forward: Callable
    rotary_backward: Callable


def rms_norm(kernels: Kernels, x, scale, eps, residual, probe):
    """The op by way of `kernels.forward` and `kernels.backward`."""
    width = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    by_example = scale.ndim == 2 or probe is not None or x.ndim > 2
    groups = x.shape[0] if by_example else math.gcd(rows, MAX_GROUPS)
    shape = (groups, rows // groups, width)
    scale = jnp.broadcast_to(scale, (groups, width))
    residual = None if residual is None else residual.reshape(shape)
    probe = jnp.zeros(groups, jnp.float32) if probe is None else probe
    y, h = _norm((kernels, eps), x.reshape(shape), residual, scale, probe)
    return y.reshape(x.shape) if residual is None else (y.reshape(x.shape), h.reshape(x.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(how, x, residual, scale, probe):
    del probe
    kernels, eps = how
    return kernels.forward(x, residual, scale, eps)


def _norm_forward(how, x, residual, scale, probe):
    kernels, eps = how
    y, h = kernels.forward(x, residual, scale, eps)
    return (y, h), (h, residual is not None, scale, probe)


def _norm_backward(how, residuals, cotangents):
    kernels, eps = how
    h, has_residual, scale, probe = residuals
    dy, dh = cotangents
    dx, dscale = kernels.backward(h, scale, dy, dh if has_residual else None, eps)
    dprobe = jnp.sum(jnp.square(dscale), axis=-1).astype(probe.dtype)
    return dx, dx if has_residual else None, dscale.astype(scale.dtype), dprobe


_norm.defvjp(_norm_forward, _norm_backward)


def qk_norm_rotary(kernels: Kernels, q, k, q_scale, k_scale, cosine, sine, eps):
    """The op by way of `kernels.rotary_forward` and `kernels.rotary_backward`."""
    cosine, sine = (jnp.broadcast_to(a.astype(jnp.float32), (q.shape[0], *a.shape[1:])) for a in (cosine, sine))

    def turned(x, scale):
        return _rotary((kernels, eps), x, jnp.broadcast_to(scale, (x.shape[0], x.shape[-1])), cosine, sine)

    return turned(q, q_scale), turned(k, k_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotary(how, x, scale, cosine, sine):
    kernels, eps = how
    return kernels.rotary_forward(x, scale, cosine, sine, eps)


def _rotary_forward(how, x, scale, cosine, sine):
    return _rotary(how, x, scale, cosine, sine), (x, scale, cosine, sine)


def _rotary_backward(how, residuals, dy):
    kernels, eps = how
    x, scale, cosine, sine = residuals
    dx, dscale = kernels.rotary_backward(x, scale, cosine, sine, dy, eps)
    return dx, dscale.astype(scale.dtype), None, None


_rotary.defvjp(_rotary_forward, _rotary_backward)
