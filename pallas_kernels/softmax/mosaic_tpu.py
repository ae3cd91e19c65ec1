"""Pallas for TPU: blocks of full rows in vector memory, read once and written once."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.sharded import sharded
from crescendo.pallas_kernels.softmax.gradient import Options, differentiable, logits, of_rows
from crescendo.pallas_kernels.tpu_rows import VMEM_BYTES, block_rows, require_full_rows


def softmax(x, *, axis, scale, soft_cap, mask):
    """See the op."""
    return _call(x, axis, scale, soft_cap, mask, log=False)


def log_softmax(x, *, axis, scale, soft_cap, mask):
    """See the op."""
    return _call(x, axis, scale, soft_cap, mask, log=True)


def _call(x, axis, scale, soft_cap, mask, *, log: bool):
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(f"takes float32 and bfloat16, not {x.dtype}")
    if x.size == 0:
        raise Unsupported(f"has nothing to do for x {list(x.shape)}")
    require_full_rows(x.shape[axis])
    options = Options(_forward, _backward, log, -1, scale, soft_cap)
    if mask is not None:
        mask = jnp.moveaxis(jnp.broadcast_to(mask, x.shape), axis, -1)
    return jnp.moveaxis(differentiable(options, jnp.moveaxis(x, axis, -1), mask), -1, axis)


def _forward(x, mask, options: Options):
    arrays = [x] if mask is None else [x, mask.astype(jnp.float32).astype(x.dtype)]
    return _on_rows(functools.partial(_forward_kernel, options), arrays)


def _backward(y, dy, x, options: Options):
    arrays = [y, dy.astype(y.dtype)] if x is None else [y, dy.astype(y.dtype), x]
    return _on_rows(functools.partial(_backward_kernel, options), arrays)


def _on_rows(kernel, arrays):
    """Runs `kernel(*inputs, output)` on blocks of rows, the output as the first array."""
    shape = arrays[0].shape if arrays[0].ndim > 1 else (1, *arrays[0].shape)
    leading = [f"r{i}" for i in range(len(shape) - 1)]
    letters = " ".join([*leading, "c"])

    def local(*parts):
        rows = [part.reshape(-1, part.shape[-1]) for part in parts]
        block = block_rows(*rows[0].shape)
        spec = pl.BlockSpec((block, rows[0].shape[1]), lambda i: (i, 0))
        result = pl.pallas_call(
            kernel,
            grid=(pl.cdiv(rows[0].shape[0], block),),
            in_specs=[spec] * len(rows),
            out_specs=spec,
            out_shape=jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        )(*rows)
        return (result.reshape(parts[0].shape),)

    run = sharded(local, [letters] * len(arrays), [letters], batch=leading)
    return run(*(array.reshape(shape) for array in arrays))[0].reshape(arrays[0].shape)


def _forward_kernel(options: Options, x_ref, *refs):
    *mask_ref, y_ref = refs
    value, seen = logits(x_ref[...], options.scale, options.soft_cap)
    if mask_ref:
        seen &= mask_ref[0][...].astype(jnp.float32) != 0
    value = jnp.where(seen, value, -jnp.inf)
    top = jnp.max(value, axis=1, keepdims=True)
    shifted = value - jnp.where(top == -jnp.inf, 0, top)
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=1, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    y = shifted - jnp.log(total) if options.log else exponentials / total
    y_ref[...] = y.astype(y_ref.dtype)


def _backward_kernel(options: Options, y_ref, dy_ref, *refs):
    *x_ref, dx_ref = refs
    dx = of_rows(y_ref[...], dy_ref[...], x_ref[0][...] if x_ref else None, options, 1)
    dx_ref[...] = dx.astype(dx_ref.dtype)
