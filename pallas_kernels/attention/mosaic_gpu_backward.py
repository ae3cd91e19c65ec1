"""Attention for Hopper GPUs in Pallas' Mosaic GPU dialect: the backward pass, deterministic.

One kernel recomputes the weights from the log-sum-exp. It holds a tile of keys and walks over the queries that see it,
of all the query heads of its group, with the gradients of k and v in registers; its scores are transposed, so that
the weights are the left operand of the next product without passing through memory. Where `mosaic_gpu_scores` serves,
it also writes down the gradients of the scores, and that of q is made from them. Elsewhere another kernel recomputes
the weights once more: it holds a tile of queries and walks over the keys, with the gradient of q in registers. It
comes first, as it has the rows of dout at hand, and leaves each row's dout.out for the other. No two blocks of threads
add to the same place.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention import mosaic_gpu as shared
from crescendo.pallas_kernels.attention import mosaic_gpu_scores as scores_store
from crescendo.pallas_kernels.attention.contract import Config, Operands, dout_out
from crescendo.pallas_kernels.attention.tiles import tuned

ROWS, LOG2_E = shared.ROWS, shared.LOG2_E


@dataclasses.dataclass(frozen=True)
class BackwardTile:
    """How one of the backward kernels is cut up.

    Attributes:
      block: queries (or keys) of a step.
      consumers: warpgroups, each with 64 keys (or queries) of the tile.
      stages: blocks in flight.
      pairs: whether causal tiles are taken in pairs (`Schedule`).
      persistent: whether a block of threads takes several tiles, or pairs.
      behind: whether the product with the gradients of the scores comes a step later, behind the next scores: then it
        has not to be waited for, and a block of the other side is held for two steps.
    """

    block: int
    consumers: int = 2
    stages: int = 2
    pairs: bool = True
    persistent: bool = True
    behind: bool = False

    @property
    def rows(self) -> int:
        return ROWS * self.consumers


def tiles_for(operands: Operands) -> tuple[BackwardTile, BackwardTile]:
    """Of the kernel for k and v, and of the one for q."""
    width = operands.dims[-1]
    if width <= 64:
        # Tiles of packed rows differ in work: the device hands them out as blocks of threads become free.
        tile = BackwardTile(block=128, persistent=operands.q_segments is None)
        return tile, tile
    if width <= 128:
        tile = BackwardTile(block=64, stages=3, persistent=False, behind=True)
        return tile, tile
    tile = BackwardTile(block=64, consumers=1, behind=True)
    return tile, tile


def backward(
    config: Config,
    operands: Operands,
    lse,
    dout,
    delta,
    out=None,
    tiles: tuple[BackwardTile, BackwardTile | scores_store.ScoresTile] | None = None,
):
    """The gradients of q, k and v (and None for the bias, which these kernels don't take).

    `tiles` are of the kernel for k and v and of that for q: where the latter is a `ScoresTile`, it takes the gradients
    of the scores from the former.
    """
    keys_tile, queries_tile = tiles or _tiles(config, operands)
    if isinstance(queries_tile, scores_store.ScoresTile):
        parts = scores_store.parts_for(config, operands, keys_tile)
        assert parts is not None, "such a tile is for calls that keep the gradients of their scores"
        return *_from_scores(config, operands, lse, dout, delta, out, keys_tile, queries_tile, parts), None
    return *_in_two_passes(config, operands, lse, dout, delta, out, keys_tile, queries_tile), None


def _tiles(config: Config, operands: Operands) -> tuple[BackwardTile, BackwardTile | scores_store.ScoresTile]:
    """The measured tiles, of the kernel for k and v and of that for q."""
    of_keys, of_queries = tiles_for(operands)
    keys_tile = tuned("gradients of k and v", config, operands, of_keys)
    parts = scores_store.parts_for(config, operands, keys_tile)
    if parts is None:
        return keys_tile, tuned("gradient of q", config, operands, of_queries)
    return keys_tile, tuned(
        "gradient of q from scores", config, operands, scores_store.tile_for(config, operands, parts)
    )


class _Part(NamedTuple):
    """A part of a call that keeps the gradients of its scores.

    Attributes:
      units, store: how many there are (`mosaic_gpu_scores.Parts`), and where the gradients lie.
      first: int32 `[1]`, the first unit, counted over the batch.
      gradients: references to the gradients of k and v of the batch.
    """

    units: int
    store: scores_store.Store
    first: Any
    gradients: tuple


def _in_blocks(operands: Operands, block_q: int, block_k: int):
    """The operands in full blocks, and what brings an array like q there, and one of a number for each query."""
    length = operands.q.shape[1]
    blocked = shared.padded(operands, block_q, block_k)
    more = [(0, 0), (0, 0), (0, blocked.q.shape[1] - length)]

    def like_q(array):
        return None if array is None else shared.padded(operands._replace(q=array), block_q, block_k).q

    def of_queries(numbers, value):
        return None if numbers is None else jnp.pad(numbers[..., :length], more, constant_values=value)

    return blocked, like_q, of_queries


def _from_scores(config, operands: Operands, lse, dout, delta, out, keys_tile, queries_tile, parts: scores_store.Parts):
    """Part after part: the kernel for k and v leaves the gradients of the scores, from which that of q is made."""
    _, length, keys, heads, kv_heads, width = operands.dims
    if out is not None:
        delta = dout_out(dout, out) if delta is None else delta + dout_out(dout, out)
    paired = shared.in_pairs(config, keys_tile, keys, keys_tile.rows)
    queries_paired = shared.in_pairs(config, queries_tile, length, queries_tile.rows)
    block_q = math.lcm(keys_tile.block, queries_tile.rows * (2 if queries_paired else 1))
    blocked, like_q, of_queries = _in_blocks(operands, block_q, keys_tile.rows * (2 if paired else 1))
    # exp(score - inf) = 0: rows that see nothing, and rows of padding, take no part.
    lse = jnp.where(lse > -jnp.inf, lse * LOG2_E, jnp.inf)
    rows = like_q(dout), of_queries(lse, jnp.inf), of_queries(delta, 0)

    def every_part(gradients):
        dq, dk, dv = gradients

        def one_part(index, _):
            first = jnp.full((1,), index * parts.units, jnp.int32)
            part = _Part(parts.units, parts.store, first, (dk, dv))
            scores = _keys_kernel(config, blocked, (length, keys), keys_tile, paired, ("dk", "dv"), None, *rows, part)
            first = first * (heads // kv_heads)
            scores_store.gradient_of_q(config, blocked.k, scores, first, dq, parts.store, queries_tile, queries_paired)

        lax.fori_loop(0, parts.count, one_part, None)

    dq, dk, dv = pl.run_state(every_part)(tuple(lax.empty(array.shape, array.dtype) for array in blocked[:3]))
    return dq[:, :length, :, :width], dk[:, :keys, :, :width], dv[:, :keys, :, :width]


def _in_two_passes(config, operands: Operands, lse, dout, delta, out, keys_tile, queries_tile):
    """The kernel for q and then that for k and v, each with weights of its own."""
    _, length, keys, _, _, width = operands.dims
    paired = shared.in_pairs(config, queries_tile, length, queries_tile.rows)
    blocked, like_q, of_queries = _in_blocks(operands, queries_tile.rows * (2 if paired else 1), queries_tile.block)
    tiles_q = blocked.q.shape[1] // queries_tile.rows
    ranges = shared.stacked_ranges(config, operands, "q", queries_tile.rows, queries_tile.block, tiles_q)
    given = like_q(dout), like_q(out), of_queries(lse, -jnp.inf), of_queries(delta, 0)
    dq, lse, delta = _queries_kernel(config, blocked, (length, keys), queries_tile, paired, ranges, *given)

    # Wide heads leave registers for one gradient at a time.
    paired = shared.in_pairs(config, keys_tile, keys, keys_tile.rows)
    blocked, like_q, of_queries = _in_blocks(operands, keys_tile.block, keys_tile.rows * (2 if paired else 1))
    tiles_k = blocked.k.shape[1] // keys_tile.rows
    ranges = shared.stacked_ranges(config, operands, "k", keys_tile.block, keys_tile.rows, tiles_k)
    rows = like_q(dout), of_queries(lse, jnp.inf), of_queries(delta, 0)
    gradients: dict[str, jax.Array] = {}
    for wanted in (("dk",), ("dv",)) if width > 128 else (("dk", "dv"),):
        results = _keys_kernel(config, blocked, (length, keys), keys_tile, paired, wanted, ranges, *rows)
        gradients.update(zip(wanted, results, strict=True))
    dk, dv = (gradients[name][:, :keys, :, :width] for name in ("dk", "dv"))
    return dq[:, :length, :, :width], dk, dv


def _zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _split(operands: Operands):
    """The metadata that are there, of queries and of keys."""
    return [[a for a in operands.metadata[side::2] if a is not None] for side in (0, 1)]


def _last_product(gradient, dscores, blocks, free, step, any_step):
    """`gradient` with the product that is left after a tile's last step, where it had any; its block is free then."""

    def add():
        slot = lax.rem(step, blocks.shape[0])

        def product(acc):
            shared.begin(acc, gradient)
            shared.product(acc, dscores, blocks.at[slot])
            return shared.finish(acc)

        total = pl.run_scoped(product, plgpu.ACC(gradient.shape, jnp.float32))
        plgpu.barrier_arrive(free.at[slot])
        return total

    return lax.cond(any_step, add, lambda: gradient)


def _launch(body, tile: BackwardTile, blocks: int, out_type, scratch):
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=tile.consumers + 1,
        thread_name="wg",
    )


