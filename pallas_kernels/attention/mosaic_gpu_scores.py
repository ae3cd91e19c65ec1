"""Attention for Hopper GPUs: the gradients of the scores, stored, and the gradient of q from them.

The kernel for the gradients of k and v has `dS` at hand, rounded as its own product takes it. Written to memory, in
blocks of 64 keys and 64 queries, it spares the kernel for the gradient of q two products of three: what is left, `scale
dS K`, is bound by reading dS (2 bytes for 2 D operations). Memory stays linear in the length: as many heads are done at
a time as fill the device, within `MOST_BYTES`.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention import mosaic_gpu as shared
from crescendo.pallas_kernels.attention.contract import Config, Operands
from crescendo.pallas_kernels.op import target_device

ROWS = shared.ROWS
SIDE = 2 * ROWS  # of a tile of scores: the keys of a block of threads, and as many queries
USUAL_BYTES, MOST_BYTES = 5 * 2**27, 5 * 2**28  # of dS: where heads can be divided so finely, and of one group of heads


@dataclasses.dataclass(frozen=True)
class Store:
    """Where the gradients of the scores lie: `[heads * rows, columns, 2, 64, 64]`.

    An entry of the first two dimensions is 128 keys by 64 queries. Under causality the tiles of early keys, with many
    queries each, share a row with those of late ones, so that only one half is there.

    Attributes:
      heads: query heads, of the batch or of a part of it.
      tiles_q, tiles_k: tiles of 128 queries and keys.
      causal: whether a tile of keys has the queries from its own place on alone.
    """

    heads: int
    tiles_q: int
    tiles_k: int
    causal: bool

    @property
    def _square(self) -> int:
        """Tiles of a side of the triangle, an even number."""
        tiles = max(self.tiles_q, self.tiles_k)
        return tiles + tiles % 2

    @property
    def _rows(self) -> int:
        return self._square // 2 if self.causal else self.tiles_k

    @property
    def shape(self) -> tuple[int, ...]:
        columns = self._square + 1 if self.causal else self.tiles_q
        return self.heads * self._rows, columns * 2, 2, ROWS, ROWS

    @property
    def size_bytes(self) -> int:
        return 2 * math.prod(self.shape)

    def place(self, head, tile_k, q_block):
        """Row and column of a block of 64 queries; the two of a tile lie side by side."""
        row, column = tile_k, q_block
        if self.causal:
            late = tile_k >= self._rows
            row = jnp.where(late, self._square - 1 - tile_k, tile_k)
            tile_q = lax.div(q_block, 2)
            column = jnp.where(late, self._square - 1 - tile_q, tile_q + 1) * 2 + lax.rem(q_block, 2)
        return head * self._rows + row, column


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a call is divided: `count` parts of so many `units`, a unit being the query heads of a key head of a row."""

    units: int
    count: int
    store: Store


