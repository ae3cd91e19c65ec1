"""jax-triton, Ampere and later: every activation is read once and written once, forward and backward."""

import functools

import jax
import triton
import triton.language as tl

from crescendo.pallas_kernels.op import require_gpu
from crescendo.pallas_kernels.rows import Passes, check
from crescendo.pallas_kernels.triton_call import triton_call
from crescendo.pallas_kernels.triton_rows import load, store

BLOCK = 2048  # entries of a program
WARPS = 8


def swiglu(gate, up):
    """See the op."""
    del up
    check(gate)
    require_gpu(8.0)
    return Passes(functools.partial(_call, _forward, 1), functools.partial(_call, _backward, 2))


def _call(kernel, results: int, *arrays):
    like = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    grid = (triton.cdiv(arrays[0].size, BLOCK),)
    sizes = {"SIZE": arrays[0].size, "BLOCK": BLOCK}
    return triton_call(*arrays, kernel=kernel, out_shape=[like] * results, grid=grid, num_warps=WARPS, **sizes)


@triton.jit
def _entries(SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Where a program's entries are, and which exist."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < SIZE


@triton.jit
def _forward(gate_ptr, up_ptr, y_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    at, exists = _entries(SIZE, BLOCK)
    gate = load(gate_ptr, at, exists)
    y = gate * tl.sigmoid(gate) * load(up_ptr, at, exists)
    store(y_ptr, at, y, exists)


@triton.jit
def _backward(gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    at, exists = _entries(SIZE, BLOCK)
    gate, dy = load(gate_ptr, at, exists), load(dy_ptr, at, exists)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dy * load(up_ptr, at, exists) * (sigmoid + silu * (1 - sigmoid))
    store(dgate_ptr, at, dgate, exists)
    store(dup_ptr, at, dy * silu, exists)
