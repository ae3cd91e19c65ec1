"""jax-triton, Ampere and later: every activation is read once and written once, forward and backward."""

import math

import jax
import triton
import triton.language as tl

from crescendo.pallas_kernels.op import require_gpu
from crescendo.pallas_kernels.rows import Passes, check
from crescendo.pallas_kernels.triton_call import triton_call
from crescendo.pallas_kernels.triton_rows import load, part_of_row, store

BLOCK = 2048  # entries of a program
WARPS = 8


def swiglu(gate, up):
    """See the op."""
    del up
    check(gate)
    require_gpu(8.0)
    return Passes(forward, backward)


def forward(*inputs):
    """`(y,)`."""
    if len(inputs) == 2:
        return _call(_forward, inputs, [inputs[0].shape], (1, inputs[0].size))
    *leading, _, columns = inputs[0].shape
    return _call(_forward_of_both, inputs, [(*leading, columns)], (math.prod(leading), columns))


def backward(dy, *inputs):
    """Of the inputs."""
    apart = len(inputs) == 2
    rows = (1, dy.size) if apart else (math.prod(dy.shape[:-1]), dy.shape[-1])
    return _call(_backward if apart else _backward_of_both, (dy, *inputs), [a.shape for a in inputs], rows)


def _call(kernel, arrays, results, rows: tuple[int, int]):
    """The kernel on so many rows of so many gates: gate and up apart are one row."""
    block = min(BLOCK, triton.next_power_of_2(rows[1]))
    parts = triton.cdiv(rows[1], block)
    return triton_call(
        *arrays,
        kernel=kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, arrays[0].dtype) for shape in results],
        grid=(rows[0] * parts,),
        num_warps=WARPS,
        COLUMNS=rows[1],
        PARTS=parts,
        BLOCK=block,
    )


@triton.jit
def _forward(gate_ptr, up_ptr, y_ptr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    _, at, exists = part_of_row(COLUMNS, PARTS, BLOCK)
    _multiply(gate_ptr, up_ptr, y_ptr, at, at, exists)


@triton.jit
def _forward_of_both(both_ptr, y_ptr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row, at, exists = part_of_row(COLUMNS, PARTS, BLOCK)
    _multiply(both_ptr, both_ptr + COLUMNS, y_ptr, at + row * COLUMNS, at, exists)


@triton.jit
def _multiply(gate_ptr, up_ptr, y_ptr, of_gate, of_y, exists):
    """Entries of a program: where they are in the inputs and in y, and which exist."""
    gate = load(gate_ptr, of_gate, exists)
    store(y_ptr, of_y, gate * tl.sigmoid(gate) * load(up_ptr, of_gate, exists), exists)


@triton.jit
def _backward(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, at, exists = part_of_row(COLUMNS, PARTS, BLOCK)
    _differentiate(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, at, at, exists)


@triton.jit
def _backward_of_both(dy_ptr, both_ptr, dboth_ptr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row, at, exists = part_of_row(COLUMNS, PARTS, BLOCK)
    of_gate = at + row * COLUMNS
    _differentiate(dy_ptr, both_ptr, both_ptr + COLUMNS, dboth_ptr, dboth_ptr + COLUMNS, of_gate, at, exists)


@triton.jit
def _differentiate(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, of_gate, of_y, exists):
    """As `_multiply`."""
    gate, dy = load(gate_ptr, of_gate, exists), load(dy_ptr, of_y, exists)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dy * load(up_ptr, of_gate, exists) * (sigmoid + silu * (1 - sigmoid))
    store(dgate_ptr, of_gate, dgate, exists)
    store(dup_ptr, of_gate, dy * silu, exists)