def _keys_kernel(
    config,
    operands: Operands,
    lengths,
    tile: BackwardTile,
    paired,
    wanted,
    ranges,
    dout,
    lse,
    delta,
    part: _Part | None = None,
):
    """The gradients named in `wanted`, of k and v, from the rows' log-sum-exp in base 2 and dout.out.

    Of a part, they are written to its references, and what comes back is the gradients of the scores.
    """
    batch, _, padded_keys, heads, kv_heads, width = operands.dims
    groups, dtype = heads // kv_heads, operands.q.dtype
    units, blocks = part.units if part else batch * kv_heads, tile.block // ROWS
    taken = shared.schedule(tile, padded_keys // tile.rows, units, paired)
    q_meta, k_meta = _split(operands)
    want_dk, want_dv = "dk" in wanted, "dv" in wanted
    behind = tile.behind and want_dk
    shape = (ROWS, tile.block)
    ragged = lengths[1] if lengths[1] % tile.rows else None
    edges = bool(config.masks or q_meta or ragged)

    def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, ranges_ref, first_ref, *rest):
        q_metas, rest = rest[: len(q_meta)], rest[len(q_meta) :]
        k_metas, rest = rest[: len(k_meta)], rest[len(k_meta) :]
        out_refs, rest = rest[: len(wanted)], rest[len(wanted) :]
        scores_ref: Any = rest[0] if part else None
        scratch = rest[1:] if part else rest
        k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, meta_smem, scores_smem, *barriers = scratch
        own_full, own_free, q_full, q_free, dout_full, dout_free = barriers
        block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
        rounds = taken.count(block)
        range_of = shared.reader(config, "k", lengths, tile.block, tile.rows, ranges_ref)

        def place(n):
            unit, tile_k = taken.tile(block, n)
            unit_of_batch = unit if first_ref is None else first_ref[0] + unit
            kv_head, row = lax.rem(unit_of_batch, kv_heads), lax.div(unit_of_batch, kv_heads)
            return unit, row, kv_head, tile_k, range_of(row, tile_k)

        @pl.when(warpgroup == tile.consumers)
        def _producer():
            plgpu.set_max_registers(shared.REGISTERS[tile.consumers][0], action="decrease")

            def one_tile(n, step):
                _, row, kv_head, tile_k, (lo, _, _, hi) = place(n)
                for wg in range(tile.consumers):

                    @pl.when(n > 0)
                    def _():
                        plgpu.barrier_wait(own_free.at[wg])  # noqa: B023

                    rows = pl.ds(tile_k * tile.rows + wg * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(k_ref.at[row, rows, kv_head], k_smem.at[wg], own_full.at[wg])
                    plgpu.copy_gmem_to_smem(v_ref.at[row, rows, kv_head], v_smem.at[wg], own_full.at[wg])

                def one_block(i, step):
                    slot = lax.rem(step, tile.stages)
                    head = kv_head * groups + lax.div(i, hi - lo)
                    columns = pl.ds((lo + lax.rem(i, hi - lo)) * tile.block, tile.block)
                    pl.when(step >= tile.stages)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                    plgpu.copy_gmem_to_smem(q_ref.at[row, columns, head], q_smem.at[slot], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(lse_ref.at[row, head, columns], lse_smem.at[slot], q_full.at[slot])
                    for j, meta in enumerate(q_metas):
                        plgpu.copy_gmem_to_smem(meta.at[row, columns], meta_smem.at[j, slot], q_full.at[slot])
                    pl.when(step >= tile.stages)(lambda: plgpu.barrier_wait(dout_free.at[slot]))
                    plgpu.copy_gmem_to_smem(dout_ref.at[row, columns, head], dout_smem.at[slot], dout_full.at[slot])
                    plgpu.copy_gmem_to_smem(delta_ref.at[row, head, columns], delta_smem.at[slot], dout_full.at[slot])
                    return step + 1

                return lax.fori_loop(0, groups * (hi - lo), one_block, step)

            steps = lax.fori_loop(0, rounds, one_tile, jnp.int32(0))

            @pl.loop(jnp.maximum(steps - tile.stages, 0), steps)
            def _(step):
                plgpu.barrier_wait(q_free.at[lax.rem(step, tile.stages)])
                plgpu.barrier_wait(dout_free.at[lax.rem(step, tile.stages)])

            for wg in range(tile.consumers):
                plgpu.barrier_wait(own_free.at[wg])

        @pl.when(warpgroup < tile.consumers)
        def _consumer():
            plgpu.set_max_registers(shared.REGISTERS[tile.consumers][1], action="increase")
            wg = warpgroup

            def one_tile(n, step):
                unit, row, kv_head, tile_k, (lo, full_lo, full_hi, hi) = place(n)
                first_row = tile_k * tile.rows + wg * ROWS
                rows = pl.ds(first_row, ROWS)
                k_info = [plgpu.load(meta.at[row, rows], layout=shared.ROW_LAYOUT, optimized=False) for meta in k_metas]
                plgpu.barrier_wait(own_full.at[wg])

                def one_block(group, edge, q_block, carry):
                    dk, dv, old = carry
                    at = step + group * (hi - lo) + (q_block - lo)
                    own, slot = shared.opaque(wg), lax.rem(at, tile.stages)
                    begun = at > step
                    last = jnp.where(begun, lax.rem(at + tile.stages - 1, tile.stages), slot)
                    plgpu.barrier_wait(q_full.at[slot])

                    def masked(scores):
                        q_info = [
                            plgpu.load(meta_smem.at[j, slot], layout=shared.COLUMN_LAYOUT, optimized=False)
                            for j in range(len(q_metas))
                        ]
                        return shared.hide(
                            scores,
                            config,
                            shared.unpack(operands, q_info),
                            shared.unpack(operands, k_info),
                            q_block * tile.block,
                            first_row,
                            transposed=True,
                            keys=ragged,
                        )

                    def products(scores_acc, dweights_acc, dk_acc, dv_acc):
                        shared.product(scores_acc, k_smem.at[own], q_smem.at[slot].transpose((1, 0)))
                        plgpu.barrier_wait(dout_full.at[slot])
                        if want_dk:
                            shared.product(dweights_acc, v_smem.at[own], dout_smem.at[slot].transpose((1, 0)))
                            shared.begin(dk_acc, dk)
                            if behind:
                                shared.product(dk_acc, old, q_smem.at[last])
                        scores = shared.finish(scores_acc, in_flight=int(want_dk) + int(behind))
                        lse = plgpu.load(lse_smem.at[slot], layout=shared.COLUMN_LAYOUT, optimized=False)
                        partly = (q_block < full_lo) | (q_block >= full_hi) if edge else None
                        weights, slope = shared.weights(
                            config, scores, shared.along_columns(lse, shape), masked, partly
                        )
                        new_dk, new_dv = dk, dv
                        dscores: Any = None
                        if behind:
                            new_dk = shared.finish(dk_acc)
                            pl.when(begun)(lambda: plgpu.barrier_arrive(q_free.at[last]))
                        if want_dv:
                            shared.begin(dv_acc, dv)
                            shared.product(dv_acc, weights.astype(dtype), dout_smem.at[slot])
                        if want_dk:
                            dweights = shared.finish(dweights_acc, in_flight=int(want_dv))
                            delta = plgpu.load(delta_smem.at[slot], layout=shared.COLUMN_LAYOUT, optimized=False)
                            dscores = weights * (dweights - shared.along_columns(delta, shape))
                            dscores = (dscores if slope is None else dscores * slope).astype(dtype)
                            if not behind:
                                shared.product(dk_acc, dscores, q_smem.at[slot])
                        if part:
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the block before has left the buffer
                            for i in range(blocks):
                                scores_smem.at[wg, i][...] = dscores[:, i * ROWS : (i + 1) * ROWS]
                        if want_dv:
                            new_dv = shared.finish(dv_acc, in_flight=int(want_dk and not behind))
                        plgpu.commit_smem()  # what was read above comes before the copies that overwrite it
                        if part:
                            for i in range(blocks):
                                at = part.store.place(unit * groups + group, tile_k, q_block * blocks + i)
                                plgpu.copy_smem_to_gmem(scores_smem.at[wg, i], scores_ref.at[*at, wg])
                        plgpu.barrier_arrive(dout_free.at[slot])
                        if behind:
                            return new_dk, new_dv, dscores
                        if want_dk:
                            new_dk = shared.finish(dk_acc)
                        plgpu.barrier_arrive(q_free.at[slot])
                        return new_dk, new_dv, None

                    return pl.run_scoped(
                        products,
                        plgpu.ACC(shape, jnp.float32),
                        plgpu.ACC(shape, jnp.float32) if want_dk else None,
                        gradient if want_dk else None,
                        gradient if want_dv else None,
                    )

                gradient = plgpu.ACC((ROWS, width), jnp.float32)
                start = (
                    _zeros((ROWS, width)) if want_dk else None,
                    _zeros((ROWS, width)) if want_dv else None,
                    _zeros(shape).astype(dtype) if behind else None,
                )
                # Where a tile ends with blocks that see all of it, these have a loop without a branch.
                partly = jnp.where(full_hi >= hi, jnp.minimum(full_lo, hi), hi) if edges else lo

                def one_head(group, carry):
                    if edges:
                        carry = lax.fori_loop(lo, partly, functools.partial(one_block, group, True), carry)
                    return lax.fori_loop(partly, hi, functools.partial(one_block, group, False), carry)

                dk, dv, old = one_head(0, start) if groups == 1 else lax.fori_loop(0, groups, one_head, start)
                steps = groups * (hi - lo)

                if behind:
                    dk = _last_product(dk, old, q_smem, q_free, step + steps - 1, steps > 0)
                results = {"dk": (k_smem, None if dk is None else dk * config.scale), "dv": (v_smem, dv)}
                for name in wanted:
                    buffer, value = results[name]
                    buffer.at[wg][...] = value.astype(dtype)
                plgpu.commit_smem()
                for name, out_ref in zip(wanted, out_refs, strict=True):
                    plgpu.copy_smem_to_gmem(results[name][0].at[wg], out_ref.at[row, rows, kv_head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(own_free.at[wg])
                return step + steps

            lax.fori_loop(0, rounds, one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    own, passing = (tile.consumers, ROWS, width), (tile.stages, tile.block, width)
    scratch = (
        shared.tiled(own, dtype),
        shared.tiled(own, dtype),
        shared.tiled(passing, dtype),
        shared.tiled(passing, dtype),
        plgpu.SMEM((tile.stages, tile.block), jnp.float32),
        plgpu.SMEM((tile.stages, tile.block), jnp.float32),
        plgpu.SMEM((len(q_meta), tile.stages, tile.block), jnp.int32) if q_meta else None,
        shared.tiled((tile.consumers, blocks, ROWS, ROWS), dtype) if part else None,
        plgpu.Barrier(num_barriers=tile.consumers, num_arrivals=2),
        plgpu.Barrier(num_barriers=tile.consumers),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=2 + len(q_meta)),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=tile.consumers),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=2),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=tile.consumers),
    )
    out_type: Any = tuple(jax.ShapeDtypeStruct(operands.k.shape, dtype) for _ in wanted)
    if part:
        out_type = jax.ShapeDtypeStruct(part.store.shape, dtype)
    kernel = _launch(body, tile, taken.blocks, out_type, scratch)
    first, gradients = (part.first, part.gradients) if part else (None, ())
    return kernel(*operands[:3], dout, lse, delta, ranges, first, *q_meta, *k_meta, *gradients)


def _queries_kernel(config, operands: Operands, lengths, tile: BackwardTile, paired, ranges, dout, out, lse, delta):
    """The gradient of q, and of each row what it takes: the log-sum-exp in base 2, and delta with dout.out.

    `out` may be None, if `delta` has it, and `delta` for 0.
    """
    batch, length, _, heads, kv_heads, width = operands.dims
    groups, dtype = heads // kv_heads, operands.q.dtype
    taken = shared.schedule(tile, length // tile.rows, batch * heads, paired)
    q_meta, k_meta = _split(operands)
    shape = (ROWS, tile.block)
    ragged = lengths[1] if lengths[1] % tile.block else None
    edges = bool(config.masks or q_meta or ragged)

    def body(q_ref, k_ref, v_ref, dout_ref, out_ref, lse_ref, delta_ref, ranges_ref, *rest):
        q_metas, rest = rest[: len(q_meta)], rest[len(q_meta) :]
        k_metas, rest = rest[: len(k_meta)], rest[len(k_meta) :]
        dq_ref, *row_refs = rest[:3]
        q_smem, dout_smem, k_smem, v_smem, row_smem, meta_smem, *barriers = rest[3:]
        own_full, own_free, k_full, k_free, v_full, v_free = barriers
        block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
        rounds = taken.count(block)
        range_of = shared.reader(config, "q", lengths, tile.rows, tile.block, ranges_ref)

        def place(n):
            head, tile_q = taken.tile(block, n)
            tile_q = taken.tiles - 1 - tile_q
            head, row = lax.rem(head, heads), lax.div(head, heads)
            return row, head, tile_q, range_of(row, tile_q)

        @pl.when(warpgroup == tile.consumers)
        def _producer():
            plgpu.set_max_registers(shared.REGISTERS[tile.consumers][0], action="decrease")

            def one_tile(n, step):
                row, head, tile_q, (lo, _, _, hi) = place(n)
                kv_head = lax.div(head, groups)
                for wg in range(tile.consumers):

                    @pl.when(n > 0)
                    def _():
                        plgpu.barrier_wait(own_free.at[wg])  # noqa: B023

                    rows = pl.ds(tile_q * tile.rows + wg * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_smem.at[wg], own_full.at[wg])
                    plgpu.copy_gmem_to_smem(dout_ref.at[row, rows, head], dout_smem.at[wg], own_full.at[wg])

                def one_block(j, step):
                    slot = lax.rem(step, tile.stages)
                    columns = pl.ds(j * tile.block, tile.block)
                    pl.when(step >= tile.stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_ref.at[row, columns, kv_head], k_smem.at[slot], k_full.at[slot])
                    for i, meta in enumerate(k_metas):
                        plgpu.copy_gmem_to_smem(meta.at[row, columns], meta_smem.at[i, slot], k_full.at[slot])
                    pl.when(step >= tile.stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(v_ref.at[row, columns, kv_head], v_smem.at[slot], v_full.at[slot])
                    return step + 1

                return lax.fori_loop(lo, hi, one_block, step)

            steps = lax.fori_loop(0, rounds, one_tile, jnp.int32(0))

            @pl.loop(jnp.maximum(steps - tile.stages, 0), steps)
            def _(step):
                plgpu.barrier_wait(k_free.at[lax.rem(step, tile.stages)])
                plgpu.barrier_wait(v_free.at[lax.rem(step, tile.stages)])

            for wg in range(tile.consumers):
                plgpu.barrier_wait(own_free.at[wg])

        @pl.when(warpgroup < tile.consumers)
        def _consumer():
            plgpu.set_max_registers(shared.REGISTERS[tile.consumers][1], action="increase")
            wg = warpgroup

            def one_tile(n, step):
                row, head, tile_q, (lo, full_lo, full_hi, hi) = place(n)
                first_row = tile_q * tile.rows + wg * ROWS
                rows = pl.ds(first_row, ROWS)

                def load_rows(ref):
                    return plgpu.load(ref, layout=shared.ROW_LAYOUT, optimized=False)

                q_info = [load_rows(meta.at[row, rows]) for meta in q_metas]
                lse = load_rows(lse_ref.at[row, head, rows])
                # exp(score - inf) = 0: rows that see nothing, and rows of padding, take no part.
                lse = jnp.where(lse > -jnp.inf, lse * LOG2_E, jnp.inf)
                delta = shared.row_vector(0.0) if delta_ref is None else load_rows(delta_ref.at[row, head, rows])
                if out_ref is None:
                    plgpu.barrier_wait(own_full.at[wg])
                else:
                    mixed = plgpu.load(out_ref.at[row, rows, head], layout=plgpu.Layout.WGMMA, optimized=False)
                    plgpu.barrier_wait(own_full.at[wg])
                    dmixed = plgpu.load(dout_smem.at[wg], layout=plgpu.Layout.WGMMA)
                    delta += (mixed.astype(jnp.float32) * dmixed.astype(jnp.float32)).sum(axis=1)
                for i, (numbers, row_ref) in enumerate(zip((lse, delta), row_refs, strict=True)):
                    row_smem.at[i, wg][...] = numbers
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(row_smem.at[i, wg], row_ref.at[row, head, rows])

                def one_block(edge, j, carry):
                    dq, old = carry
                    at = step + (j - lo)
                    own, slot = shared.opaque(wg), lax.rem(at, tile.stages)
                    last = jnp.where(j > lo, lax.rem(at + tile.stages - 1, tile.stages), slot)
                    plgpu.barrier_wait(k_full.at[slot])

                    def masked(scores):
                        k_info = [
                            plgpu.load(meta_smem.at[i, slot], layout=shared.COLUMN_LAYOUT, optimized=False)
                            for i in range(len(k_metas))
                        ]
                        scores = shared.hide(
                            scores,
                            config,
                            shared.unpack(operands, q_info),
                            shared.unpack(operands, k_info),
                            first_row,
                            j * tile.block,
                            keys=ragged,
                        )
                        if k_info:
                            plgpu.commit_smem()  # these reads come before the copy that overwrites the slot
                        return scores

                    def products(scores_acc, dweights_acc, dq_acc):
                        shared.product(scores_acc, q_smem.at[own], k_smem.at[slot].transpose((1, 0)))
                        plgpu.barrier_wait(v_full.at[slot])
                        shared.product(dweights_acc, dout_smem.at[own], v_smem.at[slot].transpose((1, 0)))
                        shared.begin(dq_acc, dq)
                        if tile.behind:
                            shared.product(dq_acc, old, k_smem.at[last])
                        scores = shared.finish(scores_acc, in_flight=1 + int(tile.behind))
                        partly = (j < full_lo) | (j >= full_hi) if edge else None
                        weights, slope = shared.weights(config, scores, shared.along_rows(lse, shape), masked, partly)
                        if tile.behind:
                            new_dq = shared.finish(dq_acc)
                            pl.when(j > lo)(lambda: plgpu.barrier_arrive(k_free.at[last]))
                        dweights = shared.finish(dweights_acc)
                        plgpu.barrier_arrive(v_free.at[slot])
                        dscores = weights * (dweights - shared.along_rows(delta, shape))
                        dscores = (dscores if slope is None else dscores * slope).astype(dtype)
                        if tile.behind:
                            return new_dq, dscores
                        shared.product(dq_acc, dscores, k_smem.at[slot])
                        new_dq = shared.finish(dq_acc)
                        plgpu.barrier_arrive(k_free.at[slot])
                        return new_dq, None

                    return pl.run_scoped(
                        products, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32), gradient
                    )

                gradient = plgpu.ACC((ROWS, width), jnp.float32)
                unmasked_end = jnp.where(full_lo <= lo, full_hi, lo) if edges else hi
                start = _zeros((ROWS, width)), _zeros(shape).astype(dtype) if tile.behind else None
                carry = lax.fori_loop(lo, unmasked_end, functools.partial(one_block, False), start)
                if edges:
                    carry = lax.fori_loop(unmasked_end, hi, functools.partial(one_block, True), carry)
                dq, old = carry

                if tile.behind:
                    dq = _last_product(dq, old, k_smem, k_free, step + (hi - lo) - 1, hi > lo)
                q_smem.at[wg][...] = (dq * config.scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_ref.at[row, rows, head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(own_free.at[wg])
                return step + (hi - lo)

            lax.fori_loop(0, rounds, one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    own, passing = (tile.consumers, ROWS, width), (tile.stages, tile.block, width)
    scratch = (
        shared.tiled(own, dtype),
        shared.tiled(own, dtype),
        shared.tiled(passing, dtype),
        shared.tiled(passing, dtype),
        plgpu.SMEM((2, tile.consumers, ROWS), jnp.float32),
        plgpu.SMEM((len(k_meta), tile.stages, tile.block), jnp.int32) if k_meta else None,
        plgpu.Barrier(num_barriers=tile.consumers, num_arrivals=2),
        plgpu.Barrier(num_barriers=tile.consumers),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=1 + len(k_meta)),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=tile.consumers),
        plgpu.Barrier(num_barriers=tile.stages),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=tile.consumers),
    )
    numbers = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    out_type = jax.ShapeDtypeStruct(operands.q.shape, dtype), numbers, numbers
    kernel = _launch(body, tile, taken.blocks, out_type, scratch)
    return kernel(*operands[:3], dout, out, lse, delta, ranges, *q_meta, *k_meta)
