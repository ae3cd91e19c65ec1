"""How a call is cut into tiles, and how a kernel walks over them: a tile of one side, the blocks of the other it needs.

A block of threads takes every n-th tile, or pair of tiles, and the loads of a tile run ahead into the next one; or it
takes one alone, and the device hands them out (`persistent`). Blocks that causality, window or segments hide are never
loaded.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention.contract import Config, Operands, Ranges, block_ranges, ranges_of_tile
from crescendo.pallas_kernels.attention.hopper.masks import Ids, ids_of
from crescendo.pallas_kernels.hopper.block import launch, warpgroups
from crescendo.pallas_kernels.hopper.memory import ROWS
from crescendo.pallas_kernels.hopper.ring import Part, Ring, Slots, Turns
from crescendo.pallas_kernels.op import target_device
from crescendo.pallas_kernels.sharded import plain, results_of

COPIED = 8  # rows: what the copy engine brings begins, and the array ends, at a multiple


def padded(operands: Operands, block_q: int, block_k: int, in_place: bool = False) -> Operands:
    """Lengths filled up to full blocks and widths to a multiple of 64.

    Padded keys are hidden by the mask; what padded queries compute is dropped. Where `in_place`, keys stay as they are
    if that can be: then the last block begins before its place (`OverKeys.first_key`).
    """
    if in_place and operands.dims[2] % COPIED == 0 and operands.dims[2] >= block_k:
        block_k = COPIED
    _, length, keys, _, _, width = operands.dims
    more_q, more_k, more_d = -length % block_q, -keys % block_k, -width % 64
    if not (more_q or more_k or more_d):
        return operands

    def pad(array, more, more_d=0):
        if array is None:
            return None
        widths = [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2)
        if array.ndim == 4:
            widths[3] = (0, more_d)
        return jnp.pad(array, widths)

    of_queries = {name: pad(getattr(operands, name), more_q) for name in ("q_segments", "q_positions")}
    of_keys = {name: pad(getattr(operands, name), more_k) for name in ("k_segments", "k_positions")}
    return operands._replace(
        q=pad(operands.q, more_q, more_d),
        k=pad(operands.k, more_k, more_d),
        v=pad(operands.v, more_k, more_d),
        **of_queries,
        **of_keys,
    )


def in_pairs(config: Config, tile, length: int, rows: int) -> bool:
    """Whether tiles of so many rows are taken in pairs (`Schedule`)."""
    return config.causal and tile.pairs and length > rows


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which tiles a block of threads takes, of `tiles` in each of so many heads of the batch.

    Where `paired`, an early tile goes with a late one: if work grows along a head, as under causality, all pairs have
    the same.

    Attributes:
      tiles: of a head, an even number where paired.
      heads: of the batch.
      paired: whether the tiles are taken in pairs.
      at_once: blocks of threads at most; None: one for each tile or pair.
    """

    tiles: int
    heads: int
    paired: bool
    at_once: int | None

    @property
    def pairing(self) -> int:
        return 2 if self.paired else 1

    @property
    def blocks(self) -> int:
        units = self.heads * self.tiles // self.pairing
        return units if self.at_once is None else min(units, self.at_once)

    def count(self, block):
        """How many tiles a block of threads takes."""
        units = self.heads * self.tiles // self.pairing
        return (units - block + self.blocks - 1) // self.blocks * self.pairing

    def tile(self, block, n):
        """The head, and the tile of it, that a block of threads takes as its n-th."""
        index, of_head = block + lax.div(n, self.pairing) * self.blocks, self.tiles // self.pairing
        head, tile = lax.div(index, of_head), lax.rem(index, of_head)
        if self.paired:
            tile = jnp.where(lax.rem(n, 2) == 0, tile, self.tiles - 1 - tile)
        return head, tile

    def late_first(self, block, n):
        """The same, the last tiles of a head first: under causality those have most to do."""
        head, tile = self.tile(block, n)
        return head, self.tiles - 1 - tile


