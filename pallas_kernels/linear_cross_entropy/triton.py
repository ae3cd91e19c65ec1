"""cuBLAS's matmuls and one Triton kernel: a chunk's logits are read once, and their gradient is written once."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from crescendo.pallas_kernels.linear_cross_entropy import chunked, xla
from crescendo.pallas_kernels.op import Unsupported, require_gpu, target_device
from crescendo.pallas_kernels.rows import check
from crescendo.pallas_kernels.triton_call import triton_call
from crescendo.pallas_kernels.triton_rows import LOG2E, capped_logits, leave, meet, meeting, of_parts, place, store

# Logits that a program holds.
COLUMNS = 16384
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


def linear_cross_entropy(x, w, options: chunked.Options, **_):
    """See the op."""
    check(x)
    require_gpu(8.0)
    if options.vocab_axis is not None:
        raise Unsupported("has no kernel for a vocabulary that is split inside shard_map")
    if w.shape[0] > COLUMNS * target_device().cores:
        raise Unsupported(f"holds at most {COLUMNS * target_device().cores:,} logits of a row, not {w.shape[0]:,}")
    return KERNELS


def logit_pass(x, w, labels, coefficients, options: chunked.Options) -> chunked.Rows:
    """As XLA's, which also takes over where the partitioner split the vocabulary."""
    if options.vocab_axis is not None:
        return xla.logit_pass(x, w, labels, coefficients, options)
    logits = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    rows, columns = logits.shape
    block = min(triton.next_power_of_2(columns), COLUMNS)
    parts = -(-columns // block)
    wanted = coefficients is not None
    none = jnp.zeros((rows,), jnp.float32)
    given = coefficients if coefficients is not None else chunked.RowCoefficients(none, none, none)
    row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    left, how_met = meeting(rows, parts, 3, first=3)
    lse, target_logit, gradient, *_ = triton_call(
        *(logits, labels, *given),
        kernel=_kernel,
        out_shape=[row, row, jax.ShapeDtypeStruct(logits.shape if wanted else (1,), x.dtype), *left],
        **how_met,
        grid=(rows * parts,),
        num_warps=min(32, max(4, block // 512)),
        ROWS=rows,
        COLUMNS=columns,
        PARTS=parts,
        BLOCK=block,
        CAP=options.soft_cap or 0.0,
        SMOOTHING=options.label_smoothing,
        GRADIENT=wanted,
    )
    return chunked.Rows(lse, target_logit, gradient if wanted else None)


KERNELS = chunked.Kernels(logit_pass)


@triton.jit
def _kernel(
    logits_ptr,
    labels_ptr,
    constant_ptr,
    of_lse_ptr,
    of_target_ptr,
    lse_ptr,
    target_ptr,
    gradient_ptr,
    left_ptr,
    arrived_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    row, part = place(arrived_ptr, ROWS, PARTS, 1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    offsets = row.to(tl.int64) * COLUMNS + columns
    exists = columns < COLUMNS
    is_label = columns == tl.load(labels_ptr + row)
    logits = capped_logits(logits_ptr, None, offsets, exists, 1.0, CAP, False)
    highest = tl.max(logits, axis=0)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    exponentials = tl.exp2((logits - highest) * LOG2E)
    total = tl.sum(exponentials, axis=0)
    target_logit = (1 - SMOOTHING) * tl.sum(tl.where(is_label, logits, 0.0), axis=0)
    if SMOOTHING > 0:
        target_logit += (SMOOTHING / COLUMNS) * tl.sum(tl.where(exists, logits, 0.0), axis=0)
    top = highest
    if PARTS > 1:
        leave(left_ptr, 0, row, part, highest, ROWS, PARTS)
        leave(left_ptr, 1, row, part, total, ROWS, PARTS)
        leave(left_ptr, 2, row, part, target_logit, ROWS, PARTS)
        meet(arrived_ptr, row, PARTS)
        tops = of_parts(left_ptr, 0, row, ROWS, PARTS, -float("inf"))
        totals = of_parts(left_ptr, 1, row, ROWS, PARTS, 0.0)
        targets = of_parts(left_ptr, 2, row, ROWS, PARTS, 0.0)
        top = tl.max(tops, axis=0)
        total = tl.sum(totals * tl.exp2((tops - top) * LOG2E), axis=0)
        target_logit = tl.sum(targets, axis=0)
    lse = top + tl.log2(total) * LN2
    if part == 0:
        tl.store(lse_ptr + row, lse)
        tl.store(target_ptr + row, target_logit)
    if GRADIENT:
        factor = tl.load(constant_ptr + row) + tl.load(of_lse_ptr + row) * lse
        of_target = tl.load(of_target_ptr + row)
        gradient = exponentials * (factor * tl.exp2((highest - top) * LOG2E) / total)
        gradient -= of_target * tl.where(is_label, 1 - SMOOTHING + SMOOTHING / COLUMNS, SMOOTHING / COLUMNS)
        if CAP > 0:
            gradient *= 1 - (logits / CAP) * (logits / CAP)
        store(gradient_ptr, offsets, gradient, exists)