def parts_for(config: Config, operands: Operands, keys_tile) -> Parts | None:
    """The parts of a call, or None where its gradients of scores are not stored.

    Of the numbers of units that fit, the one that leaves the fewest cores idle, and then the greatest.
    """
    batch, length, keys, heads, kv_heads, width = operands.dims
    # Up to a width of 64 the two products cost no more than the bytes; beyond 128 the gradients of k and v are made one
    # at a time.
    if operands.has_metadata or config.window is not None or not 64 < width <= 128:
        return None
    units, groups = batch * kv_heads, heads // kv_heads
    tiles_q, tiles_k = -(-length // SIDE), -(-keys // SIDE)

    def store(count: int) -> Store:
        return Store(count * groups, tiles_q, tiles_k, config.causal)

    if store(1).size_bytes > MOST_BYTES:
        return None
    blocks = -(-tiles_k // 2) if shared.in_pairs(config, keys_tile, keys, keys_tile.rows) else tiles_k

    def waves(count: int) -> int:
        return units // count * -(-count * blocks // target_device().cores)

    fitting = [n for n in range(1, units + 1) if units % n == 0 and (n == 1 or store(n).size_bytes <= USUAL_BYTES)]
    best = min(fitting, key=lambda n: (waves(n), -n))
    return Parts(best, units // best, store(best))


@dataclasses.dataclass(frozen=True)
class ScoresTile:
    """How the kernel is cut up.

    Attributes:
      blocks: of 64 queries, of each of two consumers: 1 or 2.
      stages: steps of 64 keys in flight.
      pairs: whether causal tiles are taken in pairs (`Schedule`).
      persistent: whether a block of threads takes several tiles, or pairs.
    """

    blocks: int = 2
    stages: int = 3
    pairs: bool = True
    persistent: bool = True

    consumers = 2

    @property
    def rows(self) -> int:
        return ROWS * self.blocks * self.consumers

    def elements(self, width: int) -> int:
        """16-bit elements in shared memory."""
        return self.stages * ROWS * (width + self.rows) + self.rows * width


def tile_for(config: Config, operands: Operands, parts: Parts) -> ScoresTile:
    """Smaller tiles where a part has too few for all cores."""
    length, usual = operands.dims[1], ScoresTile()
    paired = shared.in_pairs(config, usual, length, usual.rows)
    if parts.store.heads * -(-length // (usual.rows * (2 if paired else 1))) >= target_device().cores:
        return usual
    return ScoresTile(blocks=1, stages=5, persistent=False)


def gradient_of_q(config: Config, k, scores, first, dq, store: Store, tile: ScoresTile, paired: bool):
    """Writes `scale dS K` of a part's heads to `dq`, a reference to `[B, T, H, D]`, from what `scores` keeps.

    `first` is int32 `[1]`, the first query head of the part, counted over the batch.
    """
    _, length, heads, width = dq.shape
    groups, dtype, stages = heads // k.shape[2], k.dtype, tile.stages
    taken = shared.schedule(tile, length // tile.rows, store.heads, paired)

    def body(first_ref, k_ref, scores_ref, dq_ref, k_smem, scores_smem, out_smem, k_full, k_free, scores_full):
        block, warpgroup = lax.axis_index("block"), lax.axis_index("wg")
        rounds = taken.count(block)

        def place(n):
            """The head of the part, its row of the batch, its place there, and the tile of queries."""
            head, tile_q = taken.tile(block, n)
            head_of_batch = first_ref[0] + head
            return head, lax.div(head_of_batch, heads), lax.rem(head_of_batch, heads), taken.tiles - 1 - tile_q

        def first_block(tile_q, wg):
            """Of a consumer's queries; those of padding take the last that are there."""
            return jnp.minimum((tile_q * tile.consumers + wg) * tile.blocks, 2 * store.tiles_q - tile.blocks)

        def steps_of(tile_q, wg):
            """How many blocks of 64 keys they see, in full tiles of 128."""
            seen = lax.div(first_block(tile_q, wg), 2) + 1 if config.causal else store.tiles_k
            return 2 * jnp.minimum(seen, store.tiles_k)

        @pl.when(warpgroup == tile.consumers)
        def _producer():
            plgpu.set_max_registers(shared.REGISTERS[tile.consumers][0], action="decrease")

            def one_tile(n, step):
                head, row, query_head, tile_q = place(n)
                kv_head = lax.div(query_head, groups)

                def one_block(j, step):
                    slot = lax.rem(step, stages)
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    rows = pl.ds(j * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(k_ref.at[row, rows, kv_head], k_smem.at[slot], k_full.at[slot])
                    for wg in range(tile.consumers):

                        @pl.when(j < steps_of(tile_q, wg))
                        def _():
                            at = store.place(head, lax.div(j, 2), first_block(tile_q, wg))  # noqa: B023
                            for i in range(tile.blocks):
                                plgpu.copy_gmem_to_smem(
                                    scores_ref.at[at[0], at[1] + i, lax.rem(j, 2)],
                                    scores_smem.at[wg, slot, i],  # noqa: B023
                                    scores_full.at[wg * stages + slot],  # noqa: B023
                                )

                    return step + 1

                return lax.fori_loop(0, steps_of(tile_q, tile.consumers - 1), one_block, step)

            steps = lax.fori_loop(0, rounds, one_tile, jnp.int32(0))

            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _(step):
                plgpu.barrier_wait(k_free.at[lax.rem(step, stages)])

        @pl.when(warpgroup < tile.consumers)
        def _consumer():
            plgpu.set_max_registers(shared.REGISTERS[tile.consumers][1], action="increase")
            wg = warpgroup

            def one_tile(n, step):
                _, row, query_head, tile_q = place(n)
                own, every = steps_of(tile_q, wg), steps_of(tile_q, tile.consumers - 1)

                def free(j):
                    plgpu.barrier_arrive(k_free.at[lax.rem(step + j, stages)])

                def products(*gradients):
                    @pl.loop(0, own)
                    def _(j):
                        slot = lax.rem(step + j, stages)
                        plgpu.barrier_wait(scores_full.at[wg * stages + slot])
                        plgpu.barrier_wait(k_full.at[slot])
                        for i, gradient in enumerate(gradients):
                            shared.product(gradient, scores_smem.at[wg, slot, i].transpose((1, 0)), k_smem.at[slot])
                        plgpu.wgmma_wait(len(gradients))
                        pl.when(j > 0)(lambda: free(j - 1))

                    plgpu.wgmma_wait(0)
                    free(own - 1)

                    @pl.loop(own, every)
                    def _(j):
                        plgpu.barrier_wait(k_full.at[lax.rem(step + j, stages)])
                        free(j)

                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left the buffer
                    for i, gradient in enumerate(gradients):
                        out_smem.at[wg, i][...] = (gradient[...] * config.scale).astype(dtype)

                pl.run_scoped(products, *[plgpu.ACC((ROWS, width), jnp.float32)] * tile.blocks)
                plgpu.commit_smem()
                for i in range(tile.blocks):
                    rows = pl.ds(tile_q * tile.rows + (wg * tile.blocks + i) * ROWS, ROWS)
                    plgpu.copy_smem_to_gmem(out_smem.at[wg, i], dq_ref.at[row, rows, query_head])
                return step + every

            lax.fori_loop(0, rounds, one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        scratch_types=(
            shared.tiled((stages, ROWS, width), dtype),
            shared.tiled((tile.consumers, stages, tile.blocks, ROWS, ROWS), dtype),
            shared.tiled((tile.consumers, tile.blocks, ROWS, width), dtype),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=tile.consumers),
            plgpu.Barrier(num_barriers=tile.consumers * stages, num_arrivals=tile.blocks),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(taken.blocks,),
        grid_names=("block",),
        num_threads=tile.consumers + 1,
        thread_name="wg",
    )
    kernel(first, k, scores, dq)
