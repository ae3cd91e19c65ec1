"""Attention for Hopper GPUs in Pallas' Mosaic GPU dialect: the forward pass, after FlashAttention-3.

A block of threads holds a tile of queries, 64 rows to each of its consumer warpgroups, and walks over the blocks of
keys that the tile can see. A producer warpgroup keeps the blocks coming by TMA. In each step a consumer issues the
scores of the next block and, behind them, the product of the last block's weights with v: the softmax of the new scores
runs while the tensor cores work on that product, and the consumers take turns at issuing, so that one's softmax
also hides behind another's products. Blocks that causality, window or segments hide are never loaded
(`contract.block_ranges`), and only blocks on an edge pay for a mask.

A block of threads takes every n-th tile, or pair of tiles, and the loads of a tile run ahead into the next one; or it
takes one alone, and the device hands them out (`ForwardTile.persistent`).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention import tiles as tuned_tiles
from crescendo.pallas_kernels.attention.contract import (
    Config,
    Kernels,
    Operands,
    block_ranges,
    per_device,
    ranges_of_tile,
)
from crescendo.pallas_kernels.op import Unsupported, require_gpu, target_device

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
FLOOR = -1e30  # the least maximum: finite, so that a row which has seen nothing yet makes no NaN
ROWS = 64  # of a warpgroup's matrix instruction
SHARED_BYTES = 227 * 1024 - 1024  # of a block of threads, less what is small: barriers, rows' numbers, metadata
# Of a thread of the producer and of a consumer, by the number of consumers: together at most what they start with.
REGISTERS = {1: (40, 240), 2: (24, 240), 3: (32, 160)}
ROW_LAYOUT, COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class ForwardTile:
    """How the forward pass is cut up.

    Attributes:
      block_k: keys of a step.
      consumers: warpgroups with 64 queries each.
      stages: blocks of k and of v in flight.
      turns: whether the consumers issue in turns.
      pairs: whether causal tiles are taken in pairs (`Schedule`).
      persistent: whether a block of threads takes several tiles, or pairs.
    """

    block_k: int
    consumers: int = 2
    stages: int = 2
    turns: bool = True
    pairs: bool = True
    persistent: bool = True

    @property
    def block_q(self) -> int:
        return ROWS * self.consumers

    def elements(self, width: int, own_out: bool) -> int:
        """16-bit elements in shared memory, with a place for results of their own or without."""
        return width * (self.block_q * (2 if own_out else 1) + 2 * self.stages * self.block_k)

    def own_out(self, width: int) -> bool:
        """Whether results have a place beside that of queries, so that the next tile's queries are loaded early."""
        return 2 * self.elements(width, own_out=True) <= SHARED_BYTES


def tiled(shape, dtype):
    """Shared memory laid out for TMA and the matrix instructions."""
    # mypy takes a protocol's method for abstract.
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def row_vector(value, size=ROWS):
    return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), ROW_LAYOUT)


def opaque(index):
    """`index`, in such a form that the compiler can't know.

    Otherwise it finds that an operand's addresses are the same in every step, and keeps them all in registers.
    """
    return lax.optimization_barrier(index)


def begin(accumulator, value):
    """Sets a matrix instruction's accumulator to registers' values."""
    accumulator[...] = value


def product(accumulator, a, b):
    """Issues `accumulator += a @ b`; `a` may be in registers."""
    plgpu.wgmma(accumulator, a, b)


def finish(accumulator, in_flight: int = 0):
    """The accumulator's value, once at most that many later products are in flight."""
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)


def along_rows(vector, shape):
    """A value for each row, over the columns."""
    return lax.broadcast_in_dim(vector, shape, (0,))


def along_columns(vector, shape):
    return lax.broadcast_in_dim(vector, shape, (1,))