class Arrays(NamedTuple):
    """What the kernels read, in device memory, in full blocks; None where a kernel doesn't.

    Attributes:
      q, dout, out: `[B, T, H, D]`: queries, the gradient of the result, the result.
      k, v: `[B, S, K, D]`.
      lse, delta: float32 `[B, H, T]`: the log-sum-exp, and dout.out less the gradient of the log-sum-exp.
      ranges: int32 `[B or 1, tiles, 4]`, the blocks that a tile needs (`Call.ranges`).
      dscores: gradients of the scores (`scores.Store`).
      first: int32 `[1]`, the first unit of a part, counted over the batch.
      begin: int32 `[1]`, the position of the first query.
      q_ids, k_ids: segments and positions.
    """

    q: Any
    k: Any
    v: Any
    dout: Any = None
    out: Any = None
    lse: Any = None
    delta: Any = None
    ranges: Any = None
    dscores: Any = None
    first: Any = None
    begin: Any = None
    q_ids: Ids = Ids()
    k_ids: Ids = Ids()


class Place(NamedTuple):
    """Where a tile lies.

    Attributes:
      unit: what is counted of the batch: a query head of a row, or a key head.
      row: of the batch.
      head: of the tile's own side.
      tile: its number in the head.
      start: index of its first query or key.
      blocks: of the other side, that it needs.
      part: of these blocks, where several tiles share them.
    """

    unit: Any
    row: Any
    head: Any
    tile: Any
    start: Any
    blocks: Ranges
    part: Any = 0


class Refs(NamedTuple):
    """What a kernel has at hand.

    Attributes:
      arrays: in device memory.
      results: references to what it writes there.
      own: slots of the tile, a lane for each consumer; None where it has none.
      first, second: slots of the other side's blocks: keys and values, or queries and the gradients of their results.
      extra: other shared memory.
      turn: of `Turns`.
    """

    arrays: Arrays
    results: tuple
    own: Any
    first: Slots
    second: Slots
    extra: Any
    turn: Any


