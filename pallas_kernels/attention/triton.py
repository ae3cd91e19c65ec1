"""jax-triton, Ampere and later: forward and backward after FlashAttention-2, deterministic."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from crescendo.pallas_kernels.attention.contract import Config, Kernels, Operands, block_ranges
from crescendo.pallas_kernels.attention.tiles import tuned
from crescendo.pallas_kernels.op import Unsupported, require_gpu
from crescendo.pallas_kernels.triton_call import triton_call

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FLOOR: tl.constexpr = tl.constexpr(
    -1e30
)  # the least maximum: finite, so that a row which has seen nothing makes no NaN


def attention(config: Config, operands: Operands) -> Kernels:
    del config  # any will do
    require_gpu(8.0)
    if operands.q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"needs bfloat16 or float16, not {operands.q.dtype}")
    if operands.dims[-1] > 256:
        raise Unsupported(f"needs a head width of at most 256, not {operands.dims[-1]}")
    return Kernels(forward, backward)


@dataclasses.dataclass(frozen=True)
class TritonTile:
    """How a pass is cut up.

    Attributes:
      block_q, block_k: queries and keys of a block.
      warps: of a program.
      stages: blocks in flight.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int = 2


def forward_tile(width: int) -> TritonTile:
    """Where nobody measured."""
    if width <= 64:
        return TritonTile(128, 64, 4)
    return TritonTile(128 if width <= 128 else 64, 64 if width <= 128 else 32, 8)


def backward_tile(width: int) -> TritonTile:
    """Of both kernels, where nobody measured."""
    if width <= 128:
        return TritonTile(64, 64, 4 if width <= 64 else 8)
    return TritonTile(32, 32, 8, stages=1)


def _constants(config: Config, operands: Operands, tile: TritonTile, ranges) -> dict[str, Any]:
    _, length, keys, heads, kv_heads, width = operands.dims
    sizes = (1, 1, 1, 1) if operands.bias is None else operands.bias.shape
    strides = [0 if size == 1 else math.prod(sizes[axis + 1 :]) for axis, size in enumerate(sizes)]
    return dict(
        T=length,
        S=keys,
        H=heads,
        K=kv_heads,
        D=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        num_warps=tile.warps,
        num_stages=tile.stages,
        SCALE=config.scale,
        CAP=config.soft_cap or 0.0,
        CAUSAL=config.causal,
        WINDOW=config.window or 0,
        SEGMENTS=operands.q_segments is not None,
        POSITIONS=operands.q_positions is not None,
        PER_ROW=ranges.shape[0] > 1,
        BLOCKS=ranges.shape[1],
        BIAS=operands.bias is not None,
        BIAS_B=strides[0],
        BIAS_H=strides[1],
        BIAS_T=strides[2],
        BIAS_S=strides[3],
    )


def _metadata(operands: Operands, ranges):
    """The bias, the ranges, and the metadata, with the ranges in the place of what is absent."""
    bias = ranges if operands.bias is None else operands.bias
    return [bias, ranges, *(ranges if array is None else array.astype(jnp.int32) for array in operands.metadata)]


