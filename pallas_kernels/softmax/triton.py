"""jax-triton, Ampere and later: rows held on chip (`triton_rows`), read once and written once.

At 32,768 columns a program (16,384 backward), rows of four million columns (two) are on chip in full. Longer ones
take two kernels, by pairs (mantissa, exponent): two reads and one write, as there is no pass for the maximum (Dukhan
and Ablavatski, 2020).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from crescendo.pallas_kernels import rows, tiles
from crescendo.pallas_kernels.op import require_gpu, target_device
from crescendo.pallas_kernels.softmax.gradient import Call, weighted_mean
from crescendo.pallas_kernels.triton_call import triton_call
from crescendo.pallas_kernels.triton_rows import (
    LOG2E,
    capped,
    capped_logits,
    leave,
    load,
    meet,
    meeting,
    of_parts,
    part_of_row,
    place,
    store,
)


@dataclasses.dataclass(frozen=True)
class Columns:
    """How rows are cut up.

    Attributes:
      alone: columns of a program that has a row to itself.
      shared: of one that shares its row.
      entries: of one whose rows are shorter.
    """

    alone: int
    shared: int = 8192
    entries: int = 4096


ALONE = {"forward": 32768, "backward": 16384}
# Of a thread of a program that has its rows to itself, and of one that waits for the others of its row: forward so many
# that more programs share a multiprocessor (NOTES.md).
THREAD_ENTRIES = {"forward": (32, 64), "backward": (16, 16)}
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# ln 2 in two parts: n * LN2_HIGH is exact for |n| < 2^15 (the last bits of LN2_HIGH are 0).
LN2_HIGH: tl.constexpr = tl.constexpr(0.693145751953125)
LN2_LOW: tl.constexpr = tl.constexpr(1.42860682030941723212e-6)


def softmax(x, **_):
    """See the op."""
    rows.check(x)
    require_gpu(8.0)
    return rows.Passes(_forward, _backward)


log_softmax = softmax


def _geometry(shape, passes: str) -> dict[str, Any]:
    """Blocks, programs and warps for rows of that shape."""
    rows, columns = shape
    cut = tiles.tuned("softmax", passes, {}, columns, Columns(ALONE[passes]))
    block = triton.next_power_of_2(columns)
    if block > cut.alone:
        # A row has at most as many parts as there are streaming multiprocessors, if it fits on chip at all.
        block = cut.shared
        while block < cut.alone and -(-columns // block) > target_device().cores:
            block *= 2
    parts = -(-columns // block)
    together = max(1, min(cut.entries // block, triton.next_power_of_2(rows)))
    waits = 1 < parts <= target_device().cores
    warps = min(32, max(4, together * block // (32 * THREAD_ENTRIES[passes][waits])))
    grid = (rows * parts,) if parts > 1 else (-(-rows // together),)
    constants = {"ROWS": rows, "COLUMNS": columns, "PARTS": parts, "TOGETHER": together, "BLOCK": block}
    return {"grid": grid, "num_warps": warps, **constants}


def _forward(call: Call, x, mask):
    geometry = _geometry(x.shape, "forward")
    how: dict[str, Any] = {
        "SCALE": call.scale,
        "CAP": call.soft_cap or 0.0,
        "LOG": call.log,
        "MASKED": mask is not None,
    }
    arrays = (x, x if mask is None else mask.astype(jnp.int8))
    y = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if geometry["PARTS"] <= target_device().cores:
        left, how_met = meeting(geometry["ROWS"], geometry["PARTS"], 2, first=1)
        results = triton_call(*arrays, kernel=_forward_kernel, out_shape=[y, *left], **how_met, **geometry, **how)
        return results[:1]
    rows, parts = geometry["ROWS"], geometry["PARTS"]
    long = {k: v for k, v in geometry.items() if k != "TOGETHER"}
    shape = jax.ShapeDtypeStruct((rows, parts, 2), jnp.float32)
    (pairs,) = triton_call(*arrays, kernel=_pairs_kernel, out_shape=[shape], **long, **how)
    # A row's pairs are few: XLA adds them up.
    mantissas, exponents = pairs[..., 0], pairs[..., 1]
    exponent = jnp.max(exponents, axis=1)
    mantissa = jnp.sum(mantissas * jnp.exp2(exponents - exponent[:, None]), axis=1)
    totals = jnp.stack([mantissa, exponent], axis=1)
    return triton_call(*arrays, totals, kernel=_scale_kernel, out_shape=[y], **long, **how)


def _backward(call: Call, y, dy, x):
    geometry = _geometry(y.shape, "backward")
    how: dict[str, Any] = {"SCALE": call.scale, "CAP": call.soft_cap or 0.0, "LOG": call.log}
    arrays = (y, dy, y if x is None else x)
    dx = jax.ShapeDtypeStruct(y.shape, y.dtype)
    if geometry["PARTS"] <= target_device().cores:
        left, how_met = meeting(geometry["ROWS"], geometry["PARTS"], 2, first=1)
        results = triton_call(*arrays, kernel=_backward_kernel, out_shape=[dx, *left], **how_met, **geometry, **how)
        return results[:1]
    long = {k: v for k, v in geometry.items() if k != "TOGETHER"}
    shape = jax.ShapeDtypeStruct((geometry["ROWS"], geometry["PARTS"], 2), jnp.float32)
    (sums,) = triton_call(*arrays[:2], kernel=_sums_kernel, out_shape=[shape], **long, LOG=call.log)
    terms, weights = jnp.unstack(jnp.sum(sums, axis=1), axis=1)
    total = terms if call.log else weighted_mean(terms, weights)
    return triton_call(*arrays, total, kernel=_gradient_kernel, out_shape=[dx], **long, **how)


@triton.jit
def _offsets(row, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    """Where the program's entries are, and which of them exist: `[TOGETHER, BLOCK]`."""
    rows = row + tl.arange(0, TOGETHER)[:, None]
    columns = part * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists = columns < COLUMNS
    return rows.to(tl.int64) * COLUMNS + columns, exists & (rows < ROWS)


