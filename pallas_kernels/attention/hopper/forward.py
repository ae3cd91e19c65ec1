"""The forward pass: a tile of queries, and the blocks of keys that it sees.

A block of threads holds a tile of queries, 64 rows to each of its consumer warpgroups. In each step a consumer issues
the scores of the next block and, behind them, the product of the last block's weights with v: the softmax of the new
scores runs while the tensor cores work on that product, and the consumers take turns at issuing, so that one's softmax
also hides behind another's products. Only blocks on an edge pay for a mask.
"""

import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention import tiles as tuned_tiles
from crescendo.pallas_kernels.attention.contract import Config, Operands
from crescendo.pallas_kernels.attention.hopper import masks, tiling
from crescendo.pallas_kernels.attention.hopper.masks import Ids
from crescendo.pallas_kernels.attention.hopper.tiling import OverKeys, Place, Refs
from crescendo.pallas_kernels.hopper.memory import ROWS, SHARED_BYTES, size_bytes, tiled
from crescendo.pallas_kernels.hopper.products import (
    along_rows,
    begin,
    finish,
    load_columns,
    load_rows,
    opaque,
    product,
    row_vector,
    zeros,
)
from crescendo.pallas_kernels.hopper.ring import Turns

LN_2 = math.log(2.0)
FLOOR = -1e30  # the least maximum: finite, so that a row which has seen nothing yet makes no NaN


@dataclasses.dataclass(frozen=True)
class ForwardTile:
    """How the forward pass is cut up.

    Attributes:
      block: keys of a step.
      consumers: warpgroups with 64 queries each.
      stages: blocks of k and of v in flight.
      turns: whether the consumers issue in turns.
      pairs: whether causal tiles are taken in pairs (`Schedule`).
      persistent: whether a block of threads takes several tiles, or pairs.
    """

    block: int
    consumers: int = 2
    stages: int = 2
    turns: bool = True
    pairs: bool = True
    persistent: bool = True

    @property
    def rows(self) -> int:
        return ROWS * self.consumers


def default_tile(operands: Operands) -> ForwardTile:
    """Where nobody measured."""
    width = operands.dims[-1]
    if width <= 64:
        return ForwardTile(block=128, stages=3, turns=False)
    return ForwardTile(block=128 if width <= 128 else 64)


class Forward(OverKeys):
    """The kernel; its extra memory is a place for results, None where they take the place of the queries."""

    @property
    def turns(self) -> Turns | None:
        return Turns(self.tile.consumers) if self.tile.turns else None

    def extra(self) -> Any:
        """With a place of their own the next tile's queries are loaded early, where there is room."""
        own = tiled((self.tile.consumers, ROWS, self.width), self.dtype)
        # For the barrier of turns, and for what aligning takes, ids most of all.
        spare = 4096 if self.operands.has_metadata else 256
        rings = [ring and ring.scratch() for ring in self.rings]
        return own if size_bytes([own, *rings]) <= SHARED_BYTES - spare else None

    def leaves_at(self, at: Place):
        """The row of the results that a tile writes."""
        return at.row

    def place(self, arrays, block, n) -> Place:
        # With ids the registers that a warp shares run out: a tile's place is computed anew, and not stored.
        return super().place(arrays, opaque(block) if self.operands.has_metadata else block, n)


def call_of(config: Config, operands: Operands, tile: ForwardTile) -> Forward:
    """The kernel's call for operands as they come."""
    _, length, keys, _, _, _ = operands.dims
    paired = tiling.in_pairs(config, tile, length, tile.rows)
    blocked = tiling.padded(operands, tile.rows * (2 if paired else 1), tile.block, in_place=True)
    return Forward(config, tile, blocked, (length, keys), paired)


