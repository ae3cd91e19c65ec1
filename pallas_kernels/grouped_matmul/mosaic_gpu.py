"""Pallas for Hopper: tiles begin where groups do, at most 7 rows before, and a tile has rows of one group alone.

So each tile of `a_i w_e` is one product. What rows of other groups give is not stored: whole squares of a warpgroup
leave in one copy, those at a border in copies of 32, 16, 8, 4, 2 and 1 rows. A warpgroup whose rows aren't the group's
sits the tile out. Rows of no group are a group without products, and get zeros. A consumer keeps a tile's sums in
registers, rounded, and they leave piece by piece beside the first products of its next tile.

In the gradient of w it is the sum that runs over a group's rows, block by block; rows of a block that aren't the
group's are set to 0 in shared memory. The largest groups come first, and what is small fills the gaps behind them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels import rows, tiles
from crescendo.pallas_kernels.grouped_matmul.gradient import Products
from crescendo.pallas_kernels.grouped_matmul.groups import borders, by_size, tiles_of
from crescendo.pallas_kernels.hopper.block import launch
from crescendo.pallas_kernels.hopper.claims import Claims
from crescendo.pallas_kernels.hopper.memory import ROWS, tiled
from crescendo.pallas_kernels.hopper.products import ROW_LAYOUT, along_rows, finish, opaque, product
from crescendo.pallas_kernels.hopper.ring import Part, Ring
from crescendo.pallas_kernels.op import Unsupported, require_gpu, target_device
from crescendo.pallas_kernels.sharded import plain, results_of

CONSUMERS, DEPTH = 2, 64  # of a block of threads; of what is summed over, a step
TILE_ROWS = CONSUMERS * ROWS
ALIGNED = 8  # rows that the copy engine takes a block from, as blocks lie in shared memory


@dataclasses.dataclass(frozen=True)
class Tile:
    """How results are cut up.

    Attributes:
      columns: of a tile; if they don't divide the result's, the most that do.
      stages: slots of the ring.
      together: rows of tiles that are worked on at a time.
      leaving: columns that a consumer writes at a time; they are on their way while it goes on.
    """

    columns: int = 256
    stages: int = 4
    together: int = 8
    leaving: int = 64

    def of(self, columns: int) -> "Tile":
        """For a result of so many columns."""
        most = max(n for n in range(64, self.columns + 1, 64) if columns % n == 0)
        return dataclasses.replace(self, columns=most, leaving=math.gcd(most, self.leaving))

    def ring(self, dtype, kernel: str) -> Ring:
        """What is multiplied, for one of the three kernels."""
        a = (DEPTH, TILE_ROWS) if kernel == "groups" else (TILE_ROWS, DEPTH)
        b = (self.columns, DEPTH) if kernel == "transposed rows" else (DEPTH, self.columns)
        parts = {"a": Part(a, dtype, tiled=True), "b": Part(b, dtype, tiled=True)}
        return Ring(parts, stages=self.stages, consumers=CONSUMERS)

    def scratch(self, dtype, kernel: str) -> tuple:
        """The ring, where consumers leave sums, and the claims."""
        leaving = (CONSUMERS, ROWS, self.leaving)
        exit_ref = tiled(leaving, dtype)
        if kernel != "groups":
            # In one place: whole squares, and rows of a border, which the copy engine takes one by one as they lie.
            exit_ref = plgpu.RefUnion(exit_ref, plgpu.SMEM(leaving, dtype))
        return self.ring(dtype, kernel).scratch(), exit_ref, claims_of(0).scratch()


DEFAULTS = {kernel: Tile() for kernel in ("rows", "transposed rows", "groups")}


def tile_of(kernel: str, depth: int, columns: int, count: int) -> Tile:
    """The measured tile, or the default."""
    return tiles.tuned("grouped_matmul", kernel, key(depth, columns), count, DEFAULTS[kernel])


def grouped_matmul(x, w, sizes):
    """See the op."""
    del sizes
    require_gpu(9.0, below=10.0)
    rows.check(x, w, dtypes=(jnp.bfloat16, jnp.float16))
    if x.shape[1] % DEPTH or w.shape[2] % DEPTH:
        raise Unsupported(f"needs D = {x.shape[1]} and F = {w.shape[2]} to be multiples of {DEPTH}")
    return Products(of_rows, of_groups)


def key(depth: int, columns: int) -> dict:
    """Calls that share a tile."""
    return {"depth": depth, "columns": columns}


def claims_of(count: int) -> Claims:
    """By as many blocks as there are multiprocessors, or tiles."""
    return Claims(min(target_device().cores, count), CONSUMERS)


def _padded(array, multiple: int, least: int = 0):
    """With rows of zeros up to a multiple, and at least so many."""
    count = max(-(-array.shape[0] // multiple) * multiple, least)
    return jnp.pad(array, ((0, count - array.shape[0]), (0, 0)))


def _aligned(row):
    return lax.div(row, ALIGNED) * ALIGNED


def _keep(ref, lo, hi) -> None:
    """Sets rows of shared memory that aren't in `[lo, hi)` to 0, whatever is in them."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW_LAYOUT)
    mine = along_rows((row >= lo) & (row < hi), (ROWS, DEPTH))
    value = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
    ref[...] = jnp.where(mine, value, jnp.zeros_like(value))
    plgpu.commit_smem()


