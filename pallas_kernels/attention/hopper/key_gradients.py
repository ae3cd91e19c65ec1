"""The gradients of k and v: a tile of keys, and the queries that see it, of all the query heads of its group.

The scores are transposed, so that the weights are the left operand of the next product without passing through memory.
Where a call keeps the gradients of its scores (`scores`), they are written down as well.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention.contract import Operands
from crescendo.pallas_kernels.attention.hopper import masks
from crescendo.pallas_kernels.attention.hopper.masks import Ids
from crescendo.pallas_kernels.attention.hopper.scores import Parts
from crescendo.pallas_kernels.attention.hopper.tiling import OverQueries, Place, Refs
from crescendo.pallas_kernels.hopper.memory import ROWS, tiled
from crescendo.pallas_kernels.hopper.products import (
    along_columns,
    begin,
    finish,
    load_columns,
    load_rows,
    opaque,
    product,
    zeros,
)
from crescendo.pallas_kernels.hopper.ring import Slots


@dataclasses.dataclass(frozen=True)
class KeyGradients(OverQueries):
    """The kernel; its extra memory is for gradients of scores on their way out, where they are kept.

    The log-sum-exp that it reads is in base 2, and inf where a row takes no part.

    Attributes:
      wanted: the gradients to make, in this order.
      parts: where the gradients of the scores are kept; None: they aren't.
    """

    wanted: tuple[str, ...] = ("dk", "dv")
    parts: Parts | None = None

    @property
    def behind(self) -> bool:
        return self.tile.behind and "dk" in self.wanted

    @property
    def units(self) -> int:
        return self.parts.units if self.parts else super().units

    def extra(self) -> Any:
        kept = (self.tile.consumers, self.tile.block // ROWS, ROWS, ROWS)
        return tiled(kept, self.dtype) if self.parts else None

    def gradients(self, operands: Operands, **rows) -> tuple[jax.Array, ...]:
        """Those that are wanted; `rows` are `dout`, `lse` and `delta` of `Arrays`."""
        out = jax.ShapeDtypeStruct(self.operands.k.shape, self.dtype)
        return tuple(self.run(compute, self.arrays(operands, **rows), (out,) * len(self.wanted)))


class _Carry(NamedTuple):
    """From step to step: the gradients, and the last step's gradients of scores where their product comes behind."""

    dk: Any
    dv: Any
    old: Any