@triton.jit
def _forward_kernel(
    x_ptr,
    mask_ptr,
    y_ptr,
    left_ptr,
    arrived_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    LOG: tl.constexpr,
    MASKED: tl.constexpr,
):
    row, part = place(arrived_ptr, ROWS, PARTS, TOGETHER)
    offsets, exists = _offsets(row, part, ROWS, COLUMNS, TOGETHER, BLOCK)
    logits = capped_logits(x_ptr, mask_ptr, offsets, exists, SCALE, CAP, MASKED)
    top = tl.max(logits, axis=1)
    top = tl.where(top == -float("inf"), 0.0, top)
    exponentials = tl.exp2((logits - top[:, None]) * LOG2E)
    total = tl.sum(exponentials, axis=1)
    if PARTS > 1:
        one = tl.arange(0, 1)
        leave(left_ptr, 0, row, part + one, tl.where(total > 0, top, -float("inf")), ROWS, PARTS)
        leave(left_ptr, 1, row, part + one, total, ROWS, PARTS)
        meet(arrived_ptr, row, PARTS)
        tops = of_parts(left_ptr, 0, row, ROWS, PARTS, -float("inf"))
        totals = of_parts(left_ptr, 1, row, ROWS, PARTS, 0.0)
        highest = tl.max(tops, axis=0)
        highest = tl.where(highest == -float("inf"), 0.0, highest)
        total = tl.sum(totals * tl.exp2((tops - highest) * LOG2E), axis=0)
        total = tl.where(total == 0, 1.0, total) + tl.zeros([1], tl.float32)
        if LOG:
            y = logits - highest - tl.log2(total)[:, None] * LN2
        else:
            y = exponentials * (tl.exp2((top - highest) * LOG2E) / total)[:, None]
    else:
        total = tl.where(total == 0, 1.0, total)
        y = logits - top[:, None] - (tl.log2(total) * LN2)[:, None] if LOG else exponentials * (1.0 / total)[:, None]
    store(y_ptr, offsets, y, exists)


@triton.jit
def _terms(y_ptr, dy_ptr, offsets, exists, LOG: tl.constexpr):
    """Results, the cotangents that count, and what their row adds up: terms and weights, all of them 0 in log space."""
    y = load(y_ptr, offsets, exists, -float("inf") if LOG else 0.0)
    dy = load(dy_ptr, offsets, exists)
    dy = tl.where(y == (-float("inf") if LOG else 0.0), 0.0, dy)
    if LOG:
        return y, dy, dy, tl.zeros_like(dy)
    return y, dy, y * dy, y


@triton.jit
def _gradient(y, dy, x, total, SCALE: tl.constexpr, CAP: tl.constexpr, LOG: tl.constexpr):
    """The gradient of x, given the row's weighted mean of dy, or in log space its sum."""
    dx = dy - tl.exp2(y * LOG2E) * total if LOG else y * (dy - total)
    if CAP > 0:
        t = capped(x, SCALE, CAP) * (1 / CAP)
        dx = dx * (1 - t * t)
    return tl.where(y == (-float("inf") if LOG else 0.0), 0.0, dx * SCALE)