def forward(config: Config, operands: Operands, tile: ForwardTile | None = None):
    """`out [B, T, H, D]` and `lse [B, H, T]`."""
    tile = tile or tuned_tiles.tuned("forward", config, operands, default_tile(operands))
    call = call_of(config, operands, tile)
    (batch, length, _, heads, _, _), (true_length, _) = call.operands.dims, call.lengths
    out_type = (
        jax.ShapeDtypeStruct(call.operands.q.shape, call.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    )
    out, lse = call.run(compute, call.arrays(operands), out_type)
    return out[:, :true_length, :, : operands.dims[-1]], lse[:, :, :true_length]


def compute(call: Forward, refs: Refs, consumer, at: Place, step):
    """A consumer's 64 queries of a tile."""
    at = at._replace(start=at.start + consumer * ROWS)
    rows, (lo, _, _, hi), (out_ref, lse_ref) = pl.ds(at.start, ROWS), at.blocks, refs.results
    q_ids = refs.arrays.q_ids.each(lambda array: load_rows(array.at[at.row, rows]))
    refs.own.wait(consumer)
    own_place = refs.extra is not None
    leaving = (refs.extra if own_place else refs.own["q"]).at[consumer]
    pl.when(hi > lo)(lambda: refs.first.wait(refs.first.slot(step)))

    def nothing():
        if own_place:
            refs.own.free(consumer)
        return zeros((ROWS, call.width)), row_vector(-jnp.inf)

    out, lse = lax.cond(hi > lo, lambda: _attend(call, refs, consumer, at, q_ids, step), nothing)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left the buffer
    leaving[...] = out.astype(call.dtype)
    plgpu.commit_smem()
    leaves_at = call.leaves_at(at)
    plgpu.copy_smem_to_gmem(leaving, out_ref.at[leaves_at, rows, at.head])
    lse_ref.at[leaves_at, at.head, rows][...] = lse
    if not own_place:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.own.free(consumer)
    return step + (hi - lo)


class _Sums(NamedTuple):
    """Of a row, over the blocks so far: the greatest score m and the sum l of exp2(score - m)."""

    m: Any
    l: Any  # noqa: E741 (the literature's name)


def _softmax(call: Forward, refs: Refs, at: Place, q_ids: Ids, scores, slot, j, sums: _Sums, *, edge: bool):
    """The block's weights, the new sums, and alpha: what older sums shrink by.

    `edge`: whether it may be a block that is seen in part.
    """
    config, block = call.config, call.tile.block
    scores, factor, _ = masks.capped(config, scores)

    def masked(scores):
        k_ids = refs.arrays.k_ids.of(refs.first, slot).each(load_columns)
        keys = (j * block, None) if call.in_place else (None, call.ragged)
        scores = masks.hide(scores, config, q_ids, k_ids, at.start, call.first_key(j), keys=keys)
        if any(ids is not None for ids in k_ids):
            plgpu.commit_smem()  # these reads come before the copy that overwrites the slot
        return scores

    partly = (j < at.blocks.full_lo) | (j >= at.blocks.full_hi) if edge else None
    scores = masks.where_edge(scores, masked, partly)
    refs.first.free(slot)
    m = jnp.maximum(sums.m, scores.max(axis=1) * factor)
    p = jnp.exp2(scores * factor - along_rows(m, scores.shape))
    alpha = jnp.exp2(sums.m - m)
    return p, _Sums(m, sums.l * alpha + p.sum(axis=1)), alpha


def _attend(call: Forward, refs: Refs, consumer, at: Place, q_ids: Ids, step):
    """`out [64, D]` and `lse [64]` of a tile that sees a block at least."""
    keys, values, (lo, full_lo, full_hi, hi) = refs.first, refs.second, at.blocks
    scores_type, out_type = (plgpu.ACC((ROWS, n), jnp.float32) for n in (call.tile.block, call.width))
    softmax = functools.partial(_softmax, call, refs, at, q_ids)

    def in_turn():
        return call.turns.taken(refs.turn, consumer) if call.turns else contextlib.nullcontext()

    def scores_of(acc, slot):
        product(acc, refs.own["q"].at[consumer], keys["k"].at[slot].transpose((1, 0)))

    def first_scores(acc):
        with in_turn():
            scores_of(acc, keys.slot(step))
        return finish(acc)

    def one_block(edge: bool, j, carry):
        p, sums, out = carry
        at_step = step + (j - lo)
        slot, last = keys.slot(at_step), values.slot(at_step - 1)
        keys.wait(slot)
        values.wait(last)

        def overlapped(scores_acc, out_acc):
            begin(out_acc, out)
            with in_turn():
                scores_of(scores_acc, slot)
                product(out_acc, p, values["v"].at[last])
            scores = finish(scores_acc, in_flight=1)
            new_p, new_sums, alpha = softmax(scores, slot, j, sums, edge=edge)
            # The last weights are in use until the product is done: the new ones, rounded, take their registers.
            new_p, new_out = lax.optimization_barrier((new_p, finish(out_acc)))
            return new_p.astype(call.dtype), new_sums, alpha, new_out

        p, sums, alpha, out = pl.run_scoped(overlapped, scores_type, out_type)
        values.free(last)
        return p, sums, out * along_rows(alpha, out.shape)

    start = _Sums(row_vector(FLOOR), row_vector(0.0))
    p, sums, _ = softmax(pl.run_scoped(first_scores, scores_type), keys.slot(step), lo, start, edge=call.edges)
    carry = p.astype(call.dtype), sums, zeros((ROWS, call.width))
    # Where a tile begins with blocks that it sees all of, these have a loop without a branch.
    unmasked_end = jnp.where(full_lo <= lo, jnp.maximum(full_hi, lo + 1), lo + 1) if call.edges else hi
    carry = lax.fori_loop(lo + 1, unmasked_end, functools.partial(one_block, False), carry)
    if call.edges:
        carry = lax.fori_loop(unmasked_end, hi, functools.partial(one_block, True), carry)
    p, sums, out = carry
    last = values.slot(step + (hi - lo) - 1)
    if refs.extra is not None:
        refs.own.free(consumer)
    values.wait(last)

    def last_product(acc):
        begin(acc, out)
        product(acc, p, values["v"].at[last])
        return finish(acc)

    out = pl.run_scoped(last_product, out_type)
    values.free(last)
    seen = sums.l > 0.0
    total = jnp.where(seen, sums.l, 1.0)
    out = out * along_rows(jnp.where(seen, 1.0 / total, 0.0), out.shape)
    return out, jnp.where(seen, (sums.m + jnp.log2(total)) * LN_2, -jnp.inf)
