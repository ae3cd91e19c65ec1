"""The gradients of the scores, stored, and the gradient of q from them.

The kernel for the gradients of k and v has `dS` at hand, rounded as its own product takes it. Written to memory, in
blocks of 64 keys and 64 queries, it spares the kernel for the gradient of q two products of three: what is left, `scale
dS K`, is bound by reading dS (2 bytes for 2 D operations). Memory stays linear in the length: as many heads are done at
a time as fill the device, within `Bounds`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention.contract import Config, Operands, Ranges
from crescendo.pallas_kernels.attention.hopper.tiling import Arrays, Call, Place, Refs, in_pairs
from crescendo.pallas_kernels.attention.tiles import tuned
from crescendo.pallas_kernels.hopper.memory import ROWS, tiled
from crescendo.pallas_kernels.hopper.products import product
from crescendo.pallas_kernels.hopper.ring import Part, Ring
from crescendo.pallas_kernels.op import target_device

SIDE = 2 * ROWS  # of a tile of scores: the keys of a block of threads, and as many queries


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How much of dS is kept at a time: bytes where heads can be divided so finely, and of one group of heads."""

    usual_bytes: int = 5 * 2**27
    most_bytes: int = 5 * 2**28


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
    bounds = tuned("scores that are kept", config, operands, Bounds())
    tiles_q, tiles_k = -(-length // SIDE), -(-keys // SIDE)

    def store(count: int) -> Store:
        return Store(count * groups, tiles_q, tiles_k, config.causal)

    if store(1).size_bytes > bounds.most_bytes:
        return None
    blocks = -(-tiles_k // 2) if in_pairs(config, keys_tile, keys, keys_tile.rows) else tiles_k

    def waves(count: int) -> int:
        return units // count * -(-count * blocks // target_device().cores)

    in_bounds = lambda n: n == 1 or store(n).size_bytes <= bounds.usual_bytes  # noqa: E731
    fitting = [n for n in range(1, units + 1) if units % n == 0 and in_bounds(n)]
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


def default_tile(config: Config, operands: Operands, parts: Parts) -> ScoresTile:
    """Smaller tiles where a part has too few for all cores."""
    length, usual = operands.dims[1], ScoresTile()
    paired = in_pairs(config, usual, length, usual.rows)
    if parts.store.heads * -(-length // (usual.rows * (2 if paired else 1))) >= target_device().cores:
        return usual
    return ScoresTile(blocks=1, stages=5, persistent=False)


@dataclasses.dataclass(frozen=True)
class FromScores(Call):
    """The kernel for the gradient of q: a tile of queries, and the blocks of 64 keys that it sees.

    `refs.first` has the keys, and `refs.second` the gradients of the scores, of each consumer's queries, which are free
    when the keys are; the extra memory is for dq on its way out.

    Attributes:
      store: where the gradients of the scores lie.
    """

    store: Store

    side = "q"

    @property
    def units(self) -> int:
        return self.store.heads

    @property
    def rings(self) -> tuple[None, Ring, Ring]:
        tile, square = self.tile, Part((ROWS, ROWS), self.dtype, tiled=True)
        keys = Ring({"k": Part((ROWS, self.width), self.dtype, tiled=True)}, tile.stages, tile.consumers)
        squares = {f"ds{i}": square for i in range(tile.blocks)}
        return None, keys, Ring(squares, tile.stages, consumers=0, lanes=tile.consumers)

    def extra(self) -> Any:
        return tiled((self.tile.consumers, self.tile.blocks, ROWS, self.width), self.dtype)

    def first_block(self, tile_q, consumer):
        """The first block of a consumer's queries; those of padding take the last that are there."""
        blocks = self.tile.blocks
        return jnp.minimum((tile_q * self.tile.consumers + consumer) * blocks, 2 * self.store.tiles_q - blocks)

    def steps(self, tile_q, consumer):
        """How many blocks of 64 keys a consumer's queries see, in full tiles of 128."""
        seen: Any = self.store.tiles_k
        if self.config.causal:
            seen = jnp.minimum(lax.div(self.first_block(tile_q, consumer), 2) + 1, seen)
        return 2 * seen

    def needed(self, arrays, row, tile) -> Ranges:
        """Of the last consumer's queries, which see the most keys."""
        steps = self.steps(tile, self.tile.consumers - 1)
        return Ranges(0, 0, steps, steps)

    def load(self, refs, n, at, step):
        kv_head = lax.div(at.head, self.groups)

        def one_block(j, step):
            refs.first.fill(step, k=refs.arrays.k.at[at.row, pl.ds(j * ROWS, ROWS), kv_head])
            for consumer in range(self.tile.consumers):
                row, column = self.store.place(at.unit, lax.div(j, 2), self.first_block(at.tile, consumer))
                stored = refs.arrays.dscores
                squares = {f"ds{i}": stored.at[row, column + i, lax.rem(j, 2)] for i in range(self.tile.blocks)}
                fill = functools.partial(refs.second.fill, step, consumer, **squares)
                pl.when(j < self.steps(at.tile, consumer))(fill)
            return step + 1

        return lax.fori_loop(0, at.blocks.hi, one_block, step)

    def reads(self, dscores, first) -> Arrays:
        """What the kernel takes: what `store` describes, and the part's first query head, counted over the batch."""
        return Arrays(None, self.operands.k, None, dscores=dscores, first=first)


def compute(call: FromScores, refs: Refs, consumer, at: Place, step):
    """A consumer's queries of a tile: `scale dS K`, written to dq, a reference to `[B, T, H, D]`."""
    tile, keys, dscores = call.tile, refs.first, refs.second
    own, every = call.steps(at.tile, consumer), at.blocks.hi

    def products(*gradients):
        @pl.loop(0, own)
        def _(j):
            slot, own_slot = keys.slot(step + j), dscores.slot(step + j, consumer)
            dscores.wait(own_slot)
            keys.wait(slot)
            for i, gradient in enumerate(gradients):
                product(gradient, dscores[f"ds{i}"].at[own_slot].transpose((1, 0)), keys["k"].at[slot])
            plgpu.wgmma_wait(len(gradients))
            pl.when(j > 0)(lambda: keys.free(keys.slot(step + j - 1)))

        plgpu.wgmma_wait(0)
        keys.free(keys.slot(step + own - 1))

        @pl.loop(own, every)
        def _(j):
            slot = keys.slot(step + j)
            keys.wait(slot)
            keys.free(slot)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left the buffer
        for i, gradient in enumerate(gradients):
            refs.extra.at[consumer, i][...] = (gradient[...] * call.config.scale).astype(call.dtype)

    pl.run_scoped(products, *[plgpu.ACC((ROWS, call.width), jnp.float32)] * tile.blocks)
    plgpu.commit_smem()
    (dq,) = refs.results
    for i in range(tile.blocks):
        rows = pl.ds(at.start + (consumer * tile.blocks + i) * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(refs.extra.at[consumer, i], dq.at[at.row, rows, at.head])
    return step + every