def forward(config: Config, operands: Operands, tile: TritonTile | None = None):
    batch, length, _, heads, _, width = operands.dims
    tile = tile or tuned("triton forward", config, operands, forward_tile(width))
    ranges = jnp.stack(block_ranges(config, operands, tile.block_q, tile.block_k)[0], -1)
    return triton_call(
        *operands[:3],
        *_metadata(operands, ranges),
        kernel=_forward_kernel,
        out_shape=[
            jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        grid=(triton.cdiv(length, tile.block_q), heads, batch),
        **_constants(config, operands, tile, ranges),
    )


def backward(config: Config, operands: Operands, lse, dout, delta, _out=None, tile: TritonTile | None = None):
    batch, length, keys, heads, kv_heads, width = operands.dims
    tile = tile or tuned("triton backward", config, operands, backward_tile(width))
    block_q, block_k = tile.block_q, tile.block_k
    # exp(score - inf) = 0: rows that see nothing take no part.
    lse = jnp.where(jnp.isfinite(lse), lse, jnp.inf)
    arrays = (*operands[:3], dout, lse, delta.astype(jnp.float32))
    both = [jnp.stack(ranges, -1) for ranges in block_ranges(config, operands, block_q, block_k)]

    def call(kernel, ranges, results, grid):
        return triton_call(
            *arrays,
            *_metadata(operands, ranges),
            kernel=kernel,
            out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in results],
            grid=grid,
            **_constants(config, operands, tile, ranges),
        )

    (dq,) = call(_queries_kernel, both[0], [operands.q], (triton.cdiv(length, block_q), heads, batch))
    dk, dv = call(_keys_kernel, both[1], operands[1:3], (triton.cdiv(keys, block_k), kv_heads, batch))
    if operands.bias is None:
        return dq, dk, dv, None
    # A kernel of its own, run only where somebody asks for this gradient.
    _, whole_h, whole_q, whole_k = (size > 1 for size in operands.bias.shape)
    rows = kv_heads * (heads // kv_heads if whole_h else 1)
    blocks = (triton.cdiv(length, block_q) if whole_q else 1) * (triton.cdiv(keys, block_k) if whole_k else 1)
    dbias = jax.ShapeDtypeStruct((batch, rows, *operands.bias.shape[2:]), jnp.float32)
    return dq, dk, dv, *call(_bias_kernel, both[0], [dbias], (blocks, rows, batch))


@triton.jit
def _range(ranges, row, block, PER_ROW: tl.constexpr, BLOCKS: tl.constexpr):
    """lo, full_lo, full_hi, hi of one block."""
    at = ranges + 4 * block + (4 * BLOCKS * row if PER_ROW else 0)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _tile(pointer, row, head, index, N: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to rows `index` of `[B, N, HEADS, D]`, and which of them are there."""
    d = tl.arange(0, BLOCK_D)
    base = pointer + (row.to(tl.int64) * N * HEADS + head) * D
    there = (index < N)[:, None] & (d < D)[None, :]
    return base + index.to(tl.int64)[:, None] * (HEADS * D) + d[None, :], there


@triton.jit
def _load(pointer, row, head, index, N: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `index` of `[B, N, HEADS, D]`, 0 where there are none."""
    at, there = _tile(pointer, row, head, index, N, HEADS, D, BLOCK_D)
    return tl.load(at, mask=there, other=0.0)


@triton.jit
def _load_queries(
    q_pointer, dout_pointer, lse_pointer, delta_pointer, row, head, i,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the backward pass reads of a block of queries: q, dout, lse, delta."""
    q = _load(q_pointer, row, head, i, T, H, D, BLOCK_D)
    dout = _load(dout_pointer, row, head, i, T, H, D, BLOCK_D)
    lse = tl.load(lse_pointer + (row * H + head) * T + i, mask=i < T, other=float("inf"))
    delta = tl.load(delta_pointer + (row * H + head) * T + i, mask=i < T, other=0.0)
    return q, dout, lse, delta


@triton.jit
def _capped(products, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Scores, and the derivative of their cap."""
    scores = products * SCALE
    slope = scores
    if CAP > 0:
        capped = 2 * tl.sigmoid(2 * scores / CAP) - 1
        slope = 1 - capped * capped
        scores = CAP * capped
    return scores, slope


@triton.jit
def _biased(
    scores, biases, row, head, i, j, T: tl.constexpr, S: tl.constexpr,
    BIAS: tl.constexpr, BIAS_B: tl.constexpr, BIAS_H: tl.constexpr, BIAS_T: tl.constexpr, BIAS_S: tl.constexpr,
):  # fmt: skip
    """Scores and their bias, whose strides are 0 where it is broadcast."""
    if BIAS:
        base = biases + row.to(tl.int64) * BIAS_B + head.to(tl.int64) * BIAS_H
        at = base + i.to(tl.int64)[:, None] * BIAS_T + j[None, :] * BIAS_S
        scores += tl.load(at, mask=(i < T)[:, None] & (j < S)[None, :], other=0.0).to(tl.float32)
    return scores


@triton.jit
def _hide(
    scores, i, j, q_ids, k_ids, q_places, k_places, row,
    T: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """-inf where query i doesn't see key j."""
    seen = (i < T)[:, None] & (j < S)[None, :]
    if SEGMENTS:
        q_id = tl.load(q_ids + row * T + i, mask=i < T, other=0)
        k_id = tl.load(k_ids + row * S + j, mask=j < S, other=0)
        seen = seen & (q_id[:, None] == k_id[None, :])
    if CAUSAL or WINDOW > 0:
        if POSITIONS:
            q_place = tl.load(q_places + row * T + i, mask=i < T, other=0)
            k_place = tl.load(k_places + row * S + j, mask=j < S, other=0)
            ahead = q_place[:, None] - k_place[None, :]
        else:
            ahead = i[:, None] - j[None, :]
        if CAUSAL:  # noqa: SIM108  evaluated while compiling
            seen = seen & (ahead >= 0)
        else:
            seen = seen & (ahead > -WINDOW)
        if WINDOW > 0:
            seen = seen & (ahead < WINDOW)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _forward_kernel(
    q_pointer, k_pointer, v_pointer, biases, ranges, q_ids, k_ids, q_places, k_places, out_pointer, lse_pointer,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, POSITIONS: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCKS: tl.constexpr, BIAS: tl.constexpr, BIAS_B: tl.constexpr, BIAS_H: tl.constexpr, BIAS_T: tl.constexpr,
    BIAS_S: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first, where causal
    head, row = tl.program_id(1), tl.program_id(2)
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load(q_pointer, row, head, i, T, H, D, BLOCK_D)
    maximum = tl.full([BLOCK_Q], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    lo, full_lo, full_hi, hi = _range(ranges, row, block, PER_ROW, BLOCKS)
    for step in range(lo, hi):
        j = step * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _load(k_pointer, row, head // (H // K), j, S, K, D, BLOCK_D)
        scores, _slope = _capped(tl.dot(q, tl.trans(k)), SCALE, CAP)
        scores = _biased(scores, biases, row, head, i, j, T, S, BIAS, BIAS_B, BIAS_H, BIAS_T, BIAS_S)
        if (step < full_lo) | (step >= full_hi):
            scores = _hide(
                scores, i, j, q_ids, k_ids, q_places, k_places, row, T, S, CAUSAL, WINDOW, SEGMENTS, POSITIONS
            )
        scores = scores * LOG2E
        new = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(maximum - new)
        total = total * shrink + tl.sum(weights, 1)
        v = _load(v_pointer, row, head // (H // K), j, S, K, D, BLOCK_D)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None])
        maximum = new
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    out_at, out_there = _tile(out_pointer, row, head, i, T, H, D, BLOCK_D)
    tl.store(out_at, (mixed / safe[:, None]).to(q.dtype), mask=out_there)
    lse = tl.where(seen, (maximum + tl.log2(safe)) / LOG2E, float("-inf"))
    tl.store(lse_pointer + (row * H + head) * T + i, lse, mask=i < T)


@triton.jit
def _gradient_of_scores(
    q, k, v, dout, lse, delta, edge, i, j, biases, q_ids, k_ids, q_places, k_places, row, head,
    T: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, POSITIONS: tl.constexpr,
    BIAS: tl.constexpr, BIAS_B: tl.constexpr, BIAS_H: tl.constexpr, BIAS_T: tl.constexpr, BIAS_S: tl.constexpr,
):  # fmt: skip
    """The weights P of one block, and the gradients of its biased scores and of its products q.k."""
    scores, slope = _capped(tl.dot(q, tl.trans(k)), SCALE, CAP)
    scores = _biased(scores, biases, row, head, i, j, T, S, BIAS, BIAS_B, BIAS_H, BIAS_T, BIAS_S)
    if edge:
        scores = _hide(scores, i, j, q_ids, k_ids, q_places, k_places, row, T, S, CAUSAL, WINDOW, SEGMENTS, POSITIONS)
    weights = tl.exp2((scores - lse[:, None]) * LOG2E)
    dscores = weights * (tl.dot(dout, tl.trans(v)) - delta[:, None])
    dproducts = dscores * SCALE
    if CAP > 0:
        dproducts = dproducts * slope
    return weights, dscores, dproducts


@triton.jit
def _queries_kernel(
    q_pointer, k_pointer, v_pointer, dout_pointer, lse_pointer, delta_pointer,
    biases, ranges, q_ids, k_ids, q_places, k_places, dq_pointer,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, POSITIONS: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCKS: tl.constexpr, BIAS: tl.constexpr, BIAS_B: tl.constexpr, BIAS_H: tl.constexpr, BIAS_T: tl.constexpr,
    BIAS_S: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, row = tl.program_id(1), tl.program_id(2)
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q, dout, lse, delta = _load_queries(
        q_pointer, dout_pointer, lse_pointer, delta_pointer, row, head, i, T, H, D, BLOCK_D
    )
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    lo, full_lo, full_hi, hi = _range(ranges, row, block, PER_ROW, BLOCKS)
    for step in range(lo, hi):
        j = step * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _load(k_pointer, row, head // (H // K), j, S, K, D, BLOCK_D)
        v = _load(v_pointer, row, head // (H // K), j, S, K, D, BLOCK_D)
        _weights, _dscores, dproducts = _gradient_of_scores(
            q, k, v, dout, lse, delta, (step < full_lo) | (step >= full_hi), i, j, biases, q_ids, k_ids, q_places,
            k_places, row, head, T, S, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, POSITIONS,
            BIAS, BIAS_B, BIAS_H, BIAS_T, BIAS_S,
        )  # fmt: skip
        dq = tl.dot(dproducts.to(k.dtype), k, dq)
    dq_at, dq_there = _tile(dq_pointer, row, head, i, T, H, D, BLOCK_D)
    tl.store(dq_at, dq.to(q.dtype), mask=dq_there)


@triton.jit
def _keys_kernel(
    q_pointer, k_pointer, v_pointer, dout_pointer, lse_pointer, delta_pointer,
    biases, ranges, q_ids, k_ids, q_places, k_places, dk_pointer, dv_pointer,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, POSITIONS: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCKS: tl.constexpr, BIAS: tl.constexpr, BIAS_B: tl.constexpr, BIAS_H: tl.constexpr, BIAS_T: tl.constexpr,
    BIAS_S: tl.constexpr,
):  # fmt: skip
    block, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    j = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k = _load(k_pointer, row, kv_head, j, S, K, D, BLOCK_D)
    v = _load(v_pointer, row, kv_head, j, S, K, D, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    lo, full_lo, full_hi, hi = _range(ranges, row, block, PER_ROW, BLOCKS)
    for turn in range(0, (hi - lo) * (H // K)):
        step = lo + turn % (hi - lo)
        head = kv_head * (H // K) + turn // (hi - lo)
        i = step * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q, dout, lse, delta = _load_queries(
            q_pointer, dout_pointer, lse_pointer, delta_pointer, row, head, i, T, H, D, BLOCK_D
        )
        weights, _dscores, dproducts = _gradient_of_scores(
            q, k, v, dout, lse, delta, (step < full_lo) | (step >= full_hi), i, j, biases, q_ids, k_ids, q_places,
            k_places, row, head, T, S, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, POSITIONS,
            BIAS, BIAS_B, BIAS_H, BIAS_T, BIAS_S,
        )  # fmt: skip
        dv = tl.dot(tl.trans(weights.to(dout.dtype)), dout, dv)
        dk = tl.dot(tl.trans(dproducts.to(q.dtype)), q, dk)
    dk_at, dk_there = _tile(dk_pointer, row, kv_head, j, S, K, D, BLOCK_D)
    tl.store(dk_at, dk.to(k.dtype), mask=dk_there)
    dv_at, dv_there = _tile(dv_pointer, row, kv_head, j, S, K, D, BLOCK_D)
    tl.store(dv_at, dv.to(v.dtype), mask=dv_there)


@triton.jit
def _bias_kernel(
    q_pointer, k_pointer, v_pointer, dout_pointer, lse_pointer, delta_pointer,
    biases, ranges, q_ids, k_ids, q_places, k_places, dbias_pointer,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, POSITIONS: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCKS: tl.constexpr, BIAS: tl.constexpr, BIAS_B: tl.constexpr, BIAS_H: tl.constexpr, BIAS_T: tl.constexpr,
    BIAS_S: tl.constexpr,
):  # fmt: skip
    """One block of the bias' gradient, summed over the queries, keys and heads of a group that share it."""
    q_blocks: tl.constexpr = (T + BLOCK_Q - 1) // BLOCK_Q
    k_blocks: tl.constexpr = (S + BLOCK_K - 1) // BLOCK_K
    q_turns: tl.constexpr = q_blocks if BIAS_T == 0 else 1
    k_turns: tl.constexpr = k_blocks if BIAS_S == 0 else 1
    head_turns: tl.constexpr = H // K if BIAS_H == 0 else 1
    k_parts: tl.constexpr = k_blocks // k_turns
    part, bias_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for turn in range(0, head_turns * q_turns * k_turns):
        head = bias_head * head_turns + turn // (q_turns * k_turns)
        block = part // k_parts + turn // k_turns % q_turns
        step = part % k_parts + turn % k_turns
        lo, full_lo, full_hi, hi = _range(ranges, row, block, PER_ROW, BLOCKS)
        if (lo <= step) & (step < hi):
            i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            j = step * BLOCK_K + tl.arange(0, BLOCK_K)
            q, dout, lse, delta = _load_queries(
                q_pointer, dout_pointer, lse_pointer, delta_pointer, row, head, i, T, H, D, BLOCK_D
            )
            k = _load(k_pointer, row, head // (H // K), j, S, K, D, BLOCK_D)
            v = _load(v_pointer, row, head // (H // K), j, S, K, D, BLOCK_D)
            _weights, dscores, _dproducts = _gradient_of_scores(
                q, k, v, dout, lse, delta, (step < full_lo) | (step >= full_hi), i, j, biases, q_ids, k_ids, q_places,
                k_places, row, head, T, S, SCALE, CAP, CAUSAL, WINDOW, SEGMENTS, POSITIONS,
                BIAS, BIAS_B, BIAS_H, BIAS_T, BIAS_S,
            )  # fmt: skip
            total += dscores
    rows: tl.constexpr = 1 if BIAS_T == 0 else T
    columns: tl.constexpr = 1 if BIAS_S == 0 else S
    i = part // k_parts * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = part % k_parts * BLOCK_K + tl.arange(0, BLOCK_K)
    if BIAS_T == 0:
        total = tl.where((i == 0)[:, None], tl.sum(total, 0)[None, :], 0.0)
    if BIAS_S == 0:
        total = tl.where((j == 0)[None, :], tl.sum(total, 1)[:, None], 0.0)
    base = dbias_pointer + (row.to(tl.int64) * tl.num_programs(1) + bias_head) * rows * columns
    at = base + i.to(tl.int64)[:, None] * columns + j[None, :]
    tl.store(at, total, mask=(i < rows)[:, None] & (j < columns)[None, :])