def hide(scores, config: Config, rows, columns, first_row, first_column, *, transposed=False, keys=None):
    """One block of scores with -inf where the query doesn't see the key.

    `rows` and `columns` are the (segments, positions) of the queries and keys, either None; `transposed` where the
    block's rows are keys. `keys` masks the columns from that index on.
    """
    q_dim, k_dim = (1, 0) if transposed else (0, 1)
    shape = scores.shape
    over, layouts = (along_rows, along_columns), (ROW_LAYOUT, COLUMN_LAYOUT)
    (q_segments, q_positions), (k_segments, k_positions) = rows, columns

    def index(dim, first):
        numbers = plgpu.broadcasted_iota(jnp.int32, (shape[dim],), 0, layout=layouts[dim])
        # Or the compiler finds that one element's row less its column is always the same, and keeps all of these.
        return lax.optimization_barrier(numbers) + first

    def compare(relation, of_queries, of_keys):
        return relation(over[q_dim](of_queries, shape), over[k_dim](of_keys, shape))

    masks = []
    if q_segments is not None:
        masks.append(compare(jnp.equal, q_segments, k_segments))
    if config.masks:
        q_positions = index(q_dim, first_row) if q_positions is None else q_positions
        k_positions = index(k_dim, first_column) if k_positions is None else k_positions
        if config.causal:
            masks.append(compare(jnp.greater_equal, q_positions, k_positions))
        else:
            masks.append(compare(jnp.greater, q_positions, k_positions - config.window))
        if config.window is not None:
            masks.append(compare(jnp.less, q_positions, k_positions + config.window))
    if keys is not None:
        masks.append(over[k_dim](index(k_dim, first_column), shape) < keys)
    for mask in masks:  # one after the other: all at once would need more registers
        scores = jnp.where(mask, scores, -jnp.inf)
    return scores


def weights(config: Config, scores, lse, masked, partly):
    """`P = exp(score - lse)`, and the derivative of the capped score (None without a cap).

    `masked` is applied to the scores where `partly`; None: nowhere.
    """
    slope, factor = None, config.scale * LOG2_E
    if config.soft_cap is not None:
        capped = jnp.tanh(scores * (config.scale / config.soft_cap))
        scores, slope, factor = config.soft_cap * capped, 1 - capped * capped, LOG2_E
    if partly is not None:
        scores = lax.cond(partly, masked, lambda scores: scores, scores)
    return jnp.exp2(scores * factor - lse), slope


def check(operands: Operands):
    """Refuses what these kernels don't do."""
    require_gpu(9.0, 10.0)
    width = operands.dims[-1]
    if operands.q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"needs bfloat16 or float16, not {operands.q.dtype}")
    if operands.bias is not None:
        raise Unsupported("takes no bias")
    if width > 256:
        raise Unsupported(f"needs a head width of at most 256, not {width}")


def kernels(config: Config, operands: Operands) -> Kernels:
    from crescendo.pallas_kernels.attention import mosaic_gpu_backward

    del config  # any will do
    check(operands)
    return per_device(Kernels(forward, mosaic_gpu_backward.backward, adds_out=True))


def padded(operands: Operands, block_q: int, block_k: int) -> Operands:
    """Lengths filled up to full blocks and widths to a multiple of 64.

    Padded keys are hidden by the mask; what padded queries compute is dropped.
    """
    _, length, keys, _, _, width = operands.dims
    more_q, more_k, more_d = -length % block_q, -keys % block_k, -width % 64
    if not (more_q or more_k or more_d):
        return operands

    def pad(array, more, more_d=0, value=0):
        widths = [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2)
        if array.ndim == 4:
            widths[3] = (0, more_d)
        return jnp.pad(array, widths, constant_values=value)

    def meta(array, more):
        return None if array is None else pad(array, more)

    return operands._replace(
        q=pad(operands.q, more_q, more_d),
        k=pad(operands.k, more_k, more_d),
        v=pad(operands.v, more_k, more_d),
        q_segments=meta(operands.q_segments, more_q),
        k_segments=meta(operands.k_segments, more_k),
        q_positions=meta(operands.q_positions, more_q),
        k_positions=meta(operands.k_positions, more_k),
    )


def stacked_ranges(config: Config, operands: Operands, side: str, block_q: int, block_k: int, tiles: int):
    """`[B or 1, tiles, 4]`: lo, full_lo, full_hi, hi; nothing for tiles of nothing but padding.

    None where they are arithmetic, which the kernel does (`reader`). The operands are those without padding.
    """
    if not operands.has_metadata:
        return None
    of_queries, of_keys = block_ranges(config, operands, block_q, block_k)
    stacked = jnp.stack(of_queries if side == "q" else of_keys, axis=-1)
    return jnp.pad(stacked, [(0, 0), (0, tiles - stacked.shape[1]), (0, 0)])


def reader(config: Config, side: str, lengths: tuple[int, int], block_q: int, block_k: int, ranges_ref):
    """What a kernel finds a tile's range of blocks with: `(row of the batch, tile) -> lo, full_lo, full_hi, hi`.

    `ranges_ref` is what `stacked_ranges` gave, or None: then it is arithmetic, and no other kernel runs before.
    """

    def read(row, tile):
        if ranges_ref is None:
            return ranges_of_tile(config, tile, side, lengths, block_q, block_k)
        return tuple(ranges_ref[row if ranges_ref.shape[0] > 1 else 0, tile, i] for i in range(4))

    return read


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


