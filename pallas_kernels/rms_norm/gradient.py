"""The derivative rules of both norms: rows in groups with a scale each, and the gradient as one pass over the rows.

A group is an example where per-example gradients of the scale are asked for, and otherwise some share of the rows:
either way the kernels see `[G, R, D]` and `[G, D]`, a mesh may split the groups, and each group's gradient of the
scale is summed apart from the others'. A norm with a bias is centered, LayerNorm; one without is RMSNorm. Of `Passes`
of the norm

    forward(eps, x_GRD, scale_GD, bias_GD or None, residual_GRD or None) -> (y,), or (y, h) with a residual
    backward(eps, centered, h, scale, dy, dh or None) -> (dx, dscale_GD float32), and dbias_GD if centered

and of those with rotation, C = E / 2:

    forward(eps, x_BTHE, scale_BE, cosine_BTC, sine_BTC) -> (y,)
    backward(eps, x, scale, cosine, sine, dy) -> (dx, dscale_BE float32)
"""

import functools
import math

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.rows import Passes
from crescendo.pallas_kernels.sharded import laid_out_as

# Of rows that belong to no example; a mesh of so many devices can still split them.
MAX_GROUPS = 64
ROWS, SCALE = "g r d", "g d"
HEADS, HEAD_SCALE, ANGLE = "b t h e", "b e", "b t c"


def norm(kernels: Passes, x, scale, eps, residual, *, bias=None, probe=None):
    """The ops `rms_norm` and `layer_norm` by way of the passes."""
    width = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    by_example = scale.ndim == 2 or probe is not None or x.ndim > 2
    groups = x.shape[0] if by_example else math.gcd(rows, MAX_GROUPS)
    shape = (groups, rows // max(1, groups), width)
    vectors = [None if vector is None else jnp.broadcast_to(vector, (groups, width)) for vector in (scale, bias)]
    given = None if residual is None else laid_out_as(x, residual).reshape(shape)
    results = _norm(kernels, eps, x.reshape(shape), given, *vectors, probe)
    y, *h = (result.reshape(x.shape) for result in results)
    return y if residual is None else (y, *h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(kernels: Passes, eps, x, residual, scale, bias, probe):
    del probe
    return _forward_pass(kernels, eps, residual, bias)(x, scale, bias, residual)


def _forward_pass(kernels: Passes, eps, residual, bias):
    has_residual = residual is not None
    inputs = (ROWS, SCALE, None if bias is None else SCALE, ROWS if has_residual else None)
    return kernels.on_parts(functools.partial(kernels.forward, eps), inputs, (ROWS,) * (1 + has_residual), ("g",))


def _norm_forward(kernels: Passes, eps, x, residual, scale, bias, probe):
    results = _forward_pass(kernels, eps, residual, bias)(x, scale, bias, residual)
    return results, ((*results, x)[1], scale, bias, probe)


def _norm_backward(kernels: Passes, eps, kept, cotangents):
    h, scale, bias, probe = kept
    dy, dh = (*cotangents, None)[:2]
    centered = bias is not None
    inputs = (ROWS, SCALE, ROWS, None if dh is None else ROWS)
    backward = functools.partial(kernels.backward, eps, centered)
    dx, dscale, *dbias = kernels.on_parts(backward, inputs, (ROWS, SCALE, SCALE)[: 2 + centered], ("g",))(
        h, scale, dy, dh
    )
    dprobe = None if probe is None else jnp.sum(jnp.square(dscale), axis=-1).astype(probe.dtype)
    of_bias = dbias[0].astype(bias.dtype) if centered else None
    gradients = dx, dscale.astype(scale.dtype), of_bias, dprobe
    dx, *others = laid_out_as((h, scale, bias, probe), gradients)
    return dx, None if dh is None else dx, *others


_norm.defvjp(_norm_forward, _norm_backward)


def qk_norm_rotary(kernels: Passes, q, k, q_scale, k_scale, cosine, sine, eps):
    """The op by way of the passes."""
    cosine, sine = (jnp.broadcast_to(a.astype(jnp.float32), (q.shape[0], *a.shape[1:])) for a in (cosine, sine))
    q_scale, k_scale = (jnp.broadcast_to(scale, (q.shape[0], q.shape[-1])) for scale in (q_scale, k_scale))
    return _rotary(kernels, eps, q, q_scale, cosine, sine), _rotary(kernels, eps, k, k_scale, cosine, sine)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotary(kernels: Passes, eps, *arrays):
    return _rotary_pass(kernels, eps)(*arrays)[0]


def _rotary_pass(kernels: Passes, eps):
    inputs = (HEADS, HEAD_SCALE, ANGLE, ANGLE)
    return kernels.on_parts(functools.partial(kernels.forward, eps), inputs, (HEADS,), ("b",))


def _rotary_forward(kernels: Passes, eps, *arrays):
    return _rotary_pass(kernels, eps)(*arrays)[0], arrays


def _rotary_backward(kernels: Passes, eps, kept, dy):
    inputs = (HEADS, HEAD_SCALE, ANGLE, ANGLE, HEADS)
    run = kernels.on_parts(functools.partial(kernels.backward, eps), inputs, (HEADS, HEAD_SCALE), ("b",))
    dx, dscale = run(*kept, dy)
    return *laid_out_as(kept[:2], (dx, dscale.astype(kept[1].dtype))), None, None


_rotary.defvjp(_rotary_forward, _rotary_backward)
