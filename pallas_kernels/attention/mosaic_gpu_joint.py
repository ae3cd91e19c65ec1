"""Attention for Hopper GPUs in Pallas' Mosaic GPU dialect: the backward pass in one kernel, for heads up to 128 wide.

A block of threads holds a tile of keys and walks over the queries that see it, of all the query heads of its group.
Each of its consumer warpgroups has 64 of the keys, their scores transposed, and the gradients of its k and v in
registers. It leaves the gradients of the scores in shared memory, where another warpgroup, which also issues the loads,
makes the tile's part of the gradient of q of them and adds it up in memory: five products, not seven.

The parts of a query's gradient are added in a fixed order, that of `_order`: a counter for each block of queries says
whose turn it is, so that the result has the same bits every time. Tiles are started in an order in which a tile waits
for earlier ones only, or for such as are surely running beside it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention import mosaic_gpu as shared
from crescendo.pallas_kernels.attention.contract import Config, Operands, block_ranges
from crescendo.pallas_kernels.op import target_device

ROWS, LOG2_E = shared.ROWS, shared.LOG2_E
PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)
PART = 64  # columns of the gradient of q that are in registers at a time
# Of a thread of the warpgroup that loads and adds up, and of a consumer: together at most a core's 65,536.
REGISTERS = {1: (80, 240), 2: (24, 240), 3: (56, 152)}


@dataclasses.dataclass(frozen=True)
class FusedTile:
    """How the backward pass is cut up.

    Attributes:
      block_q: queries of a step.
      consumers: warpgroups with 64 keys each.
      stages: blocks of queries in flight.
      tiles: tiles of keys and values in shared memory: with 2 the next one is loaded in advance.
      ordered: whether the gradient of q is added up in a fixed order.
      from_registers: whether the product for k takes the scores' gradients from registers.
    """

    block_q: int = 64
    consumers: int = 2
    stages: int = 2
    tiles: int = 1
    ordered: bool = True
    from_registers: bool = True

    @property
    def block_k(self) -> int:
        return ROWS * self.consumers


def tile_for(operands: Operands) -> FusedTile:
    return FusedTile(stages=3, tiles=2) if operands.dims[-1] <= 64 else FusedTile()


def add_up(piece, there, first):
    """Adds a piece in shared memory to memory, or writes it there where it is the first one."""
    plgpu.copy_smem_to_gmem(piece, there, predicate=first, commit_group=False)
    plgpu.copy_smem_to_gmem(piece, there, predicate=jnp.logical_not(first), commit_group=False, reduction_op="add")


def await_turn(turns, at, turn):
    plgpu.semaphore_wait(turns.at[at], turn, decrement=False, memory_scope="gpu")


def pass_turn(turns, at):
    plgpu.semaphore_signal(turns.at[at], 1, memory_scope="gpu")


def counters(count: int):
    """A counter for each block of queries, 0 at first."""
    return pl.get_global(plgpu.SemaphoreType.REGULAR((count,)))


def rotates(config: Config, operands: Operands) -> bool:
    """Whether every tile of keys sees every query."""
    return not config.masks and operands.q_segments is None


def _order(ranges, tiles_k: int, blocks_q: int, rotated: int):
    """Which turn a tile of keys has at a block of queries: int32 `[B or 1, tiles of keys, blocks of queries]`.

    Later keys go first: under causality they begin at later queries. Where all see all, `rotated` tiles begin evenly
    spaced, and the one that began at a block's queries, or was the last to begin before them, goes first.
    """
    if rotated:
        stride = max(blocks_q // rotated, 1)
        tile, block = jnp.arange(tiles_k)[::-1, None], jnp.arange(blocks_q)[None]
        group, place = tile // rotated, tile % rotated
        size = jnp.minimum(rotated, tiles_k - group * rotated)
        first = jnp.minimum(block // stride, size - 1)
        return (group * rotated + (first - place) % size).astype(jnp.int32)[None]
    lo, hi = ranges[..., 0, None], ranges[..., 3, None]
    block = jnp.arange(blocks_q)
    active = ((block >= lo) & (block < hi)).astype(jnp.float32)
    later = (jnp.arange(tiles_k)[:, None] < jnp.arange(tiles_k)[None]).astype(jnp.float32)
    return jnp.einsum("jk,bki->bji", later, active).astype(jnp.int32)


def backward(config: Config, operands: Operands, lse, dout, delta, tile: FusedTile | None = None):
    """The gradients of q, k and v (and None for the bias, which this kernel doesn't take)."""
    tile = tile or tile_for(operands)
    _, length, keys, _, _, width = operands.dims
    # exp(score - inf) = 0: rows that see nothing, and rows of padding, take no part.
    lse = jnp.where(jnp.isfinite(lse), lse * LOG2_E, jnp.inf)
    # A causal tile of many queries goes with one of few. All pairs of a head run at a time, or they would wait for ever.
    tiles_k, cores = -(-keys // tile.block_k), target_device().cores
    paired = config.causal and 1 < tiles_k <= 2 * cores
    _, ranges = block_ranges(config, operands, tile.block_q, tile.block_k)
    block_k = tile.block_k * (2 if paired else 1)
    whole = shared.padded(operands, tile.block_q, block_k)
    dout = shared.padded(operands._replace(q=dout), tile.block_q, block_k).q
    more = [(0, 0), (0, 0), (0, whole.q.shape[1] - length)]
    lse, delta = jnp.pad(lse, more, constant_values=jnp.inf), jnp.pad(delta.astype(jnp.float32), more)

    tiles_k, blocks_q = whole.k.shape[1] // tile.block_k, whole.q.shape[1] // tile.block_q
    ranges = shared.stacked_ranges(ranges)
    ranges = jnp.pad(ranges, [(0, 0), (0, tiles_k - ranges.shape[1]), (0, 0)])
    lo, full_lo, full_hi, hi = (ranges[..., i] for i in range(4))
    # At least one step for a tile, under the mask.
    lo = jnp.minimum(lo, blocks_q - 1)
    ranges = jnp.stack([lo, full_lo, full_hi, jnp.maximum(hi, lo + 1)], axis=-1)
    rotated = min(tiles_k, cores) if rotates(config, operands) else 0
    order = _order(ranges, tiles_k, blocks_q, rotated)
    dq, dk, dv = _kernel(config, whole, keys, tile, ranges, order, paired, rotated, dout, lse, delta)
    if not rotated:
        seen = jnp.any((jnp.arange(blocks_q) >= ranges[..., 0, None]) & (jnp.arange(blocks_q) < ranges[..., 3, None]), 1)
        dq = jnp.where(jnp.repeat(seen, tile.block_q, axis=1)[:, :, None, None], dq, 0.0)
    dq = (dq * config.scale).astype(operands.q.dtype)
    return dq[:, :length, :, :width], dk[:, :keys, :, :width], dv[:, :keys, :, :width], None


def _kernel(config, operands: Operands, keys, tile: FusedTile, ranges, order, paired, rotated, dout, lse, delta):
    batch, padded_length, padded_keys, heads, kv_heads, width = operands.dims
    groups, dtype = heads // kv_heads, operands.q.dtype
    tiles_k, blocks_q = padded_keys // tile.block_k, padded_length // tile.block_q
    pairing = 2 if paired else 1
    units_k = tiles_k // pairing
    units, cores = batch * kv_heads * units_k, target_device().cores
    # Whole heads at a time: a part of one would wait for the rest.
    blocks = min(units, cores // units_k * units_k or cores)
    q_meta, k_meta = ([a for a in operands.metadata[side::2] if a is not None] for side in (0, 1))
    shape = (ROWS, tile.block_q)
    ragged = keys if keys % (tile.block_k * pairing) else None
    consumers, parts = tile.consumers, width // PART
    stride = max(blocks_q // rotated, 1) if rotated else 0

    def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, ranges_ref, order_ref, *rest):
        q_metas, rest = rest[: len(q_meta)], rest[len(q_meta) :]
        k_metas, rest = rest[: len(k_meta)], rest[len(k_meta) :]
        (dq_ref, dk_ref, dv_ref), scratch = rest[:3], rest[3:]
        k_smem, v_smem, q_smem, dout_smem, ds_smem, dq_smem, lse_smem, delta_smem, meta_smem, *barriers = scratch
        own_full, own_free, q_full, q_free, ds_full, dq_full, dq_free, k_done = barriers
        turns = counters(batch * heads * blocks_q) if tile.ordered else None
        block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
        count = (units - block + blocks - 1) // blocks * pairing

        def place(m):
            """Row, key head, tile of keys (the last ones first) and its range of blocks of queries."""
            index = block + lax.div(m, pairing) * blocks
            at, rest = lax.rem(index, units_k), lax.div(index, units_k)
            if paired:
                at = jnp.where(lax.rem(m, 2) == 0, at, tiles_k - 1 - at)
            kv_head, row = lax.rem(rest, kv_heads), lax.div(rest, kv_heads)
            tile_k = tiles_k - 1 - at
            seen = tuple(ranges_ref[row if ranges.shape[0] > 1 else 0, tile_k, i] for i in range(4))
            return row, kv_head, tile_k, seen

        def block_at(tile_k, lo, i):
            """The block of queries of a step."""
            if not rotated:
                return lo + i
            at = i + lax.rem(tiles_k - 1 - tile_k, rotated) * stride
            return jnp.where(at >= blocks_q, at - blocks_q, at)

        def for_each_group(body, carry):
            return body(0, carry) if groups == 1 else lax.fori_loop(0, groups, body, carry)

        @pl.when(warpgroup == consumers)
        def _loads_and_gradient_of_q():
            plgpu.set_max_registers(REGISTERS[consumers][0], action="decrease")

            def load_own(m):
                row, kv_head, tile_k, _ = place(m)
                slot = lax.rem(m, tile.tiles)
                for wg in range(consumers):
                    rows, full = pl.ds(tile_k * tile.block_k + wg * ROWS, ROWS), own_full.at[slot * consumers + wg]
                    plgpu.copy_gmem_to_smem(k_ref.at[row, rows, kv_head], k_smem.at[slot, wg], full)
                    plgpu.copy_gmem_to_smem(v_ref.at[row, rows, kv_head], v_smem.at[slot, wg], full)

            def load_step(step, m, group, i):
                """Loads step i of a query head of the CTA's tile m, if there is one, and says which comes next."""

                def load():
                    row, kv_head, tile_k, (lo, _, _, hi) = place(m)
                    q_block = block_at(tile_k, lo, i)
                    head, slot = kv_head * groups + group, lax.rem(step, tile.stages)
                    columns = pl.ds(q_block * tile.block_q, tile.block_q)
                    plgpu.copy_gmem_to_smem(q_ref.at[row, columns, head], q_smem.at[slot], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(lse_ref.at[row, head, columns], lse_smem.at[slot], q_full.at[slot])
                    for j, meta in enumerate(q_metas):
                        plgpu.copy_gmem_to_smem(meta.at[row, columns], meta_smem.at[j, slot], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(dout_ref.at[row, columns, head], dout_smem.at[slot], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(delta_ref.at[row, head, columns], delta_smem.at[slot], q_full.at[slot])
                    head_over = i + 1 == hi - lo
                    over = head_over & (group + 1 == groups)
                    group_next = jnp.where(over, 0, jnp.where(head_over, group + 1, group))
                    return jnp.where(over, m + 1, m), group_next, jnp.where(head_over, 0, i + 1)

                return lax.cond(m < count, load, lambda: (m, group, i))

            for m in range(tile.tiles):
                pl.when(m < count)(lambda: load_own(jnp.int32(m)))  # noqa: B023
            ahead = lax.fori_loop(
                0, tile.stages, lambda step, at: load_step(step, *at), (jnp.int32(0),) * 3
            )

            def one_tile(m, carry):
                row, kv_head, tile_k, (lo, _, _, hi) = place(m)
                own = lax.rem(m, tile.tiles)

                def one_step(group, i, carry):
                    step, *ahead = carry
                    q_block = block_at(tile_k, lo, i)
                    head = kv_head * groups + group
                    plgpu.barrier_wait(dq_full)
                    counter = (row * heads + head) * blocks_q + q_block
                    turn = order_ref[row if order.shape[0] > 1 else 0, tile_k, q_block]
                    if tile.ordered:
                        await_turn(turns, counter, turn)
                    rows = pl.ds(q_block * tile.block_q, tile.block_q)
                    for j in range(parts):
                        add_up(dq_smem.at[j], dq_ref.at[row, rows, head, pl.ds(j * PART, PART)], turn == 0)
                    plgpu.commit_smem_to_gmem_group()
                    plgpu.barrier_wait(q_free.at[lax.rem(step, tile.stages)])
                    ahead = load_step(step + tile.stages, *ahead)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=not tile.ordered)
                    plgpu.barrier_arrive(dq_free)
                    if tile.ordered:
                        pass_turn(turns, counter)
                    return step + 1, *ahead

                def one_head(group, carry):
                    return lax.fori_loop(0, hi - lo, lambda i, carry: one_step(group, i, carry), carry)

                carry = for_each_group(one_head, carry)
                plgpu.barrier_wait(own_free.at[own])
                pl.when(m + tile.tiles < count)(lambda: load_own(m + tile.tiles))
                return carry

            lax.fori_loop(0, count, one_tile, (jnp.int32(0), *ahead))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < consumers)
        def _gradients_of_k_and_v():
            plgpu.set_max_registers(REGISTERS[consumers][1], action="increase")
            wg = warpgroup

            def one_tile(m, step):
                row, kv_head, tile_k, (lo, full_lo, full_hi, hi) = place(m)
                own = lax.rem(m, tile.tiles)
                first_row = tile_k * tile.block_k + wg * ROWS
                rows = pl.ds(first_row, ROWS)
                k_info = [plgpu.load(meta.at[row, rows], layout=shared.ROW_LAYOUT, optimized=False) for meta in k_metas]
                for other in range(consumers):
                    plgpu.barrier_wait(own_full.at[own * consumers + other])

                def one_step(i, carry):
                    step, dk, dv = carry
                    slot, at = lax.rem(step, tile.stages), lax.rem(step, 2)
                    q_block = block_at(tile_k, lo, i)
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
                            q_block * tile.block_q,
                            first_row,
                            transposed=True,
                            keys=ragged,
                        )

                    def products(scores_acc, dweights_acc, dk_acc, dv_acc, dq_acc):
                        shared.product(scores_acc, k_smem.at[own, wg], q_smem.at[slot].transpose((1, 0)))
                        shared.product(dweights_acc, v_smem.at[own, wg], dout_smem.at[slot].transpose((1, 0)))
                        scores = shared.finish(scores_acc, in_flight=1)
                        lse = plgpu.load(lse_smem.at[slot], layout=shared.COLUMN_LAYOUT, optimized=False)
                        edge = (q_block < full_lo) | (q_block >= full_hi)
                        weights, slope = _weights(config, scores, shared.along_columns(lse, shape), masked, edge)
                        shared.begin(dv_acc, dv)
                        shared.product(dv_acc, weights.astype(dtype), dout_smem.at[slot])
                        dweights = shared.finish(dweights_acc, in_flight=1)
                        delta = plgpu.load(delta_smem.at[slot], layout=shared.COLUMN_LAYOUT, optimized=False)
                        dscores = weights * (dweights - shared.along_columns(delta, shape))
                        dscores = (dscores if slope is None else dscores * slope).astype(dtype)
                        ds_smem.at[at, wg][...] = dscores
                        plgpu.commit_smem()  # also: what was read above comes before the copies that overwrite it
                        plgpu.barrier_arrive(ds_full.at[at])
                        shared.begin(dk_acc, dk)
                        left = dscores if tile.from_registers else ds_smem.at[at, wg]
                        shared.product(dk_acc, left, q_smem.at[slot])
                        plgpu.barrier_wait(ds_full.at[at])
                        for other in range(consumers):
                            columns = k_smem.at[own, other, :, pl.ds(wg * PART, PART)]
                            shared.product(dq_acc, ds_smem.at[at, other].transpose((1, 0)), columns)
                        new_dv = shared.finish(dv_acc, in_flight=1 + consumers)
                        new_dk = shared.finish(dk_acc, in_flight=consumers)
                        plgpu.barrier_arrive(q_free.at[slot])
                        dq = shared.finish(dq_acc)
                        pl.when(step >= 1)(lambda: plgpu.barrier_wait(dq_free))
                        dq_smem.at[wg][...] = dq
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(dq_full)
                        return new_dk, new_dv

                    gradient, square = plgpu.ACC((ROWS, width), jnp.float32), plgpu.ACC(shape, jnp.float32)
                    part = plgpu.ACC((tile.block_q, PART), jnp.float32)
                    return step + 1, *pl.run_scoped(products, square, square, gradient, gradient, part)

                def one_head(_, carry):
                    return lax.fori_loop(0, hi - lo, one_step, carry)

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
                step, dk, dv = for_each_group(one_head, (step, zeros, zeros))
                plgpu.barrier_arrive(k_done)
                plgpu.barrier_wait(k_done)
                k_smem.at[own, wg][...] = (dk * config.scale).astype(dtype)
                v_smem.at[own, wg][...] = dv.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k_smem.at[own, wg], dk_ref.at[row, rows, kv_head])
                plgpu.copy_smem_to_gmem(v_smem.at[own, wg], dv_ref.at[row, rows, kv_head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(own_free.at[own])
                return step

            lax.fori_loop(0, count, one_tile, jnp.int32(0))
            plgpu.barrier_wait(dq_free)  # nobody leaves before every arrival has been seen
            plgpu.wait_smem_to_gmem(0)

    own, passing = (tile.tiles, consumers, ROWS, width), (tile.stages, tile.block_q, width)
    wide = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    scratch = (
        shared.tiled(own, dtype),
        shared.tiled(own, dtype),
        shared.tiled(passing, dtype),
        shared.tiled(passing, dtype),
        shared.tiled((2, consumers, *shape), dtype),
        plgpu.SMEM((parts, tile.block_q, PART), jnp.float32, transforms=wide),
        plgpu.SMEM((tile.stages, tile.block_q), jnp.float32),
        plgpu.SMEM((tile.stages, tile.block_q), jnp.float32),
        plgpu.SMEM((len(q_meta), tile.stages, tile.block_q), jnp.int32) if q_meta else None,
        plgpu.Barrier(num_barriers=tile.tiles * consumers, num_arrivals=2),  # own_full
        plgpu.Barrier(num_barriers=tile.tiles, num_arrivals=consumers),  # own_free
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=4 + len(q_meta)),  # q_full
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=consumers),  # q_free
        plgpu.Barrier(num_barriers=2, num_arrivals=consumers),  # ds_full
        plgpu.Barrier(num_arrivals=consumers),  # dq_full
        plgpu.Barrier(),  # dq_free
        plgpu.Barrier(num_arrivals=consumers),  # k_done
    )
    out_type = (
        jax.ShapeDtypeStruct(operands.q.shape, jnp.float32),
        jax.ShapeDtypeStruct(operands.k.shape, dtype),
        jax.ShapeDtypeStruct(operands.k.shape, dtype),
    )
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        compiler_params=PARAMS,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="wg",
    )
    return kernel(*operands[:3], dout, lse, delta, ranges, order, *q_meta, *k_meta)


def _weights(config: Config, scores, lse, masked, edge):
    """`P = exp(score - lse)`, and the derivative of the capped score (None without a cap)."""
    slope, factor = None, config.scale * LOG2_E
    if config.soft_cap is not None:
        capped = jnp.tanh(scores * (config.scale / config.soft_cap))
        scores, slope, factor = config.soft_cap * capped, 1 - capped * capped, LOG2_E
    scores = lax.cond(edge, masked, lambda scores: scores, scores)
    return jnp.exp2(scores * factor - lse), slope