def _begin(columns: int, dtype, numbers: int):
    """A consumer's state before its first tile: its steps so far, and what it has to leave, sums and where: nothing."""
    sums = plgpu.layout_cast(jnp.zeros((ROWS, columns), dtype), plgpu.Layout.WGMMA)
    return jnp.int32(0), (sums, jnp.bool_(False), (jnp.int32(0),) * numbers)


def _sums(slots, step, steps, product_of: Callable, leave: Callable, tile: Tile, dtype):
    """A tile's sums: `product_of(sums, k)` in each of its steps, and beside those of the first ones `leave(piece)`."""
    pieces = range(tile.columns // tile.leaving)

    def multiply(sums):
        @pl.loop(0, steps)
        def _(k):
            slots.wait(slots.slot(step + k))
            product_of(sums, k)
            for i in pieces:
                pl.when(k == i)(functools.partial(leave, i))
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: slots.free(slots.slot(step + k - 1)))

        total = finish(sums)
        pl.when(steps > 0)(lambda: slots.free(slots.slot(step + steps - 1)))
        return total

    sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, tile.columns), jnp.float32)).astype(dtype)
    for i in pieces:
        pl.when(steps <= i)(functools.partial(leave, i))
    return sums


def _leave(sums, i: int, exit_ref, column, copy: Callable) -> None:
    """Writes a piece of a consumer's sums by way of shared memory; `copy(columns of the result)` begins its copies."""
    width = exit_ref.shape[1]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was there has left
    exit_ref[...] = sums[:, i * width : (i + 1) * width]
    plgpu.commit_smem()
    copy(pl.ds(pl.multiple_of(column + i * width, width), width))


def _end(leave: Callable, pieces: int) -> None:
    """After a consumer's last tile."""
    for i in range(pieces):
        leave(i)
    plgpu.wait_smem_to_gmem(0)