def schedule(tile, tiles: int, heads: int, paired: bool) -> Schedule:
    """Of as many blocks of threads as run at a time, or, where the kernel's tile is not persistent, of one for each."""
    return Schedule(tiles, heads, paired, target_device().cores if tile.persistent else None)


def forward_tile(operands: Operands) -> ForwardTile:
    width = operands.dims[-1]
    if width <= 64:
        return ForwardTile(block_k=128, consumers=2, stages=3, turns=False)
    if width <= 128:
        return ForwardTile(block_k=128, consumers=2, stages=2)
    return ForwardTile(block_k=64, consumers=2, stages=2)


def forward(config: Config, operands: Operands, tile: ForwardTile | None = None):
    """`out [B, T, H, D]` and `lse [B, H, T]`."""
    tile = tile or tuned_tiles.tuned("forward", config, operands, forward_tile(operands))
    _, length, keys, _, _, true_width = operands.dims
    paired = in_pairs(config, tile, length, tile.block_q)
    blocked = padded(operands, tile.block_q * (2 if paired else 1), tile.block_k)
    tiles = blocked.q.shape[1] // tile.block_q
    ranges = stacked_ranges(config, operands, "q", tile.block_q, tile.block_k, tiles)
    out, lse = _forward(config, tile, (length, keys), paired)(blocked, ranges)
    return out[:, :length, :, :true_width], lse[:, :, :length]


