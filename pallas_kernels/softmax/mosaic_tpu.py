"""Pallas for TPU: blocks of full rows in vector memory, read once and written once."""

import functools

import jax.numpy as jnp

from crescendo.pallas_kernels import rows
from crescendo.pallas_kernels.softmax.gradient import Call, logits, of_rows
from crescendo.pallas_kernels.tpu_rows import on_blocks, require_full_rows


def softmax(x, *, axis, **_):
    """See the op."""
    rows.check(x, dtypes=(jnp.float32, jnp.bfloat16))
    require_full_rows(x.shape[axis])
    return rows.Passes(_forward, _backward)


log_softmax = softmax


def _forward(call: Call, x, mask):
    arrays = [x] if mask is None else [x, mask.astype(jnp.float32).astype(x.dtype)]
    return on_blocks(functools.partial(_forward_kernel, call), arrays)


def _backward(call: Call, y, dy, x):
    return on_blocks(functools.partial(_backward_kernel, call), [y, dy] if x is None else [y, dy, x])


def _forward_kernel(call: Call, x_ref, *refs):
    *mask_ref, y_ref = refs
    value, seen = logits(x_ref[...], call.scale, call.soft_cap)
    if mask_ref:
        seen &= mask_ref[0][...].astype(jnp.float32) != 0
    value = jnp.where(seen, value, -jnp.inf)
    top = jnp.max(value, axis=1, keepdims=True)
    shifted = value - jnp.where(top == -jnp.inf, 0, top)
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=1, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    y = shifted - jnp.log(total) if call.log else exponentials / total
    y_ref[...] = y.astype(y_ref.dtype)


def _backward_kernel(call: Call, y_ref, dy_ref, *refs):
    *x_ref, dx_ref = refs
    dx = of_rows(y_ref[...], dy_ref[...], x_ref[0][...] if x_ref else None, call, 1)
    dx_ref[...] = dx.astype(dx_ref.dtype)
