"""Pallas for TPU: blocks of full rows in vector memory; gradients of vectors are summed there over a group's blocks."""

import functools
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from crescendo.pallas_kernels import rows
from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.sharded import result_like
from crescendo.pallas_kernels.tpu_rows import VMEM_BYTES, block_rows, require_full_rows


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
    of_rows, of_vector, grid = _specs(x.shape)
    vectors = [vector[:, None, :] for vector in (scale, bias) if vector is not None]
    residuals = [] if residual is None else [residual]
    results = pl.pallas_call(
        functools.partial(_forward, eps, bias is not None),
        grid=grid,
        in_specs=[of_rows, *[of_vector] * len(vectors), *[of_rows] * len(residuals)],
        out_specs=[of_rows] * (1 + len(residuals)),
        out_shape=[result_like(x, x.shape, x.dtype)] * (1 + len(residuals)),
        compiler_params=_parameters("parallel"),
    )(x, *vectors, *residuals)
    return tuple(results)


def backward(eps, centered, h, scale, dy, dh):
    """`(dx, dscale)`, and dbias if centered."""
    of_rows, of_vector, grid = _specs(h.shape)
    (groups, _, width), cotangents = h.shape, [dy] if dh is None else [dy, dh]
    dx, *sums = pl.pallas_call(
        functools.partial(_backward, eps, centered, h.shape[1]),
        grid=grid,
        in_specs=[of_rows, of_vector, *[of_rows] * len(cotangents)],
        out_specs=[of_rows, *[of_vector] * (1 + centered)],
        out_shape=[
            result_like(h, h.shape, h.dtype),
            *[result_like(h, (groups, 1, width), jnp.float32)] * (1 + centered),
        ],
        compiler_params=_parameters("arbitrary"),
    )(h, scale[:, None, :], *cotangents)
    return dx, *(total[:, 0] for total in sums)


def _specs(shape):
    """Blocks of `[G, R, D]` and of `[G, 1, D]`, and the grid."""
    groups, rows, width = shape
    block = block_rows(rows, width)
    of_rows = pl.BlockSpec((None, block, width), lambda g, r: (g, r, 0))
    return of_rows, pl.BlockSpec((None, 1, width), lambda g, r: (g, 0, 0)), (groups, pl.cdiv(rows, block))


def _parameters(of_rows: Literal["parallel", "arbitrary"]):
    return pltpu.CompilerParams(dimension_semantics=("parallel", of_rows), vmem_limit_bytes=VMEM_BYTES)


def _forward(eps, centered, x_ref, scale_ref, *refs):
    bias_ref, others = (refs[0], refs[1:]) if centered else (None, refs)
    h = x_ref[...]
    if len(others) > 1:
        residual_ref, y_ref, h_ref = others
        h = (h.astype(jnp.float32) + residual_ref[...].astype(jnp.float32)).astype(h.dtype)
        h_ref[...] = h
    else:
        (y_ref,) = others
    h = h.astype(jnp.float32)
    h = h - jnp.mean(h, axis=1, keepdims=True) if centered else h
    inverse = lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + eps)
    y = h * inverse * scale_ref[...].astype(jnp.float32)
    y_ref[...] = (y if bias_ref is None else y + bias_ref[...].astype(jnp.float32)).astype(y_ref.dtype)


def _backward(eps, centered, rows, h_ref, scale_ref, dy_ref, *refs):
    refs, sums = refs[: -1 - centered], refs[-1 - centered :]
    *dh_ref, dx_ref = refs
    h, dy = h_ref[...].astype(jnp.float32), dy_ref[...].astype(jnp.float32)
    # What lies beyond the last row is anything.
    row = pl.program_id(1) * h.shape[0] + lax.broadcasted_iota(jnp.int32, h.shape, 0)
    h, dy = jnp.where(row < rows, h, 0), jnp.where(row < rows, dy, 0)
    h = h - jnp.mean(h, axis=1, keepdims=True) if centered else h
    inverse = lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + eps)
    u, g = h * inverse, dy * scale_ref[...].astype(jnp.float32)
    dx = g - u * jnp.mean(g * u, axis=1, keepdims=True)
    dx = inverse * (dx - jnp.mean(g, axis=1, keepdims=True) if centered else dx)
    if dh_ref:
        dx += dh_ref[0][...].astype(jnp.float32)
    dx_ref[...] = dx.astype(dx_ref.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    for ref, part in zip(sums, (dy * u, dy), strict=False):
        ref[...] += jnp.sum(jnp.where(row < rows, part, 0), axis=0, keepdims=True)