def _forward(config: Config, tile: ForwardTile, lengths: tuple[int, int], paired: bool):
    """The kernel's call: `(padded operands, ranges) -> (out, lse)`; `lengths` are those without padding."""
    _, keys = lengths

    def call(operands: Operands, ranges):
        batch, length, _, heads, kv_heads, width = operands.dims
        q, k, v = operands[:3]
        dtype = q.dtype
        metadata = [array for array in operands.metadata if array is not None]
        q_meta, k_meta = metadata[0::2], metadata[1::2]
        tiles_q = length // tile.block_q
        taken = schedule(tile, tiles_q, batch * heads, paired)
        ragged = keys if keys % tile.block_k else None
        edges = bool(config.masks or q_meta or ragged)
        own_out = tile.own_out(width)
        shape = (ROWS, tile.block_k)

        def body(q_ref, k_ref, v_ref, ranges_ref, *rest):
            q_metas, rest = rest[: len(q_meta)], rest[len(q_meta) :]
            k_metas, rest = rest[: len(k_meta)], rest[len(k_meta) :]
            out_ref, lse_ref, *scratch = rest
            q_smem, k_smem, v_smem, out_smem, meta_smem, *barriers = scratch
            q_full, q_free, k_full, k_free, v_full, v_free, turn = barriers
            out_smem = out_smem if own_out else q_smem
            block = lax.axis_index("block")
            warpgroup = lax.axis_index("wg")
            rounds = taken.count(block)
            range_of = reader(config, "q", lengths, tile.block_q, tile.block_k, ranges_ref)
            # With ids the registers that a warp shares run out: a tile's place is computed anew, and not stored.
            find = opaque if q_metas else lambda index: index

            def place(n):
                """Batch, head, tile of queries (longest first where causal) and the range of blocks of keys."""
                head, tile_q = taken.tile(find(block), n)
                tile_q = tiles_q - 1 - tile_q
                head, row = lax.rem(head, heads), lax.div(head, heads)
                return row, head, tile_q, range_of(row, tile_q)

            @pl.when(warpgroup == tile.consumers)
            def _producer():
                plgpu.set_max_registers(REGISTERS[tile.consumers][0], action="decrease")

                def one_tile(n, step):
                    row, head, tile_q, (lo, _, _, hi) = place(n)
                    kv_head = lax.div(head, heads // kv_heads)
                    for wg in range(tile.consumers):

                        @pl.when(n > 0)
                        def _():
                            plgpu.barrier_wait(q_free.at[wg])  # noqa: B023

                        rows = pl.ds(tile_q * tile.block_q + wg * ROWS, ROWS)
                        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_smem.at[wg], q_full.at[wg])

                    def one_block(j, step):
                        slot = lax.rem(step, tile.stages)
                        columns = pl.ds(j * tile.block_k, tile.block_k)

                        @pl.when(step >= tile.stages)
                        def _():
                            plgpu.barrier_wait(k_free.at[slot])

                        plgpu.copy_gmem_to_smem(k_ref.at[row, columns, kv_head], k_smem.at[slot], k_full.at[slot])
                        for i, meta in enumerate(k_metas):
                            plgpu.copy_gmem_to_smem(meta.at[row, columns], meta_smem.at[i, slot], k_full.at[slot])

                        @pl.when(step >= tile.stages)
                        def _():
                            plgpu.barrier_wait(v_free.at[slot])

                        plgpu.copy_gmem_to_smem(v_ref.at[row, columns, kv_head], v_smem.at[slot], v_full.at[slot])
                        return step + 1

                    return lax.fori_loop(lo, hi, one_block, step)

                steps = lax.fori_loop(0, rounds, one_tile, jnp.int32(0))

                # Nobody leaves before every arrival has been seen.
                @pl.loop(jnp.maximum(steps - tile.stages, 0), steps)
                def _(step):
                    plgpu.barrier_wait(k_free.at[lax.rem(step, tile.stages)])
                    plgpu.barrier_wait(v_free.at[lax.rem(step, tile.stages)])

                for wg in range(tile.consumers):
                    plgpu.barrier_wait(q_free.at[wg])

            @pl.when(warpgroup < tile.consumers)
            def _consumer():
                plgpu.set_max_registers(REGISTERS[tile.consumers][1], action="increase")
                wg = warpgroup
                if tile.turns:
                    # The last one gives the first its first turn.
                    pl.when(wg == tile.consumers - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
                following = lax.rem(wg + 1, tile.consumers)

                def take_turn():
                    if tile.turns:
                        plgpu.barrier_wait(turn.at[wg])

                def pass_turn():
                    if tile.turns:
                        plgpu.barrier_arrive(turn.at[following])

                def one_tile(n, step):
                    row, head, tile_q, (lo, full_lo, full_hi, hi) = place(n)
                    first_row = tile_q * tile.block_q + wg * ROWS
                    q_info = [
                        plgpu.load(meta.at[row, pl.ds(first_row, ROWS)], layout=ROW_LAYOUT, optimized=False)
                        for meta in q_metas
                    ]
                    plgpu.barrier_wait(q_full.at[wg])

                    def softmax(scores, slot, j, maximum, total, edge: bool):
                        """The block's weights, the new maximum and sum, and what older sums shrink by.

                        `edge`: whether it may be a block that is seen in part.
                        """
                        if config.soft_cap is not None:
                            scores = config.soft_cap * jnp.tanh(scores * (config.scale / config.soft_cap))
                            factor = LOG2_E
                        else:
                            factor = config.scale * LOG2_E

                        def masked(scores):
                            k_info = [
                                plgpu.load(meta_smem.at[i, slot], layout=COLUMN_LAYOUT, optimized=False)
                                for i in range(len(k_metas))
                            ]
                            scores = hide(
                                scores,
                                config,
                                unpack(operands, q_info),
                                unpack(operands, k_info),
                                first_row,
                                j * tile.block_k,
                                keys=ragged,
                            )
                            if k_info:
                                plgpu.commit_smem()  # these reads come before the copy that overwrites the slot
                            return scores

                        if edge:
                            partly = (j < full_lo) | (j >= full_hi)
                            scores = lax.cond(partly, masked, lambda scores: scores, scores)
                        plgpu.barrier_arrive(k_free.at[slot])
                        new = jnp.maximum(maximum, scores.max(axis=1) * factor)
                        weights = jnp.exp2(scores * factor - along_rows(new, shape))
                        shrink = jnp.exp2(maximum - new)
                        return weights, new, total * shrink + weights.sum(axis=1), shrink

                    @pl.when(hi > lo)
                    def _():
                        plgpu.barrier_wait(k_full.at[lax.rem(step, tile.stages)])

                    def first_scores(acc):
                        slot = lax.rem(step, tile.stages)
                        take_turn()
                        product(acc, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
                        pass_turn()
                        return finish(acc)

                    def attend_tile():
                        slot = lax.rem(step, tile.stages)
                        scores = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))
                        start = softmax(scores, slot, lo, row_vector(FLOOR), row_vector(0.0), edges)
                        weights, maximum, total, _ = start
                        weights = weights.astype(dtype)
                        mixed = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)

                        def one_block(edge: bool, j, carry):
                            weights, maximum, total, mixed = carry
                            at = step + (j - lo)
                            slot, last = lax.rem(at, tile.stages), lax.rem(at - 1, tile.stages)
                            plgpu.barrier_wait(k_full.at[slot])
                            plgpu.barrier_wait(v_full.at[last])

                            def overlapped(scores_acc, mixed_acc):
                                begin(mixed_acc, mixed)
                                take_turn()
                                product(scores_acc, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
                                product(mixed_acc, weights, v_smem.at[last])
                                pass_turn()
                                scores = finish(scores_acc, in_flight=1)
                                new_weights, *sums = softmax(scores, slot, j, maximum, total, edge)
                                # The last weights are in use until the product is done: the new ones, rounded, take
                                # their registers.
                                new_weights, new_mixed = lax.optimization_barrier((new_weights, finish(mixed_acc)))
                                return new_weights.astype(dtype), *sums, new_mixed

                            weights, maximum, total, shrink, mixed = pl.run_scoped(
                                overlapped, plgpu.ACC(shape, jnp.float32), plgpu.ACC((ROWS, width), jnp.float32)
                            )
                            plgpu.barrier_arrive(v_free.at[last])
                            return weights, maximum, total, mixed * along_rows(shrink, (ROWS, width))

                        # Where a tile begins with blocks that it sees all of, these have a loop without a branch.
                        unmasked_end = jnp.where(full_lo <= lo, jnp.maximum(full_hi, lo + 1), lo + 1) if edges else hi
                        carry = weights, maximum, total, mixed
                        carry = lax.fori_loop(lo + 1, unmasked_end, functools.partial(one_block, False), carry)
                        if edges:
                            carry = lax.fori_loop(unmasked_end, hi, functools.partial(one_block, True), carry)
                        weights, maximum, total, mixed = carry
                        last = lax.rem(step + (hi - lo) - 1, tile.stages)
                        if own_out:
                            plgpu.barrier_arrive(q_free.at[wg])
                        plgpu.barrier_wait(v_full.at[last])

                        def last_product(acc):
                            begin(acc, mixed)
                            product(acc, weights, v_smem.at[last])
                            return finish(acc)

                        mixed = pl.run_scoped(last_product, plgpu.ACC((ROWS, width), jnp.float32))
                        plgpu.barrier_arrive(v_free.at[last])
                        seen = total > 0.0
                        total = jnp.where(seen, total, 1.0)
                        mixed = mixed * along_rows(jnp.where(seen, 1.0 / total, 0.0), (ROWS, width))
                        lse = jnp.where(seen, (maximum + jnp.log2(total)) * LN_2, -jnp.inf)
                        return mixed, lse

                    def nothing():
                        if own_out:
                            plgpu.barrier_arrive(q_free.at[wg])
                        mixed = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
                        return mixed, row_vector(-jnp.inf)

                    mixed, lse = lax.cond(hi > lo, attend_tile, nothing)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left the buffer
                    out_smem.at[wg][...] = mixed.astype(dtype)
                    plgpu.commit_smem()
                    rows = pl.ds(first_row, ROWS)
                    plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[row, rows, head])
                    lse_ref.at[row, head, rows][...] = lse
                    if not own_out:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        plgpu.barrier_arrive(q_free.at[wg])
                    return step + (hi - lo)

                lax.fori_loop(0, rounds, one_tile, jnp.int32(0))
                pl.when(wg == 0)(take_turn)
                plgpu.wait_smem_to_gmem(0)

        kernel = plgpu.kernel(
            body,
            out_type=(
                jax.ShapeDtypeStruct(q.shape, dtype),
                jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
            ),
            scratch_types=(
                tiled((tile.consumers, ROWS, width), dtype),
                tiled((tile.stages, tile.block_k, width), dtype),
                tiled((tile.stages, tile.block_k, width), dtype),
                tiled((tile.consumers, ROWS, width), dtype) if own_out else None,
                plgpu.SMEM((len(k_meta), tile.stages, tile.block_k), jnp.int32) if k_meta else None,
                plgpu.Barrier(num_barriers=tile.consumers),
                plgpu.Barrier(num_barriers=tile.consumers),
                plgpu.Barrier(num_arrivals=1 + len(k_meta), num_barriers=tile.stages),
                plgpu.Barrier(num_arrivals=tile.consumers, num_barriers=tile.stages),
                plgpu.Barrier(num_barriers=tile.stages),
                plgpu.Barrier(num_arrivals=tile.consumers, num_barriers=tile.stages),
                plgpu.Barrier(num_barriers=tile.consumers),
            ),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            grid=(taken.blocks,),
            grid_names=("block",),
            num_threads=tile.consumers + 1,
            thread_name="wg",
        )
        return kernel(q, k, v, ranges, *q_meta, *k_meta)

    return call


def unpack(operands: Operands, present: list) -> tuple:
    """(segments, positions) from those that are there."""
    given = iter(present)
    segments = next(given) if operands.q_segments is not None else None
    return segments, next(given, None)
