"""Attention for Hopper GPUs in Pallas' Mosaic GPU dialect: causal attention's backward pass in one kernel.

A block of threads holds a tile of keys and walks over the queries that see it.
Each of its consumer warpgroups has 64 of the keys, their scores transposed, and the gradients of its k and v in
registers. It leaves the gradients of the scores in shared memory, where another warpgroup, which also issues the loads,
makes the tile's part of the gradient of q of them and adds it up in memory: five products, not seven.

The parts of a query's gradient are added in a fixed order, `Plan.turns`: a counter for each block of queries says whose
turn it is, so that the result has the same bits every time.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention import mosaic_gpu as shared
from crescendo.pallas_kernels.attention import tiles
from crescendo.pallas_kernels.attention.contract import Config, Operands, block_ranges
from crescendo.pallas_kernels.op import target_device

ROWS, LOG2_E = shared.ROWS, shared.LOG2_E
CONSUMERS = 2
# Of a thread of the warpgroup that loads and adds up, and of a consumer. A block of three warpgroups starts with 168
# for each thread: asking for more than 504 together waits for ever.
REGISTERS = (96, 200)


@dataclasses.dataclass(frozen=True)
class FusedTile:
    """How the backward pass is cut up.

    Attributes:
      block_q: queries of a step.
      stages: blocks of queries in flight.
      tiles: tiles of keys and values in shared memory: with 2 the next one is loaded in advance.
    """

    block_q: int = 64
    stages: int = 3
    tiles: int = 2

    @property
    def block_k(self) -> int:
        return ROWS * CONSUMERS


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which block of threads takes which tiles of keys, and in which order the gradient of q is added up.

    A head's later tiles, which begin at later queries, are taken first, and add to a block of queries first: a tile
    waits for such as were taken before it. Where they fit beside each other, a head's tiles are taken in pairs, one of
    few queries and then one of many; all its pairs run at a time, since a first one may wait for a later pair's.

    Attributes:
      ranges: int32 `[tiles of keys, 4]`, of blocks of queries: lo, full_lo, full_hi, hi.
      turns: int32 `[tiles of keys, blocks of queries]`: which place a tile has in a block's sum.
      taken: which tiles a block of threads takes, counted from the last one.
    """

    ranges: jax.Array
    turns: jax.Array
    taken: shared.Schedule

    def tile(self, block, m):
        """The head, and the tile of its keys, that a block of threads takes as its m-th."""
        head, at = self.taken.tile(block, m)
        return head, self.taken.tiles - 1 - at