def compute(call: KeyGradients, refs: Refs, consumer, at: Place, step):
    """A consumer's 64 keys of a tile."""
    (lo, full_lo, full_hi, hi), shape = at.blocks, (ROWS, call.width)
    rows = pl.ds(at.start + consumer * ROWS, ROWS)
    k_ids = refs.arrays.k_ids.each(lambda array: load_rows(array.at[at.row, rows]))
    refs.own.wait(consumer)
    block = functools.partial(_one_block, call, refs, consumer, at, k_ids, step)
    carry = _Carry(
        zeros(shape) if "dk" in call.wanted else None,
        zeros(shape) if "dv" in call.wanted else None,
        zeros((ROWS, call.tile.block)).astype(call.dtype) if call.behind else None,
    )
    # Where a tile ends with blocks that see all of it, these have a loop without a branch.
    partly = jnp.where(full_hi >= hi, jnp.minimum(full_lo, hi), hi) if call.edges else lo

    def one_head(group, carry):
        if call.edges:
            carry = lax.fori_loop(lo, partly, functools.partial(block, group, True), carry)
        return lax.fori_loop(partly, hi, functools.partial(block, group, False), carry)

    carry = one_head(0, carry) if call.groups == 1 else lax.fori_loop(0, call.groups, one_head, carry)
    steps = call.groups * (hi - lo)
    dk = carry.dk
    if call.behind:
        dk = last_product(dk, carry.old, refs.first, "q", step + steps - 1, steps > 0)
    # Results leave from where the tile's own keys and values were.
    leaving = {"dk": ("k", None if dk is None else dk * call.config.scale), "dv": ("v", carry.dv)}
    for name in call.wanted:
        part, value = leaving[name]
        refs.own[part].at[consumer][...] = value.astype(call.dtype)
    plgpu.commit_smem()
    for name, result in zip(call.wanted, refs.results, strict=False):
        plgpu.copy_smem_to_gmem(refs.own[leaving[name][0]].at[consumer], result.at[at.row, rows, at.head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.own.free(consumer)
    return step + steps


def last_product(gradient, dscores, ring: Slots, part: str, step, any_step):
    """`gradient` with the product that is left after a tile's last step, where it had any; its slot is free then."""

    def add():
        slot = ring.slot(step)

        def run(acc):
            begin(acc, gradient)
            product(acc, dscores, ring[part].at[slot])
            return finish(acc)

        total = pl.run_scoped(run, plgpu.ACC(gradient.shape, jnp.float32))
        ring.free(slot)
        return total

    return lax.cond(any_step, add, lambda: gradient)


def _one_block(
    call: KeyGradients, refs: Refs, consumer, at: Place, k_ids: Ids, step, group, edge: bool, q_block, carry
):
    """The carry after a block of queries of a head; `edge`: whether it may be seen in part."""
    config, tile, wanted, behind = call.config, call.tile, call.wanted, call.behind
    queries, douts, (lo, full_lo, full_hi, hi) = refs.first, refs.second, at.blocks
    shape, dtype, want_dk, want_dv = (ROWS, tile.block), call.dtype, "dk" in wanted, "dv" in wanted
    at_step = step + group * (hi - lo) + (q_block - lo)
    own, slot = opaque(consumer), queries.slot(at_step)
    begun = at_step > step
    last = jnp.where(begun, queries.slot(at_step + tile.stages - 1), slot)
    queries.wait(slot)

    def masked(scores):
        q_ids = refs.arrays.q_ids.of(queries, slot).each(load_columns)
        first_key = at.start + consumer * ROWS
        return masks.hide(
            scores, config, q_ids, k_ids, q_block * tile.block, first_key, transposed=True, keys=(None, call.ragged)
        )

    def products(scores_acc, dp_acc, dk_acc, dv_acc):
        dk, dv, old = carry
        product(scores_acc, refs.own["k"].at[own], queries["q"].at[slot].transpose((1, 0)))
        douts.wait(slot)
        if want_dk:
            product(dp_acc, refs.own["v"].at[own], douts["dout"].at[slot].transpose((1, 0)))
            begin(dk_acc, dk)
            if behind:
                product(dk_acc, old, queries["q"].at[last])
        scores = finish(scores_acc, in_flight=int(want_dk) + int(behind))
        lse = load_columns(queries["lse"].at[slot])
        partly = (q_block < full_lo) | (q_block >= full_hi) if edge else None
        p, slope = masks.weights_again(config, scores, along_columns(lse, shape), masked, partly)
        ds: Any = None
        if behind:
            dk = finish(dk_acc)
            pl.when(begun)(lambda: queries.free(last))
        if want_dv:
            begin(dv_acc, dv)
            product(dv_acc, p.astype(dtype), douts["dout"].at[slot])
        if want_dk:
            dp = finish(dp_acc, in_flight=int(want_dv))
            delta = load_columns(douts["delta"].at[slot])
            ds = p * (dp - along_columns(delta, shape))
            ds = (ds if slope is None else ds * slope).astype(dtype)
            if not behind:
                product(dk_acc, ds, queries["q"].at[slot])
        if call.parts:
            _keep(refs, consumer, ds)
        if want_dv:
            dv = finish(dv_acc, in_flight=int(want_dk and not behind))
        plgpu.commit_smem()  # what was read above comes before the copies that overwrite it
        if call.parts:
            _write(call, refs, consumer, at, group, q_block)
        douts.free(slot)
        if behind:
            return _Carry(dk, dv, ds)
        if want_dk:
            dk = finish(dk_acc)
        queries.free(slot)
        return _Carry(dk, dv, None)

    score, gradient = plgpu.ACC(shape, jnp.float32), plgpu.ACC((ROWS, call.width), jnp.float32)
    return pl.run_scoped(
        products, score, score if want_dk else None, gradient if want_dk else None, gradient if want_dv else None
    )


def _keep(refs: Refs, consumer, ds) -> None:
    """Gradients of scores to shared memory, in squares of 64."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the block before has left the buffer
    for i in range(ds.shape[1] // ROWS):
        refs.extra.at[consumer, i][...] = ds[:, i * ROWS : (i + 1) * ROWS]


def _write(call: KeyGradients, refs: Refs, consumer, at: Place, group, q_block) -> None:
    """And from there to their places in the store."""
    squares = call.tile.block // ROWS
    assert call.parts is not None
    for i in range(squares):
        place = call.parts.store.place(at.unit * call.groups + group, at.tile, q_block * squares + i)
        plgpu.copy_smem_to_gmem(refs.extra.at[consumer, i], refs.results[-1].at[*place, consumer])