@dataclasses.dataclass(frozen=True)
class Call:
    """What is fixed of a call when it is traced; a kernel is one of the classes below with its own `compute`.

    Attributes:
      config: the constants.
      tile: how it is cut up: `rows` of a tile, 64 to each of `consumers`, and `block`, of the other side, of a step.
      operands: filled up to full blocks (`padded`).
      lengths: T and S without padding.
      paired: whether tiles are taken in pairs.
    """

    config: Config
    tile: Any
    operands: Operands
    lengths: tuple[int, int]
    paired: bool

    side: ClassVar[str]

    @property
    def dtype(self):
        return self.operands.q.dtype

    @property
    def width(self) -> int:
        return self.operands.dims[-1]

    @property
    def groups(self) -> int:
        """Query heads of a key head."""
        return self.operands.dims[3] // self.operands.dims[4]

    @property
    def units(self) -> int:
        """Heads of the tile's own side, of all rows."""
        batch, _, _, heads, kv_heads, _ = self.operands.dims
        return batch * (heads if self.side == "q" else kv_heads)

    @property
    def ragged(self) -> int | None:
        """Keys from this one on are padding, in a block or tile that has others too; None where there is none."""
        keys = self.lengths[1]
        return keys if keys % (self.tile.block if self.side == "q" else self.tile.rows) else None

    @property
    def edges(self) -> bool:
        """Whether a block may be seen in part."""
        return bool(self.config.masks or self.operands.q_segments is not None or self.ragged)

    @property
    def schedule(self) -> Schedule:
        """Of as many blocks of threads as run at a time, or, where the tile is not persistent, of one for each."""
        return Schedule(self.tiles, self.units, self.paired, target_device().cores if self.tile.persistent else None)

    @property
    def tiles(self) -> int:
        """Of a head."""
        return (self.operands.q if self.side == "q" else self.operands.k).shape[1] // self.tile.rows

    @property
    def _blocks(self) -> tuple[int, int]:
        """Queries and keys that are taken together."""
        return (self.tile.rows, self.tile.block) if self.side == "q" else (self.tile.block, self.tile.rows)

    def ranges(self, operands: Operands):
        """`[B or 1, tiles, 4]`: lo, full_lo, full_hi, hi; nothing for tiles of nothing but padding.

        None where they are arithmetic, which the kernel does itself. The operands are those without padding.
        """
        if not operands.has_metadata:
            return None
        of_queries, of_keys = block_ranges(self.config, operands, *self._blocks)
        stacked = jnp.stack(of_queries if self.side == "q" else of_keys, axis=-1)
        return jnp.pad(stacked, [(0, 0), (0, self.tiles - stacked.shape[1]), (0, 0)])

    def arrays(self, operands: Operands, **others) -> Arrays:
        """What the kernel reads: operands without padding, and others that have it."""
        q_ids, k_ids = ids_of(self.operands)
        ranges, begin = self.ranges(operands), operands.begin
        return Arrays(*self.operands[:3], ranges=ranges, begin=begin, q_ids=q_ids, k_ids=k_ids, **others)

    def place(self, arrays: Arrays, block, n) -> Place:
        """Of the n-th tile of a block of threads; of queries the last ones first: under causality they see the most."""
        take = self.schedule.late_first if self.side == "q" else self.schedule.tile
        unit, tile = take(block, n)
        of_batch, heads = unit if arrays.first is None else arrays.first[0] + unit, self.operands.dims[3]
        heads = heads if self.side == "q" else self.operands.dims[4]
        head, row = lax.rem(of_batch, heads), lax.div(of_batch, heads)
        return Place(unit, row, head, tile, tile * self.tile.rows, self.needed(arrays, row, tile))

    def needed(self, arrays: Arrays, row, tile) -> Ranges:
        """The blocks that a tile needs."""
        if arrays.ranges is None:
            begin = None if arrays.begin is None else plain(arrays.begin[0])
            return ranges_of_tile(self.config, tile, self.side, self.lengths, *self._blocks, begin)
        of_row = row if arrays.ranges.shape[0] > 1 else 0
        return Ranges(*(plain(arrays.ranges[of_row, tile, i]) for i in range(4)))

    @property
    def rings(self) -> tuple[Ring | None, Ring, Ring]:
        """Of `Refs.own`, `Refs.first` and `Refs.second`."""
        tile = self.tile
        rows, block = (Part((length, self.width), self.dtype, tiled=True) for length in (ROWS, tile.block))
        own, first, second = self._parts(rows, block)
        of_tile = Ring(own, stages=1, consumers=1, lanes=tile.consumers)
        return of_tile, Ring(first, tile.stages, tile.consumers), Ring(second, tile.stages, tile.consumers)

    def _parts(self, rows: Part, block: Part) -> tuple[dict[str, Part], dict[str, Part], dict[str, Part]]:
        raise NotImplementedError

    def load(self, refs: Refs, n, at: Place, step):
        """Fills the rings for a tile; the step after its last one."""
        raise NotImplementedError

    def extra(self) -> Any:
        """Other shared memory that the kernel needs."""
        return None

    @property
    def turns(self) -> Turns | None:
        return None

    @functools.cached_property
    def scratch(self) -> tuple:
        """What a block of threads allocates: the rings, the extra, and a barrier for turns."""
        return *(ring and ring.scratch() for ring in self.rings), self.extra(), self.turns and self.turns.scratch()

    def run(self, compute: Callable, arrays: Arrays, out_type: tuple, written: Sequence = ()):
        """Launches the kernel.

        Args:
          compute: `(call, refs, consumer, place, step) -> step`: a consumer's rows of a tile.
          arrays: what it reads.
          out_type: of its results.
          written: references that it writes to, before the results in `Refs.results`.
        """

        def body(arrays, written, *rest):
            outs, (*allocated, extra, turn) = rest[: len(out_type)], rest[len(out_type) :]
            slots: list[Any] = [ring and ring.of(memory) for ring, memory in zip(self.rings, allocated, strict=True)]
            own, first, second = slots
            refs = Refs(arrays, (*written, *outs), own, first, second, extra, turn)
            block = lax.axis_index("block")
            rounds = self.schedule.count(block)

            def drain(steps):
                refs.first.drain(steps)
                refs.second.drain(steps)
                if refs.own is not None:
                    refs.own.drain(rounds)

            def begin(consumer):
                if self.turns:
                    self.turns.begin(turn, consumer)

            def end(consumer):
                if self.turns:
                    self.turns.end(turn, consumer)
                plgpu.wait_smem_to_gmem(0)

            warpgroups(
                self.tile.consumers,
                rounds,
                load=lambda n, step: self.load(refs, n, self.place(arrays, block, n), step),
                compute=lambda consumer, n, step: compute(self, refs, consumer, self.place(arrays, block, n), step),
                begin=begin,
                drain=drain,
                end=end,
            )

        kernel = launch(
            body,
            consumers=self.tile.consumers,
            blocks=self.schedule.blocks,
            scratch=self.scratch,
            out_type=out_type,
        )
        return results_of(arrays, kernel(arrays, tuple(written)))


