"""Pallas for TPU: blocks of full rows in vector memory; gradients of vectors are summed there over a group's blocks."""

import functools

import jax.numpy as jnp
from jax import lax

from crescendo.pallas_kernels import rows
from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.tpu_rows import add_to_sum, exists, on_blocks, require_full_rows


def rms_norm(x, scale, **_):
    """See the op."""
    rows.check(x, scale, dtypes=(jnp.float32, jnp.bfloat16))
    require_full_rows(x.shape[-1])
    return rows.Passes(forward, backward)


def layer_norm(x, scale, bias, **_):
    """See the op."""
    rows.check(x, scale, bias, dtypes=(jnp.float32, jnp.bfloat16))
    require_full_rows(x.shape[-1])
    return rows.Passes(forward, backward)


def qk_norm_rotary(**_):
    """See the op."""
    raise Unsupported("has no kernel: on TPU XLA fuses the norm and the rotation with the projections about them")


def forward(eps, x, scale, bias, residual):
    """`(y,)`, or `(y, h)` with a residual."""
    given, vectors = ([array for array in arrays if array is not None] for arrays in ((x, residual), (scale, bias)))
    return on_blocks(functools.partial(_forward, eps, bias is not None), given, vectors, results=len(given))


def backward(eps, centered, h, scale, dy, dh):
    """`(dx, dscale)`, and dbias if centered."""
    given, kernel = [h, dy] if dh is None else [h, dy, dh], functools.partial(_backward, eps, centered, h.shape[1])
    return on_blocks(kernel, given, [scale], sums=1 + centered)


def _forward(eps, centered, x_ref, *refs):
    residual_ref, scale_ref, *others = refs if len(refs) > 2 + centered else (None, *refs)
    bias_ref, y_ref, *h_ref = others if centered else (None, *others)
    h = x_ref[...]
    if residual_ref is not None:
        h = (h.astype(jnp.float32) + residual_ref[...].astype(jnp.float32)).astype(h.dtype)
        h_ref[0][...] = h
    h = h.astype(jnp.float32)
    h = h - jnp.mean(h, axis=1, keepdims=True) if centered else h
    inverse = lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + eps)
    y = h * inverse * scale_ref[...].astype(jnp.float32)
    y_ref[...] = (y if bias_ref is None else y + bias_ref[...].astype(jnp.float32)).astype(y_ref.dtype)


def _backward(eps, centered, rows, h_ref, dy_ref, *refs):
    refs, sums = refs[: -1 - centered], refs[-1 - centered :]
    *dh_ref, scale_ref, dx_ref = refs
    there = exists(h_ref.shape, rows)
    h, dy = (jnp.where(there, ref[...].astype(jnp.float32), 0) for ref in (h_ref, dy_ref))
    h = h - jnp.mean(h, axis=1, keepdims=True) if centered else h
    inverse = lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + eps)
    u, g = h * inverse, dy * scale_ref[...].astype(jnp.float32)
    dx = g - u * jnp.mean(g * u, axis=1, keepdims=True)
    dx = inverse * (dx - jnp.mean(g, axis=1, keepdims=True) if centered else dx)
    if dh_ref:
        dx += dh_ref[0][...].astype(jnp.float32)
    dx_ref[...] = dx.astype(dx_ref.dtype)
    for ref, part in zip(sums, (dy * u, dy), strict=False):
        add_to_sum(ref, jnp.where(there, part, 0))
