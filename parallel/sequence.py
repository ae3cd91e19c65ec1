r"""Attention over rows whose tokens are split over devices: a ring, Ulysses, or both.

**Ring** (Liu et al. 2023, https://arxiv.org/abs/2310.01889): keys and values travel from device to device while each
attends with the block it has, by the fused kernels; partial results are merged by their log-sum-exp. The next block is
on its way while the present one is used. The backward pass runs the ring again, with the gradients of keys and values
travelling behind them, so no device ever holds all of the sequence. Per layer a device sends
:math:`2 N h_{kv} (R - 1) / R` numbers forward, for a row of N tokens over R devices.

**Zig-zag order**: under a causal mask a contiguous split leaves the first device nearly idle. A row is cut into 2 R
chunks, and device i holds chunks i and 2 R - 1 - i: then every device has the same work in every step, and past the
first step no block needs a causal mask. Everything that goes with tokens is put into that order together (`zigzag`).

**Ulysses** (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509): an all-to-all trades the split of tokens for a split
of heads, each device attends with full rows, and another all-to-all trades back: :math:`4 N h / P` numbers forward.

With both, groups of `ulysses` neighbours trade tokens for heads, and the ring runs over the groups.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

AXIS = "sequence"


def zigzag(sequence_length: int, ring: int) -> np.ndarray:
    """The order of a row's tokens: position p of the reordered row holds token `zigzag(...)[p]`.

    Args:
      sequence_length: a multiple of `2 * ring`.
      ring: devices in the ring; each gets an equal run of the reordered row.

    >>> zigzag(8, ring=2)
    array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    chunks = np.arange(sequence_length).reshape(2 * ring, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[2 * ring - 1 - i]]) for i in range(ring)])


class BlockAttention(NamedTuple):
    """Attention over one block of keys, whose parts the ring puts together.

    Attributes:
      forward: `(q, k, v, segments_q, segments_k, causal) -> (mixed [B, Tq, H, E], log-sum-exp [B, H, Tq])`, float32; 0
        and -inf of nothing. Causal is meant for a block of the queries' own tokens.
      backward: `(q, k, v, segments_q, segments_k, causal, log_sum, d_output, delta) -> (dq, dk, dv)`, float32, from the
        full row's log-sum-exp and `delta = sum(dO O)`, both `[B, H, Tq]`.
      merge: `(mixed [N, B, Tq, H, E], log-sum-exp [N, B, H, Tq]) -> (mixed, log-sum-exp)` of N blocks together.
    """

    forward: Callable
    backward: Callable
    merge: Callable


