"""The gradient of q, by weights of its own: a tile of queries, and the blocks of keys that it sees.

Of each row it also leaves what the kernel of `key_gradients` takes: the log-sum-exp in base 2, and delta with dout.out.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention.contract import Operands
from crescendo.pallas_kernels.attention.hopper import masks
from crescendo.pallas_kernels.attention.hopper.key_gradients import last_product
from crescendo.pallas_kernels.attention.hopper.masks import LOG2_E, Ids
from crescendo.pallas_kernels.attention.hopper.tiling import OverKeys, Place, Refs
from crescendo.pallas_kernels.hopper.memory import ROWS
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


class QueryGradients(OverKeys):
    """The kernel; its extra memory is for the rows' log-sum-exp and delta on their way out."""

    own_parts = ("q", "dout")

    def extra(self) -> Any:
        return plgpu.SMEM((2, self.tile.consumers, ROWS), jnp.float32)

    def gradient(self, operands: Operands, **rows):
        """`(dq, lse in base 2, delta)`, the latter float32 `[B, H, T]`.

        `rows` are `dout`, `lse`, and of `out` and `delta` at least one: the latter lacks dout.out where the former is
        given.
        """
        batch, length, _, heads, _, _ = self.operands.dims
        numbers = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
        dq = jax.ShapeDtypeStruct(self.operands.q.shape, self.dtype)
        return self.run(_compute, self.arrays(operands, **rows), (dq, numbers, numbers))


def _numbers_of_rows(refs: Refs, consumer, at: Place, rows):
    """The rows' log-sum-exp in base 2 and delta, which are written out too; the tile's own slot has arrived then."""
    arrays = refs.arrays
    lse = load_rows(arrays.lse.at[at.row, at.head, rows])
    # exp(score - inf) = 0: rows that see nothing, and rows of padding, take no part.
    lse = jnp.where(lse > -jnp.inf, lse * LOG2_E, jnp.inf)
    delta = row_vector(0.0) if arrays.delta is None else load_rows(arrays.delta.at[at.row, at.head, rows])
    if arrays.out is None:
        refs.own.wait(consumer)
    else:
        out = plgpu.load(arrays.out.at[at.row, rows, at.head], layout=plgpu.Layout.WGMMA, optimized=False)
        refs.own.wait(consumer)
        dout = plgpu.load(refs.own["dout"].at[consumer], layout=plgpu.Layout.WGMMA)
        delta += (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=1)
    for i, (numbers, result) in enumerate(zip((lse, delta), refs.results[1:], strict=True)):
        refs.extra.at[i, consumer][...] = numbers
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.extra.at[i, consumer], result.at[at.row, at.head, rows])
    return lse, delta


def _compute(call: QueryGradients, refs: Refs, consumer, at: Place, step):
    """A consumer's 64 queries of a tile."""
    (lo, full_lo, full_hi, hi), shape = at.blocks, (ROWS, call.width)
    at = at._replace(start=at.start + consumer * ROWS)
    rows = pl.ds(at.start, ROWS)
    q_ids = refs.arrays.q_ids.each(lambda array: load_rows(array.at[at.row, rows]))
    lse, delta = _numbers_of_rows(refs, consumer, at, rows)
    block = functools.partial(_one_block, call, refs, consumer, at, q_ids, lse, delta, step)
    unmasked_end = jnp.where(full_lo <= lo, full_hi, lo) if call.edges else hi
    carry = zeros(shape), zeros((ROWS, call.tile.block)).astype(call.dtype) if call.tile.behind else None
    carry = lax.fori_loop(lo, unmasked_end, functools.partial(block, False), carry)
    if call.edges:
        carry = lax.fori_loop(unmasked_end, hi, functools.partial(block, True), carry)
    dq, old = carry
    if call.tile.behind:
        dq = last_product(dq, old, refs.first, "k", step + (hi - lo) - 1, hi > lo)
    leaving = refs.own["q"].at[consumer]
    leaving[...] = (dq * call.config.scale).astype(call.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(leaving, refs.results[0].at[at.row, rows, at.head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.own.free(consumer)
    return step + (hi - lo)


def _one_block(
    call: QueryGradients, refs: Refs, consumer, at: Place, q_ids: Ids, lse, delta, step, edge: bool, j, carry
):
    """`(dq, the block's gradients of scores where their product comes behind)`; `edge`: it may be seen in part."""
    config, tile, keys, values = call.config, call.tile, refs.first, refs.second
    (lo, full_lo, full_hi, _), shape, dtype = at.blocks, (ROWS, tile.block), call.dtype
    at_step = step + (j - lo)
    own, slot = opaque(consumer), keys.slot(at_step)
    last = jnp.where(j > lo, keys.slot(at_step + tile.stages - 1), slot)
    keys.wait(slot)

    def masked(scores):
        k_ids = refs.arrays.k_ids.of(keys, slot).each(load_columns)
        scores = masks.hide(scores, config, q_ids, k_ids, at.start, j * tile.block, keys=(None, call.ragged))
        if any(ids is not None for ids in k_ids):
            plgpu.commit_smem()  # these reads come before the copy that overwrites the slot
        return scores

    def products(scores_acc, dp_acc, dq_acc):
        dq, old = carry
        product(scores_acc, refs.own["q"].at[own], keys["k"].at[slot].transpose((1, 0)))
        values.wait(slot)
        product(dp_acc, refs.own["dout"].at[own], values["v"].at[slot].transpose((1, 0)))
        begin(dq_acc, dq)
        if tile.behind:
            product(dq_acc, old, keys["k"].at[last])
        scores = finish(scores_acc, in_flight=1 + int(tile.behind))
        partly = (j < full_lo) | (j >= full_hi) if edge else None
        p, slope = masks.weights_again(config, scores, along_rows(lse, shape), masked, partly)
        if tile.behind:
            dq = finish(dq_acc)
            pl.when(j > lo)(lambda: keys.free(last))
        dp = finish(dp_acc)
        values.free(slot)
        ds = p * (dp - along_rows(delta, shape))
        ds = (ds if slope is None else ds * slope).astype(dtype)
        if tile.behind:
            return dq, ds
        product(dq_acc, ds, keys["k"].at[slot])
        dq = finish(dq_acc)
        keys.free(slot)
        return dq, None

    score = plgpu.ACC(shape, jnp.float32)
    return pl.run_scoped(products, score, score, plgpu.ACC((ROWS, call.width), jnp.float32))
