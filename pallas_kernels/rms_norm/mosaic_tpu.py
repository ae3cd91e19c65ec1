"""Pallas for TPU: blocks of full rows in vector memory; the scale's gradient is summed there over a group's blocks."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.rms_norm import gradient
from crescendo.pallas_kernels.sharded import sharded
from crescendo.pallas_kernels.tpu_rows import VMEM_BYTES, block_rows, require_full_rows


def rms_norm(x, scale, *, eps, residual, probe):
    """See the op."""
    for array in (x, scale):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise Unsupported(f"takes float32 and bfloat16, not {array.dtype}")
    if x.size == 0:
        raise Unsupported(f"has nothing to do for x {list(x.shape)}")
    require_full_rows(x.shape[-1])
    return gradient.rms_norm(KERNELS, x, scale, eps, residual, probe)


def qk_norm_rotary(q, k, q_scale, k_scale, cosine, sine, *, eps):
    """See the op."""
    raise Unsupported("has no kernel: on TPU XLA fuses the norm and the rotation with the projections about them")


def forward(x, residual, scale, eps):
    """`(y, h)`."""

    def local(x, scale, *residual):
        rows, of_scale, grid = _specs(x.shape)
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        results = pl.pallas_call(
            functools.partial(_forward, eps),
            grid=grid,
            in_specs=[rows, of_scale, *[rows] * len(residual)],
            out_specs=[rows] * (1 + len(residual)),
            out_shape=[like] * (1 + len(residual)),
            compiler_params=_parameters("parallel"),
        )(x, scale[:, None, :], *residual)
        return tuple(results)

    if residual is None:
        return sharded(local, ["g r d", "g d"], ["g r d"], batch=["g"])(x, scale)[0], x
    run = sharded(local, ["g r d", "g d", "g r d"], ["g r d", "g r d"], batch=["g"])
    return run(x, scale, residual)


def backward(h, scale, dy, dh, eps):
    """`(dx, dscale)`."""

    def local(h, scale, dy, *dh):
        rows, of_scale, grid = _specs(h.shape)
        groups, _, width = h.shape
        dx, dscale = pl.pallas_call(
            functools.partial(_backward, eps, h.shape[1]),
            grid=grid,
            in_specs=[rows, of_scale, rows, *[rows] * len(dh)],
            out_specs=[rows, of_scale],
            out_shape=[
                jax.ShapeDtypeStruct(h.shape, h.dtype),
                jax.ShapeDtypeStruct((groups, 1, width), jnp.float32),
            ],
            compiler_params=_parameters("arbitrary"),
        )(h, scale[:, None, :], dy, *dh)
        return dx, dscale[:, 0]

    given = (dy,) if dh is None else (dy, dh)
    run = sharded(local, ["g r d", "g d", *["g r d"] * len(given)], ["g r d", "g d"], batch=["g"])
    return run(h, scale, *given)


KERNELS = gradient.Kernels(forward, backward, qk_norm_rotary, qk_norm_rotary)


def _specs(shape):
    """Blocks of `[G, R, D]` and of `[G, 1, D]`, and the grid."""
    groups, rows, width = shape
    block = block_rows(rows, width)
    of_rows = pl.BlockSpec((None, block, width), lambda g, r: (g, r, 0))
    return of_rows, pl.BlockSpec((None, 1, width), lambda g, r: (g, 0, 0)), (groups, pl.cdiv(rows, block))


def _parameters(of_rows: Literal["parallel", "arbitrary"]):
    return pltpu.CompilerParams(dimension_semantics=("parallel", of_rows), vmem_limit_bytes=VMEM_BYTES)


def _forward(eps, x_ref, scale_ref, *refs):
    h = x_ref[...]
    if len(refs) > 1:
        residual_ref, y_ref, h_ref = refs
        h = (h.astype(jnp.float32) + residual_ref[...].astype(jnp.float32)).astype(h.dtype)
        h_ref[...] = h
    else:
        (y_ref,) = refs
    h = h.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + eps)
    y_ref[...] = (h * inverse * scale_ref[...].astype(jnp.float32)).astype(y_ref.dtype)


def _backward(eps, rows, h_ref, scale_ref, dy_ref, *refs):
    *dh_ref, dx_ref, dscale_ref = refs
    h, dy = h_ref[...].astype(jnp.float32), dy_ref[...].astype(jnp.float32)
    # What lies beyond the last row is anything.
    row = pl.program_id(1) * h.shape[0] + lax.broadcasted_iota(jnp.int32, h.shape, 0)
    h, dy = jnp.where(row < rows, h, 0), jnp.where(row < rows, dy, 0)
    inverse = lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + eps)
    u, g = h * inverse, dy * scale_ref[...].astype(jnp.float32)
    dx = inverse * (g - u * jnp.mean(g * u, axis=1, keepdims=True))
    if dh_ref:
        dx += dh_ref[0][...].astype(jnp.float32)
    dx_ref[...] = dx.astype(dx_ref.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _():
        dscale_ref[...] = jnp.zeros_like(dscale_ref)

    dscale_ref[...] += jnp.sum(jnp.where(row < rows, dy * u, 0), axis=0, keepdims=True)