@triton.jit
def _backward_kernel(
    y_ptr,
    dy_ptr,
    x_ptr,
    dx_ptr,
    left_ptr,
    arrived_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    LOG: tl.constexpr,
):
    row, part = place(arrived_ptr, ROWS, PARTS, TOGETHER)
    offsets, exists = _offsets(row, part, ROWS, COLUMNS, TOGETHER, BLOCK)
    y, dy, terms, weights = _terms(y_ptr, dy_ptr, offsets, exists, LOG)
    total = tl.sum(terms, axis=1)
    weight = tl.sum(weights, axis=1)
    if PARTS > 1:
        one = tl.arange(0, 1)
        leave(left_ptr, 0, row, part + one, total, ROWS, PARTS)
        leave(left_ptr, 1, row, part + one, weight, ROWS, PARTS)
        meet(arrived_ptr, row, PARTS)
        totals = of_parts(left_ptr, 0, row, ROWS, PARTS, 0.0)
        their_weights = of_parts(left_ptr, 1, row, ROWS, PARTS, 0.0)
        total = tl.sum(totals, axis=0) + tl.zeros([1], tl.float32)
        weight = tl.sum(their_weights, axis=0) + tl.zeros([1], tl.float32)
    if not LOG:
        total /= tl.where(weight == 0, 1.0, weight)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0) if CAP > 0 else y
    dx = _gradient(y, dy, x, total[:, None], SCALE, CAP, LOG)
    store(dx_ptr, offsets, dx, exists)


@triton.jit
def _pair(logits):
    """`exp(logits) = mantissa 2^exponent`, the mantissa in [1/sqrt 2, sqrt 2]; 0 and -inf for -inf."""
    seen = logits != -float("inf")
    value = tl.where(seen, logits, 0.0)
    exponent = tl.floor(value * LOG2E + 0.5)
    rest = value - exponent * LN2_HIGH - exponent * LN2_LOW
    return tl.where(seen, tl.exp2(rest * LOG2E), 0.0), tl.where(seen, exponent, -float("inf"))


@triton.jit
def _pairs_kernel(
    x_ptr,
    mask_ptr,
    pairs_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    LOG: tl.constexpr,
    MASKED: tl.constexpr,
):
    _, offsets, exists = part_of_row(COLUMNS, PARTS, BLOCK)
    logits = capped_logits(x_ptr, mask_ptr, offsets, exists, SCALE, CAP, MASKED)
    mantissas, exponents = _pair(logits)
    exponent = tl.maximum(tl.max(exponents, axis=0), -1e30)
    mantissa = tl.sum(mantissas * tl.exp2(exponents - exponent), axis=0)
    at = pairs_ptr + tl.program_id(0).to(tl.int64) * 2
    tl.store(at, mantissa)
    tl.store(at + 1, exponent)


@triton.jit
def _scale_kernel(
    x_ptr,
    mask_ptr,
    totals_ptr,
    y_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    LOG: tl.constexpr,
    MASKED: tl.constexpr,
):
    row, offsets, exists = part_of_row(COLUMNS, PARTS, BLOCK)
    logits = capped_logits(x_ptr, mask_ptr, offsets, exists, SCALE, CAP, MASKED)
    total = tl.load(totals_ptr + row * 2)
    exponent = tl.load(totals_ptr + row * 2 + 1)
    total = tl.where(total == 0, 1.0, total)
    if LOG:
        y = logits - exponent * LN2_HIGH - (exponent * LN2_LOW + tl.log2(total) * LN2)
    else:
        mantissas, exponents = _pair(logits)
        y = mantissas * (1.0 / total) * tl.exp2(exponents - exponent)
    store(y_ptr, offsets, y, exists)


@triton.jit
def _sums_kernel(
    y_ptr,
    dy_ptr,
    sums_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG: tl.constexpr,
):
    _, offsets, exists = part_of_row(COLUMNS, PARTS, BLOCK)
    _, _, terms, weights = _terms(y_ptr, dy_ptr, offsets, exists, LOG)
    at = sums_ptr + tl.program_id(0).to(tl.int64) * 2
    tl.store(at, tl.sum(terms, axis=0))
    tl.store(at + 1, tl.sum(weights, axis=0))


@triton.jit
def _gradient_kernel(
    y_ptr,
    dy_ptr,
    x_ptr,
    totals_ptr,
    dx_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    LOG: tl.constexpr,
):
    row, offsets, exists = part_of_row(COLUMNS, PARTS, BLOCK)
    y, dy, _, _ = _terms(y_ptr, dy_ptr, offsets, exists, LOG)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0) if CAP > 0 else y
    dx = _gradient(y, dy, x, tl.load(totals_ptr + row), SCALE, CAP, LOG)
    store(dx_ptr, offsets, dx, exists)
