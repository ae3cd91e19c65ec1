"""Few queries over many keys: every processor takes an equal run of the keys, and the parts are merged.

A tile holds some queries with all the query heads of one key head, so that keys are read once for a whole group. The
blocks of keys that it sees are cut into parts of equal length, of such a number that all processors have the same work
(Flash-Decoding, Dao et al. 2023; LeanAttention, Sanovar et al. 2024, arXiv:2405.10480; FlashDecoding++, Hong et al.
2023, arXiv:2311.01282). The parts are tiles of the forward kernel, and `merge` puts their results together.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from crescendo.pallas_kernels import tiles
from crescendo.pallas_kernels.attention import hopper
from crescendo.pallas_kernels.attention.contract import Config, Kernels, Operands, Ranges, positions
from crescendo.pallas_kernels.attention.hopper import backward, tiling
from crescendo.pallas_kernels.attention.hopper.forward import Forward, ForwardTile, compute
from crescendo.pallas_kernels.attention.hopper.tiling import Place, Schedule
from crescendo.pallas_kernels.attention.merging import merge
from crescendo.pallas_kernels.attention.tiles import key
from crescendo.pallas_kernels.hopper.memory import ROWS, SHARED_BYTES
from crescendo.pallas_kernels.hopper.products import opaque
from crescendo.pallas_kernels.op import Unsupported, leave_to_others, target_device

MOST_QUERIES, LEAST_KEYS = 64, 1024  # of calls that it is better for
MOST_ROWS = 2 * ROWS  # of a tile: with more, the tensor cores take longer than memory


def attention(config: Config, operands: Operands) -> Kernels:
    """The two passes; the backward pass is that of any other call."""
    del config  # any will do
    hopper.check(operands)
    _, length, keys, heads, kv_heads, _ = operands.dims
    if heads > kv_heads * MOST_ROWS:
        raise Unsupported(f"needs at most {MOST_ROWS} query heads for a key head, not {heads // kv_heads}")
    if length > MOST_QUERIES or keys < LEAST_KEYS:
        leave_to_others(
            f"is for at most {MOST_QUERIES} queries and at least {LEAST_KEYS} keys, not {length} and {keys}"
        )
    return Kernels(forward, backward.backward, adds_out=True, takes_begin=True)


def parts_for(units: int, blocks: int, cores: int) -> int:
    """Into how many parts the blocks of each of so many units are cut.

    The processors take the parts in rounds, and a part costs about a block more than it has.

    >>> parts_for(units=8, blocks=512, cores=132), parts_for(units=24, blocks=512, cores=132)
    (16, 11)
    """

    def cost(parts: int) -> int:
        return -(-units * parts // cores) * (-(-blocks // parts) + 1)

    return min(range(1, min(blocks, cores) + 1), key=cost)


def default_tile(operands: Operands) -> ForwardTile:
    """Where nobody measured: as many blocks of keys in flight as shared memory holds."""
    _, length, _, heads, kv_heads, width = operands.dims
    groups, width = heads // kv_heads, -(-width // 64) * 64
    consumers = 1 if length * groups <= ROWS else 2
    block = 128 if width <= 128 else 64
    spare = 4096 if operands.has_metadata else 1024  # for ids and barriers, and for what aligning takes
    stages = (SHARED_BYTES - spare - consumers * ROWS * width * 2) // (2 * block * width * 2)
    return ForwardTile(block, consumers, min(8, stages), turns=False, pairs=False)


@dataclasses.dataclass(frozen=True)
class SplitKeys(Forward):
    """The kernel, on queries that are `folded`.

    Attributes:
      queries: of a tile, each with all query heads of a key head.
      parts: which the blocks of a tile are cut into.
    """

    queries: int
    parts: int

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.tiles * self.parts, self.units, False, target_device().cores)

    @property
    def _blocks(self) -> tuple[int, int]:
        return self.queries, self.tile.block

    def leaves_at(self, at: Place):
        return at.part * self.operands.dims[0] + at.row

    def place(self, arrays, block, n) -> Place:
        """Key heads first: in memory they are neighbours, and so they are read at about the same time."""
        unit = (opaque(block) if self.operands.has_metadata else block) + n * self.schedule.blocks
        places, at = [], unit
        for size in (self.operands.dims[3], self.parts, self.tiles):
            places.append(lax.rem(at, size))
            at = lax.div(at, size)
        (head, part, tile), row = places, at
        lo, full_lo, full_hi, hi = self.needed(arrays, row, tile)
        begin, end = (lo + lax.div((hi - lo) * index, self.parts) for index in (part, part + 1))
        full_lo, full_hi = (jnp.minimum(jnp.maximum(index, begin), end) for index in (full_lo, full_hi))
        return Place(unit, row, head, tile, tile * self.tile.rows, Ranges(begin, full_lo, full_hi, end), part)


def folded(array, tile_rows: int, queries: int, kv_heads: int):
    """`[B, T, K * g, D]` as `[B, tiles * tile_rows, K, D]`: in a tile so many queries, each g rows, and padding."""
    batch, length, _, width = array.shape
    array = jnp.pad(array, [(0, 0), (0, -length % queries), (0, 0), (0, 0)])
    array = array.reshape(batch, -1, queries, kv_heads, array.shape[2] // kv_heads, width).swapaxes(3, 4)
    array = array.reshape(batch, array.shape[1], -1, kv_heads, width)
    array = jnp.pad(array, [(0, 0), (0, 0), (0, tile_rows - array.shape[2]), (0, 0), (0, 0)])
    return array.reshape(batch, -1, kv_heads, width)


def call_of(config: Config, operands: Operands, tile: ForwardTile) -> SplitKeys:
    """The kernel's call for operands as they come."""
    batch, length, keys, heads, kv_heads, _ = operands.dims
    groups = heads // kv_heads
    queries = min(length, tile.rows // groups)

    def fold_ids(array):
        array = jnp.broadcast_to(array[:, :, None, None], (batch, length, groups, 1))
        return folded(array, tile.rows, queries, 1)[:, :, 0, 0]

    q_positions = None
    if config.masks:  # a row's number is no position
        q_positions = jnp.broadcast_to(positions(operands)[0], (batch, length))
    blocked = operands._replace(
        q=folded(operands.q, tile.rows, queries, kv_heads),
        q_segments=None if operands.q_segments is None else fold_ids(operands.q_segments),
        q_positions=None if q_positions is None else fold_ids(q_positions),
    )
    blocked = tiling.padded(blocked, tile.rows, tile.block, in_place=True)
    units = batch * kv_heads * (blocked.q.shape[1] // tile.rows)
    parts = parts_for(units, -(-keys // tile.block), target_device().cores)
    return SplitKeys(config, tile, blocked, (length, keys), False, queries, parts)


def forward(config: Config, operands: Operands, tile: ForwardTile | None = None):
    """`out [B, T, H, D]` and `lse [B, H, T]`."""
    batch, length, keys, heads, kv_heads, width = operands.dims
    tile = tile or tiles.tuned("attention", "split keys", key(config, operands), keys, default_tile(operands))
    call = call_of(config, operands, tile)
    _, rows, _, _, _, padded_width = call.operands.dims
    out_type = (
        jax.ShapeDtypeStruct((call.parts * batch, rows, kv_heads, padded_width), call.dtype),
        jax.ShapeDtypeStruct((call.parts * batch, kv_heads, rows), jnp.float32),
    )
    out, lse = call.run(compute, call.arrays(operands), out_type)
    used = call.queries * (heads // kv_heads)
    out = out.reshape(call.parts, batch, call.tiles, tile.rows, kv_heads, -1)[:, :, :, :used, :, :width]
    lse = lse.reshape(call.parts, batch, kv_heads, call.tiles, tile.rows)[..., :used]
    out, lse = out.reshape(call.parts, batch, -1, kv_heads, width), lse.reshape(call.parts, batch, kv_heads, -1)
    out, lse = merge(out, lse) if call.parts > 1 else (out[0], lse[0])
    out = out.reshape(batch, -1, heads // kv_heads, kv_heads, width).swapaxes(2, 3)
    out = out.reshape(batch, -1, heads, width)[:, :length].astype(call.dtype)
    lse = lse.reshape(batch, kv_heads, -1, heads // kv_heads).swapaxes(2, 3)
    return out, lse.reshape(batch, heads, -1)[..., :length]