def of_rows(a, w, sizes, transposed: bool, tile: Tile | None = None):
    """Of the gradient's rule, on one device's arrays."""
    count, depth = a.shape
    columns = w.shape[1] if transposed else w.shape[2]
    kernel = "transposed rows" if transposed else "rows"
    tile = (tile or tile_of(kernel, depth, columns, count)).of(columns)
    ring, across = tile.ring(a.dtype, kernel), columns // tile.columns
    given = _padded(a, ALIGNED, TILE_ROWS)
    last, at, groups = given.shape[0] - TILE_ROWS, borders(sizes, count), len(sizes)
    of_tile = tiles_of(at, count, TILE_ROWS, ALIGNED)
    claims = claims_of(len(of_tile.group) * across)

    def grouped_rows(a_ref, w_ref, begin_ref, end_ref, group_ref, first_ref, behind_ref, y_ref, *scratch):
        ring_refs, (whole_ref, some_ref), claim_refs = scratch
        slots, down = ring.of(ring_refs), behind_ref[groups]
        pieces = tile.columns // tile.leaving

        def columns_from(column):
            return pl.ds(pl.multiple_of(column, tile.columns), tile.columns)

        def place(n):
            """A tile's group, its first row, where the group begins and ends from there, and its first column."""
            i, j = _panels(n, down, across, tile.together)
            own, row = group_ref[i], jnp.minimum(first_ref[i], last)
            # Of a tile that is moved up to end with the array, what is before its place is another tile's.
            lo, hi = jnp.maximum(begin_ref[own], first_ref[i]), jnp.minimum(end_ref[own], count)
            return own, row, lo - row, hi - row, j * tile.columns

        def load(at, step):
            own, row, _, _, column = at
            steps, of_columns = jnp.where(own < groups, depth // DEPTH, 0), columns_from(column)
            of_a = pl.ds(pl.multiple_of(row, ALIGNED), TILE_ROWS)

            @pl.loop(0, steps)
            def _fill(k):
                of_depth = pl.ds(k * DEPTH, DEPTH)
                of_w = (own, of_columns, of_depth) if transposed else (own, of_depth, of_columns)
                slots.fill(step + k, a=a_ref.at[of_a, of_depth], b=w_ref.at[of_w])

            return step + steps

        def leave(consumer, left, i):
            """A piece of sums; of rows that aren't the group's, nothing."""
            sums, there, where = left
            row, lo, hi, column = (opaque(n) for n in where)
            whole, some_rows = (lo <= 0) & (hi >= ROWS), y_ref.at[pl.ds(pl.multiple_of(row, ALIGNED), ROWS)]

            @pl.when(whole)
            def _whole():
                piece_ref = whole_ref.at[consumer]
                copy = lambda columns: plgpu.copy_smem_to_gmem(piece_ref, some_rows.at[:, columns])  # noqa: E731
                _leave(sums, i, piece_ref, column, copy)

            @pl.when(there & ~whole)
            def _some():
                piece_ref = some_ref.at[consumer]
                copy = lambda columns: _copy_rows(piece_ref, y_ref.at[:, columns], row, lo, hi)  # noqa: E731
                _leave(sums, i, piece_ref, column, copy)

        def compute(consumer, at, state):
            (own, row, lo, hi, column), (step, left) = at, state
            lo, hi, row = lo - consumer * ROWS, hi - consumer * ROWS, row + consumer * ROWS
            some = (hi > 0) & (lo < ROWS)
            steps = jnp.where(own < groups, depth // DEPTH, 0)
            busy = jnp.where(some, steps, 0)

            def product_of(sums, k):
                slot = slots.slot(step + k)
                b = slots["b"].at[slot]
                product(sums, slots["a"].at[slot, pl.ds(consumer * ROWS, ROWS)], b.T if transposed else b)

            sums = _sums(slots, step, busy, product_of, functools.partial(leave, consumer, left), tile, a.dtype)

            @pl.loop(busy, steps)
            def _sit_out(k):
                slots.wait(slots.slot(step + k))
                slots.free(slots.slot(step + k))

            return step + steps, (sums, some, (row, lo, hi, column))

        claims.warpgroups(
            claim_refs,
            down * across,
            place=place,
            load=load,
            begin=lambda: _begin(tile.columns, a.dtype, numbers=4),
            compute=compute,
            drain=slots.drain,
            end=lambda consumer, state: _end(functools.partial(leave, consumer, state[1]), pieces),
        )

    out = jax.ShapeDtypeStruct((given.shape[0], columns), a.dtype)
    scratch = tile.scratch(a.dtype, kernel)
    run = launch(grouped_rows, consumers=CONSUMERS, blocks=claims.blocks, scratch=scratch, out_type=out)
    return results_of((a, w), run(given, w, *at, *of_tile))[:count]


def _panels(n, down, across: int, together: int):
    """The row and the column of a tile: so many rows of tiles at a time, column by column."""
    panel = lax.div(n, together * across)
    height = jnp.minimum(together, down - panel * together)
    rest = n - panel * together * across
    return panel * together + lax.rem(rest, height), lax.div(rest, height)


def _copy_rows(piece_ref, rows_ref, row, lo, hi) -> None:
    """Begins copies of the rows `[lo, hi)` of a piece, the first of which is `row`, to their places in the result."""
    lo, hi = jnp.maximum(lo, 0), jnp.minimum(hi, ROWS)
    for size in (32, 16, 8, 4, 2, 1):
        some = ((hi - lo) & size) > 0

        @pl.when(some)
        def _(lo=lo, size=size):
            plgpu.copy_smem_to_gmem(piece_ref.at[pl.ds(lo, size)], rows_ref.at[pl.ds(row + lo, size)])

        # The largest first.
        lo += jnp.where(some, size, 0)


def of_groups(x, dy, sizes, tile: Tile | None = None):
    """Of the gradient's rule, on one device's arrays."""
    (count, width), columns = x.shape, dy.shape[1]
    tile = (tile or tile_of("groups", width, columns, count)).of(columns)
    ring = tile.ring(x.dtype, "groups")
    given = _padded(x, ALIGNED, DEPTH), _padded(dy, ALIGNED, DEPTH)
    most = given[0].shape[0] - DEPTH
    grid = pl.cdiv(width, TILE_ROWS), columns // tile.columns
    tiles_of_group, groups = grid[0] * grid[1], len(sizes)
    total = groups * tiles_of_group
    claims = claims_of(total)

    def grouped_columns(x_ref, dy_ref, begin_ref, end_ref, order_ref, dw_ref, *scratch):
        ring_refs, exit_ref, claim_refs = scratch
        slots = ring.of(ring_refs)
        pieces = tile.columns // tile.leaving

        def place(n):
            """A tile's group, where that begins and ends, the tile's first row and column, and the blocks it takes."""
            turn = lax.div(n, tiles_of_group)
            i, j = plgpu.planar_snake(n - turn * tiles_of_group, grid, minor_dim=0, tile_width=tile.together)
            group = plain(order_ref[turn])
            begin, end = jnp.minimum(begin_ref[group], count), jnp.minimum(end_ref[group], count)
            steps = lax.div(end - _aligned(begin) + DEPTH - 1, DEPTH)
            return group, begin, end, i * TILE_ROWS, j * tile.columns, jnp.where(end > begin, steps, 0)

        def of_tile(row, column):
            """Its rows and columns in the result."""
            of_x, of_dy = pl.multiple_of(row, TILE_ROWS), pl.multiple_of(column, tile.columns)
            return pl.ds(of_x, TILE_ROWS), pl.ds(of_dy, tile.columns)

        def block(begin, k):
            """The first row of a group's k-th block, and where it lies: the last one of all ends with the array."""
            first = _aligned(begin) + k * DEPTH
            return first, pl.multiple_of(jnp.minimum(first, most), ALIGNED)

        def load(at, step):
            _, begin, _, row, column, steps = at
            of_x, of_dy = of_tile(row, column)

            @pl.loop(0, steps)
            def _fill(k):
                depth = pl.ds(block(begin, k)[1], DEPTH)
                slots.fill(step + k, a=x_ref.at[depth, of_x], b=dy_ref.at[depth, of_dy])

            return step + steps

        def leave(consumer, left, i):
            """A piece of sums."""
            sums, there, (group, row, column) = left
            piece_ref, rows_ref = exit_ref.at[consumer], dw_ref.at[group, pl.ds(pl.multiple_of(row, ROWS), ROWS)]
            copy = lambda columns: plgpu.copy_smem_to_gmem(piece_ref, rows_ref.at[:, columns])  # noqa: E731
            pl.when(there)(lambda: _leave(sums, i, piece_ref, column, copy))

        def compute(consumer, at, state):
            (group, begin, end, row, column, steps), (step, left) = at, state
            mine = pl.ds(consumer * ROWS, ROWS)

            def product_of(sums, k):
                slot, (first, lies) = slots.slot(step + k), block(begin, k)
                a, border = slots["a"].at[slot, :, mine], (first < begin) | (first + DEPTH > end)
                pl.when(border)(lambda: _keep(a, jnp.maximum(first, begin) - lies, end - lies))
                product(sums, a.transpose((1, 0)), slots["b"].at[slot])

            sums = _sums(slots, step, steps, product_of, functools.partial(leave, consumer, left), tile, x.dtype)
            return step + steps, (sums, jnp.bool_(True), (group, row + consumer * ROWS, column))

        claims.warpgroups(
            claim_refs,
            total,
            place=place,
            load=load,
            begin=lambda: _begin(tile.columns, x.dtype, numbers=3),
            compute=compute,
            drain=slots.drain,
            end=lambda consumer, state: _end(functools.partial(leave, consumer, state[1]), pieces),
        )

    out = jax.ShapeDtypeStruct((groups, width, columns), x.dtype)
    scratch = tile.scratch(x.dtype, "groups")
    run = launch(grouped_columns, consumers=CONSUMERS, blocks=claims.blocks, scratch=scratch, out_type=out)
    return results_of((x, dy), run(*given, *borders(sizes, count), by_size(sizes)))