def attention(
    q_BTHE, k_BTKE, v_BTKE, segment_ids_BT, *, blocks: BlockAttention, ring: int, ulysses: int = 1, causal: bool = True
):
    """`softmax(q k^T / sqrt(E)) v` within segments, over rows split along the mesh axis `sequence`.

    Runs inside `jax.shard_map`, manual over that axis, on each device's own part. Where the ring is longer than 1 the
    tokens are in the order of `zigzag`, with which a causal mask is meant.

    Args:
      q_BTHE: `[B, T, H, E]`.
      k_BTKE, v_BTKE: `[B, T, K, E]`, H a multiple of K.
      segment_ids_BT: int32 `[B, T]`; a token sees its own segment.
      blocks: attention over one block.
      ring: the length of the ring.
      ulysses: how many neighbours trade tokens for heads; `ring * ulysses` is the axis's size.
      causal: whether a token sees only itself and what is before it.

    Returns:
      `[B, T, H, E]` in q's dtype.
    """
    q, k, v, segment_ids = q_BTHE, k_BTKE, v_BTKE, segment_ids_BT
    if ulysses == 1:
        return _ring(q, k, v, segment_ids, blocks, ring, ulysses, causal)
    groups = [[i * ulysses + j for j in range(ulysses)] for i in range(ring)]
    if k.shape[2] % ulysses:  # fewer key heads than devices: each gets a copy of the one that its queries share
        k, v = (jnp.repeat(x, ulysses // k.shape[2], axis=2) for x in (k, v))
    trade = functools.partial(jax.lax.all_to_all, axis_name=AXIS, tiled=True, axis_index_groups=groups)
    q, k, v = (trade(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    segment_ids = jax.lax.all_gather(segment_ids, AXIS, axis=1, tiled=True, axis_index_groups=groups)
    return trade(_ring(q, k, v, segment_ids, blocks, ring, ulysses, causal), split_axis=1, concat_axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _ring(q, k, v, segment_ids, blocks: BlockAttention, ring: int, ulysses: int, causal: bool):
    return _ring_forward(q, k, v, segment_ids, blocks, ring, ulysses, causal)[0]


def _ring_forward(q, k, v, segment_ids, blocks: BlockAttention, ring: int, ulysses: int, causal: bool):
    """Output, and what the backward pass needs; step s uses the block of the device s places before."""
    shift = _shift(ring, ulysses)
    place = jax.lax.axis_index(AXIS) // ulysses
    half = q.shape[1] // 2
    block = (k, v, segment_ids)
    for step in range(ring):
        following = shift(block) if step < ring - 1 else block
        k_now, v_now, segments_now = block
        if step == 0:
            mixed, log_sum = blocks.forward(q, k, v, segment_ids, segment_ids, causal)
        elif causal:

            def before(q, k, v, segments, segments_k):
                return blocks.forward(q, k[:, :half], v[:, :half], segments, segments_k[:, :half], False)

            def after(q, k, v, segments, segments_k):
                mixed, log_sum = blocks.forward(q[:, half:], k, v, segments[:, half:], segments_k, False)
                mixed = jnp.pad(mixed, ((0, 0), (half, 0), (0, 0), (0, 0)))
                return mixed, jnp.pad(log_sum, ((0, 0), (0, 0), (half, 0)), constant_values=-jnp.inf)

            part = jax.lax.cond(place >= step, before, after, q, k_now, v_now, segment_ids, segments_now)
            mixed, log_sum = blocks.merge(*map(jnp.stack, zip((mixed, log_sum), part, strict=True)))
        else:
            part = blocks.forward(q, k_now, v_now, segment_ids, segments_now, False)
            mixed, log_sum = blocks.merge(*map(jnp.stack, zip((mixed, log_sum), part, strict=True)))
        block = following
    output = mixed.astype(q.dtype)
    return output, (q, k, v, segment_ids, output, log_sum)


def _ring_backward(blocks: BlockAttention, ring: int, ulysses: int, causal: bool, residuals, d_output):
    q, k, v, segment_ids, output, log_sum = residuals
    shift = _shift(ring, ulysses)
    place = jax.lax.axis_index(AXIS) // ulysses
    half = q.shape[1] // 2
    delta = jnp.einsum("bthe,bthe->bht", d_output.astype(jnp.float32), output.astype(jnp.float32))

    def block_backward(of_queries, k, v, segments_k, causal=False):
        q, segments, log_sum, d_output, delta = of_queries
        return blocks.backward(q, k, v, segments, segments_k, causal, log_sum, d_output, delta)

    block = (k, v, segment_ids)
    gradients = None  # of the block's keys and values: they travel one step behind it
    for step in range(ring):
        following = shift(block) if step < ring - 1 else block
        k_now, v_now, segments_now = block
        of_queries = (q, segment_ids, log_sum, d_output, delta)
        if step == 0:
            dq, *at_home = block_backward(of_queries, k, v, segment_ids, causal)
        elif causal:

            def before(of_queries, k, v, segments_k):
                dq, *dkv = block_backward(of_queries, k[:, :half], v[:, :half], segments_k[:, :half])
                return dq, *(jnp.pad(x, ((0, 0), (0, half), (0, 0), (0, 0))) for x in dkv)

            def after(of_queries, k, v, segments_k):
                q, segments, log_sum, d_output, delta = of_queries
                later = (q[:, half:], segments[:, half:], log_sum[..., half:], d_output[:, half:], delta[..., half:])
                dq, *dkv = block_backward(later, k, v, segments_k)
                return jnp.pad(dq, ((0, 0), (half, 0), (0, 0), (0, 0))), *dkv

            dq_now, *dkv = jax.lax.cond(place >= step, before, after, of_queries, k_now, v_now, segments_now)
        else:
            dq_now, *dkv = block_backward(of_queries, k_now, v_now, segments_now)
        if step > 0:
            dq = dq + dq_now
            gradients = tuple(dkv) if gradients is None else jax.tree.map(jnp.add, shift(gradients), tuple(dkv))
        block = following
    dk, dv = at_home
    if gradients is not None:
        dk, dv = (here + back for here, back in zip(at_home, shift(gradients), strict=True))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


def _shift(ring: int, ulysses: int) -> Callable:
    """Sends a tree to the next device of the ring."""
    following = [(i * ulysses + j, (i + 1) % ring * ulysses + j) for i in range(ring) for j in range(ulysses)]
    return lambda tree: jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, following), tree)