def plan(config: Config, operands: Operands, tile: FusedTile, cores: int) -> Plan:
    """The plan of a causal call."""
    batch, length, keys, heads, *_ = operands.dims
    tiles_k, blocks_q = -(-keys // tile.block_k), -(-length // tile.block_q)
    paired = 1 < tiles_k <= 2 * cores
    tiles_k += tiles_k % 2 if paired else 0
    units = tiles_k // (2 if paired else 1)
    # For whole heads, where the cores are enough.
    taken = shared.Schedule(tiles_k, batch * heads, paired, cores // units * units or cores)
    _, of_keys = block_ranges(config, operands, tile.block_q, tile.block_k)
    (ranges,) = shared.stacked_ranges(of_keys, tiles_k)
    # At least one step for a tile, under the mask.
    lo = jnp.minimum(ranges[:, 0], blocks_q - 1)
    hi = jnp.maximum(ranges[:, 3], lo + 1)
    ranges = jnp.stack([lo, ranges[:, 1], ranges[:, 2], hi], axis=-1)
    block, index = jnp.arange(blocks_q), jnp.arange(len(ranges))
    seen = ((block >= lo[:, None]) & (block < hi[:, None])).astype(jnp.float32)
    later = (index[:, None] < index).astype(jnp.float32)
    return Plan(ranges, (later @ seen).astype(jnp.int32), taken)


def serves(config: Config, operands: Operands) -> bool:
    """Whether this kernel is the one to take: where it was measured to be the faster one."""
    _, _, _, heads, kv_heads, width = operands.dims
    return (
        width <= 64
        and heads == kv_heads  # others' tiles wait for each other's next head
        and config.causal
        and config.window is None
        and operands.q_segments is None
        and operands.q_positions is None
    )


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


def backward(config: Config, operands: Operands, lse, dout, delta, tile: FusedTile | None = None):
    """The gradients of q, k and v (and None for the bias, which this kernel doesn't take)."""
    tile = tile or tiles.tuned("backward", config, operands, FusedTile())
    _, length, keys, _, _, width = operands.dims
    # exp(score - inf) = 0: rows that see nothing, and rows of padding, take no part.
    lse = jnp.where(jnp.isfinite(lse), lse * LOG2_E, jnp.inf)
    order = plan(config, operands, tile, target_device().cores)
    block_k = tile.block_k * order.taken.pairing
    whole = shared.padded(operands, tile.block_q, block_k)
    dout = shared.padded(operands._replace(q=dout), tile.block_q, block_k).q
    more = [(0, 0), (0, 0), (0, whole.q.shape[1] - length)]
    lse, delta = jnp.pad(lse, more, constant_values=jnp.inf), jnp.pad(delta.astype(jnp.float32), more)
    dq, dk, dv = _kernel(config, whole, keys, tile, order, dout, lse, delta)
    # Nobody wrote to blocks of queries that no tile sees.
    block = jnp.arange(order.turns.shape[1])
    seen = jnp.any((block >= order.ranges[:, :1]) & (block < order.ranges[:, 3:]), axis=0)
    dq = jnp.where(jnp.repeat(seen, tile.block_q)[:, None, None], dq, 0.0)
    dq = (dq * config.scale).astype(operands.q.dtype)
    return dq[:, :length, :, :width], dk[:, :keys, :, :width], dv[:, :keys, :, :width], None


def _kernel(config, operands: Operands, keys, tile: FusedTile, order: Plan, dout, lse, delta):
    batch, _, _, heads, _, width = operands.dims
    dtype, blocks_q, shape = operands.q.dtype, order.turns.shape[1], (ROWS, tile.block_q)
    taken = order.taken
    # Tiles of nothing but padding are there to make pairs.
    ragged = keys if keys % (tile.block_k * taken.pairing) else None

    def body(
        q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, ranges_ref, turns_ref, dq_ref, dk_ref, dv_ref, *scratch
    ):
        k_smem, v_smem, q_smem, dout_smem, ds_smem, dq_smem, lse_smem, delta_smem, *barriers = scratch
        own_full, own_free, q_full, dout_full, q_free, ds_full, ds_free, k_done = barriers
        counter = counters(batch * heads * blocks_q)
        block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
        count = taken.count(block)

        def place(m):
            """Row, head, tile of keys and its range of blocks of queries."""
            index, tile_k = order.tile(block, m)
            head, row = lax.rem(index, heads), lax.div(index, heads)
            return row, head, tile_k, tuple(ranges_ref[tile_k, i] for i in range(4))

        @pl.when(warpgroup == CONSUMERS)
        def _loads_and_gradient_of_q():
            plgpu.set_max_registers(REGISTERS[0], action="decrease")

            def load_own(m):
                row, head, tile_k, _ = place(m)
                slot = lax.rem(m, tile.tiles)
                for wg in range(CONSUMERS):
                    rows, full = pl.ds(tile_k * tile.block_k + wg * ROWS, ROWS), own_full.at[slot * CONSUMERS + wg]
                    plgpu.copy_gmem_to_smem(k_ref.at[row, rows, head], k_smem.at[slot, wg], full)
                    plgpu.copy_gmem_to_smem(v_ref.at[row, rows, head], v_smem.at[slot, wg], full)

            def load_step(step, m, i):
                """Loads step i of this block's m-th tile, if there is one, and says which comes next."""

                def load():
                    row, head, _, (lo, _, _, hi) = place(m)
                    slot, columns = lax.rem(step, tile.stages), pl.ds((lo + i) * tile.block_q, tile.block_q)
                    plgpu.copy_gmem_to_smem(q_ref.at[row, columns, head], q_smem.at[slot], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(lse_ref.at[row, head, columns], lse_smem.at[slot], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(dout_ref.at[row, columns, head], dout_smem.at[slot], dout_full.at[slot])
                    plgpu.copy_gmem_to_smem(delta_ref.at[row, head, columns], delta_smem.at[slot], dout_full.at[slot])
                    over = i + 1 == hi - lo
                    return jnp.where(over, m + 1, m), jnp.where(over, 0, i + 1)

                return lax.cond(m < count, load, lambda: (m, i))

            for m in range(tile.tiles):
                pl.when(m < count)(lambda: load_own(jnp.int32(m)))  # noqa: B023
            ahead = lax.fori_loop(0, tile.stages, lambda step, at: load_step(step, *at), (jnp.int32(0),) * 2)

            def leave(at):
                """What was added has arrived: the next one's turn."""
                plgpu.wait_smem_to_gmem(0)
                pl.when(at >= 0)(lambda: pass_turn(counter, at))

            def one_tile(m, carry):
                row, head, tile_k, (lo, _, _, hi) = place(m)
                own = lax.rem(m, tile.tiles)
                for wg in range(CONSUMERS):
                    plgpu.barrier_wait(own_full.at[own * CONSUMERS + wg])

                def one_step(q_block, carry):
                    step, *ahead, last = carry
                    at, slot = lax.rem(step, 2), lax.rem(step, tile.stages)
                    plgpu.barrier_wait(ds_full.at[at])

                    def part(acc):
                        for wg in range(CONSUMERS):
                            shared.product(acc, ds_smem.at[at, wg].transpose((1, 0)), k_smem.at[own, wg])
                        return shared.finish(acc)

                    dq = pl.run_scoped(part, plgpu.ACC((tile.block_q, width), jnp.float32))
                    leave(last)
                    dq_smem[...] = dq
                    plgpu.barrier_arrive(ds_free.at[at])
                    pl.when(q_block == hi - 1)(lambda: plgpu.barrier_arrive(k_done))
                    plgpu.commit_smem()
                    plgpu.barrier_wait(q_free.at[slot])
                    ahead = load_step(step + tile.stages, *ahead)
                    here, turn = (row * heads + head) * blocks_q + q_block, turns_ref[tile_k, q_block]
                    await_turn(counter, here, turn)
                    add_up(dq_smem, dq_ref.at[row, pl.ds(q_block * tile.block_q, tile.block_q), head], turn == 0)
                    plgpu.commit_smem_to_gmem_group()
                    return step + 1, *ahead, here

                step, *ahead, last = lax.fori_loop(lo, hi, one_step, (*carry, jnp.int32(-1)))
                leave(last)
                plgpu.barrier_wait(own_free.at[own])
                pl.when(m + tile.tiles < count)(lambda: load_own(m + tile.tiles))
                return step, *ahead

            lax.fori_loop(0, count, one_tile, (jnp.int32(0), *ahead))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < CONSUMERS)
        def _gradients_of_k_and_v():
            plgpu.set_max_registers(REGISTERS[1], action="increase")
            wg = warpgroup

            def one_tile(m, step):
                row, head, tile_k, (lo, full_lo, full_hi, hi) = place(m)
                own = lax.rem(m, tile.tiles)
                first_row = tile_k * tile.block_k + wg * ROWS
                plgpu.barrier_wait(own_full.at[own * CONSUMERS + wg])

                def one_step(q_block, carry):
                    step, dk, dv = carry
                    slot, at = lax.rem(step, tile.stages), lax.rem(step, 2)
                    plgpu.barrier_wait(q_full.at[slot])

                    def masked(scores):
                        nothing, first = (None, None), q_block * tile.block_q
                        return shared.hide(
                            scores, config, nothing, nothing, first, first_row, transposed=True, keys=ragged
                        )

                    def products(scores_acc, dweights_acc, dk_acc, dv_acc):
                        shared.product(scores_acc, k_smem.at[own, wg], q_smem.at[slot].transpose((1, 0)))
                        plgpu.barrier_wait(dout_full.at[slot])
                        shared.product(dweights_acc, v_smem.at[own, wg], dout_smem.at[slot].transpose((1, 0)))
                        scores = shared.finish(scores_acc, in_flight=1)
                        lse = plgpu.load(lse_smem.at[slot], layout=shared.COLUMN_LAYOUT, optimized=False)
                        edge = (q_block < full_lo) | (q_block >= full_hi)
                        weights, slope = shared.weights(config, scores, shared.along_columns(lse, shape), masked, edge)
                        shared.begin(dv_acc, dv)
                        shared.product(dv_acc, weights.astype(dtype), dout_smem.at[slot])
                        dweights = shared.finish(dweights_acc, in_flight=1)
                        delta = plgpu.load(delta_smem.at[slot], layout=shared.COLUMN_LAYOUT, optimized=False)
                        dscores = weights * (dweights - shared.along_columns(delta, shape))
                        dscores = (dscores if slope is None else dscores * slope).astype(dtype)
                        pl.when(step >= 2)(lambda: plgpu.barrier_wait(ds_free.at[at]))
                        ds_smem.at[at, wg][...] = dscores
                        plgpu.commit_smem()  # also: what was read above comes before the copies that overwrite it
                        plgpu.barrier_arrive(ds_full.at[at])
                        shared.begin(dk_acc, dk)
                        shared.product(dk_acc, dscores, q_smem.at[slot])
                        new_dv = shared.finish(dv_acc, in_flight=1)
                        new_dk = shared.finish(dk_acc)
                        plgpu.barrier_arrive(q_free.at[slot])
                        return new_dk, new_dv

                    gradient, square = plgpu.ACC((ROWS, width), jnp.float32), plgpu.ACC(shape, jnp.float32)
                    return step + 1, *pl.run_scoped(products, square, square, gradient, gradient)

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
                step, dk, dv = lax.fori_loop(lo, hi, one_step, (step, zeros, zeros))
                plgpu.barrier_wait(k_done)
                k_smem.at[own, wg][...] = (dk * config.scale).astype(dtype)
                v_smem.at[own, wg][...] = dv.astype(dtype)
                plgpu.commit_smem()
                rows = pl.ds(first_row, ROWS)
                plgpu.copy_smem_to_gmem(k_smem.at[own, wg], dk_ref.at[row, rows, head])
                plgpu.copy_smem_to_gmem(v_smem.at[own, wg], dv_ref.at[row, rows, head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(own_free.at[own])
                return step

            steps = lax.fori_loop(0, count, one_tile, jnp.int32(0))

            @pl.loop(jnp.maximum(steps - 2, 0), steps)
            def _(step):  # nobody leaves before every arrival has been seen
                plgpu.barrier_wait(ds_free.at[lax.rem(step, 2)])

            plgpu.wait_smem_to_gmem(0)

    own, passing = (tile.tiles, CONSUMERS, ROWS, width), (tile.stages, tile.block_q, width)
    wide = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    scratch = (
        shared.tiled(own, dtype),
        shared.tiled(own, dtype),
        shared.tiled(passing, dtype),
        shared.tiled(passing, dtype),
        shared.tiled((2, CONSUMERS, *shape), dtype),
        plgpu.SMEM((tile.block_q, width), jnp.float32, transforms=wide),
        plgpu.SMEM((tile.stages, tile.block_q), jnp.float32),
        plgpu.SMEM((tile.stages, tile.block_q), jnp.float32),
        plgpu.Barrier(num_barriers=tile.tiles * CONSUMERS, num_arrivals=2),  # own_full
        plgpu.Barrier(num_barriers=tile.tiles, num_arrivals=CONSUMERS),  # own_free
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=2),  # q_full
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=2),  # dout_full
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=CONSUMERS),  # q_free
        plgpu.Barrier(num_barriers=2, num_arrivals=CONSUMERS),  # ds_full
        plgpu.Barrier(num_barriers=2),  # ds_free
        plgpu.Barrier(),  # k_done
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
        # No thread both reads and writes a place in shared memory without a barrier of ours between.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        grid=(taken.blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
    )
    return kernel(*operands[:3], dout, lse, delta, order.ranges, order.turns)