class OverKeys(Call):
    """A tile of queries, and the blocks of keys that it sees: `refs.first` has k with ids, `refs.second` v."""

    side = "q"
    own_parts: ClassVar[tuple[str, ...]] = ("q",)

    @property
    def in_place(self) -> bool:
        """Whether keys that fill no whole number of blocks are read where they are."""
        return self.operands.k.shape[1] % self.tile.block != 0

    def first_key(self, j):
        """Where a block of keys begins: the last one so that it ends with them, and repeats some of those before."""
        start = j * self.tile.block
        return jnp.minimum(start, self.operands.k.shape[1] - self.tile.block) if self.in_place else start

    def _parts(self, rows, block):
        _, k_ids = ids_of(self.operands)
        return dict.fromkeys(self.own_parts, rows), {"k": block, **k_ids.parts(self.tile.block)}, {"v": block}

    def load(self, refs, n, at, step):
        arrays, block = refs.arrays, self.tile.block
        kv_head = lax.div(at.head, self.groups)
        for consumer in range(self.tile.consumers):
            here = at.row, pl.ds(at.start + consumer * ROWS, ROWS), at.head
            refs.own.fill(n, consumer, **{name: getattr(arrays, name).at[here] for name in self.own_parts})

        def one_block(j, step):
            columns = pl.ds(self.first_key(j), block)
            here = at.row, columns, kv_head
            refs.first.fill(step, k=arrays.k.at[here], **arrays.k_ids.sources((at.row, columns)))
            refs.second.fill(step, v=arrays.v.at[here])
            return step + 1

        return lax.fori_loop(at.blocks.lo, at.blocks.hi, one_block, step)


class OverQueries(Call):
    """A tile of keys, and the blocks of queries that see it, of all the query heads of its group.

    `refs.first` has q with its log-sum-exp and ids, `refs.second` dout with delta.
    """

    side = "k"

    def _parts(self, rows, block):
        (q_ids, _), numbers = ids_of(self.operands), Part((self.tile.block,), jnp.float32)
        queries = {"q": block, "lse": numbers, **q_ids.parts(self.tile.block)}
        return {"k": rows, "v": rows}, queries, {"dout": block, "delta": numbers}

    def load(self, refs, n, at, step):
        arrays, block, (lo, _, _, hi) = refs.arrays, self.tile.block, at.blocks
        for consumer in range(self.tile.consumers):
            here = at.row, pl.ds(at.start + consumer * ROWS, ROWS), at.head
            refs.own.fill(n, consumer, k=arrays.k.at[here], v=arrays.v.at[here])

        def one_block(i, step):
            head = at.head * self.groups + lax.div(i, hi - lo)
            columns = pl.ds((lo + lax.rem(i, hi - lo)) * block, block)
            matrix, numbers, ids = (at.row, columns, head), (at.row, head, columns), (at.row, columns)
            of_queries = {"q": arrays.q.at[matrix], "lse": arrays.lse.at[numbers], **arrays.q_ids.sources(ids)}
            refs.first.fill(step, **of_queries)
            refs.second.fill(step, dout=arrays.dout.at[matrix], delta=arrays.delta.at[numbers])
            return step + 1

        return lax.fori_loop(0, self.groups * (hi - lo), one_block, step)
