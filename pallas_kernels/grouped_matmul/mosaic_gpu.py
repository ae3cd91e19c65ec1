"""Pallas for Hopper: tiles of rows in fixed places, each multiplied by the matrix of every group that it touches.

Where a border of groups runs through a tile of `a_i w_e`, the tile is visited once for each group, with the other
groups' rows set to 0 in shared memory, and all visits add to the same sums: so a tile is stored whole, once, and rows
of no group get zeros. A warpgroup without a row in the group sits the visit out.

In the gradient of w it is the sum that runs over a group's rows. They come in blocks that begin at most 7 rows before
the group does, and rows of a block that aren't the group's are set to 0. The largest groups come first, and what is
small fills the gaps behind them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels import rows, tiles
from crescendo.pallas_kernels.grouped_matmul.gradient import Products
from crescendo.pallas_kernels.grouped_matmul.groups import borders, by_size, touched
from crescendo.pallas_kernels.hopper.block import launch
from crescendo.pallas_kernels.hopper.claims import Claims
from crescendo.pallas_kernels.hopper.memory import ROWS, tiled
from crescendo.pallas_kernels.hopper.products import ROW_LAYOUT, along_rows, finish, product
from crescendo.pallas_kernels.hopper.ring import Part, Ring, Slots
from crescendo.pallas_kernels.op import Unsupported, require_gpu, target_device
from crescendo.pallas_kernels.sharded import results_of

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
      leaving: columns that a consumer writes at a time.
    """

    columns: int = 256
    stages: int = 3
    together: int = 8
    leaving: int = 64

    def of(self, columns: int) -> "Tile":
        """For a result of so many columns."""
        return dataclasses.replace(self, columns=max(n for n in range(64, self.columns + 1, 64) if columns % n == 0))

    def ring(self, dtype, a: tuple[int, int], b: tuple[int, int]) -> Ring:
        """Of parts of these shapes."""
        parts = {"a": Part(a, dtype, tiled=True), "b": Part(b, dtype, tiled=True)}
        return Ring(parts, stages=self.stages, consumers=CONSUMERS)

    def exit(self, dtype):
        """Where each consumer leaves its part of a tile, a piece at a time; two are on their way."""
        return tiled((CONSUMERS, 2, ROWS, self.leaving), dtype)


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


def _padded(array, multiple: int):
    return jnp.pad(array, ((0, -array.shape[0] % multiple), (0, 0)))


def _keep(ref, lo, hi) -> None:
    """Sets rows of shared memory that aren't in `[lo, hi)` to 0, whatever is in them."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW_LAYOUT)
    mine = along_rows((row >= lo) & (row < hi), (ROWS, DEPTH))
    value = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
    ref[...] = jnp.where(mine, value, jnp.zeros_like(value))
    plgpu.commit_smem()


def _leave(sums, exit_ref, place) -> None:
    """Writes a consumer's sums, piece by piece, to `place(columns)`."""
    width = exit_ref.shape[-1]
    pieces = sums.shape[1] // width
    for i in range(pieces):
        columns, slot = pl.ds(i * width, width), exit_ref.at[i % 2]
        # The last piece of the tile before was in the other slot, unless they are odd.
        plgpu.wait_smem_to_gmem(0 if i == 0 and pieces % 2 else 1, wait_read_only=True)
        slot[...] = sums[:, i * width : (i + 1) * width].astype(slot.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, place(columns))


def of_rows(a, w, sizes, transposed: bool, tile: Tile | None = None):
    """Of the gradient's rule, on one device's arrays."""
    count, depth = a.shape
    columns = w.shape[1] if transposed else w.shape[2]
    tile = (tile or tiles.tuned("grouped_matmul", "rows", key(depth, columns), count, Tile())).of(columns)
    of_w = (tile.columns, DEPTH) if transposed else (DEPTH, tile.columns)
    ring, steps = tile.ring(a.dtype, (TILE_ROWS, DEPTH), of_w), depth // DEPTH
    given, ends = _padded(a, TILE_ROWS), borders(sizes, count)
    grid = given.shape[0] // TILE_ROWS, columns // tile.columns
    first, last = touched(ends, grid[0], TILE_ROWS)
    claims = Claims(grid[0] * grid[1], min(target_device().cores, grid[0] * grid[1]), CONSUMERS)

    def grouped_rows(a_ref, w_ref, ends_ref, first_ref, last_ref, y_ref, ring_refs, exit_ref, claim_refs):
        slots = ring.of(ring_refs)

        def place(n):
            i, j = plgpu.planar_snake(n, grid, minor_dim=0, tile_width=tile.together)
            return i, i * TILE_ROWS, pl.ds(j * tile.columns, tile.columns)

        def visits(i, row, visit, step):
            """`visit(group, lo, hi, steps, step)`, with rows from the tile's first one, for each group of a tile."""

            def one(group, step):
                lo, hi = ends_ref[group] - row, ends_ref[group + 1] - row
                here = jnp.where(hi > jnp.maximum(lo, 0), steps, 0)
                visit(group, lo, hi, here, step)
                return step + here

            return lax.fori_loop(first_ref[i], last_ref[i] + 1, one, step)

        def load(n, step):
            i, row, of_columns = place(n)

            def visit(group, lo, hi, here, step):
                del lo, hi

                @pl.loop(0, here)
                def _(k):
                    of_depth = pl.ds(k * DEPTH, DEPTH)
                    of_w = (group, of_columns, of_depth) if transposed else (group, of_depth, of_columns)
                    slots.fill(step + k, a=a_ref.at[pl.ds(row, TILE_ROWS), of_depth], b=w_ref.at[of_w])

            return visits(i, row, visit, step)

        def compute(consumer, n, step):
            (i, row, of_columns), mine = place(n), pl.ds(consumer * ROWS, ROWS)

            def visit(sums, group, lo, hi, here, step):
                del group
                lo, hi = lo - consumer * ROWS, hi - consumer * ROWS
                whole, none = (lo <= 0) & (hi >= ROWS), (hi <= 0) | (lo >= ROWS)
                _multiply(slots, sums, step, jnp.where(whole, here, 0), mine, transposed)
                _multiply(slots, sums, step, jnp.where(whole | none, 0, here), mine, transposed, (lo, hi))

                @pl.loop(0, jnp.where(none, here, 0))
                def _(k):
                    slots.wait(slots.slot(step + k))
                    slots.free(slots.slot(step + k))

            def multiply(sums):
                end = visits(i, row, functools.partial(visit, sums), step)
                return finish(sums), end

            sums, step = pl.run_scoped(multiply, plgpu.ACC((ROWS, tile.columns), jnp.float32))
            place_of = lambda columns: y_ref.at[pl.ds(row, TILE_ROWS), of_columns].at[mine, columns]  # noqa: E731
            _leave(sums, exit_ref.at[consumer], place_of)
            return step

        end = lambda _: plgpu.wait_smem_to_gmem(0)  # noqa: E731
        claims.warpgroups(claim_refs, load=load, compute=compute, drain=slots.drain, end=end)

    out = jax.ShapeDtypeStruct((given.shape[0], columns), a.dtype)
    scratch = ring.scratch(), tile.exit(a.dtype), claims.scratch()
    kernel = launch(grouped_rows, consumers=CONSUMERS, blocks=claims.blocks, scratch=scratch, out_type=out)
    return results_of((a, w), kernel(given, w, ends, first, last))[:count]


def _multiply(slots: Slots, sums, step, steps, mine, transposed: bool, kept=None) -> None:
    """Adds the products of a visit's steps; of `a` only the rows from the first to the second number in `kept`."""

    @pl.loop(0, steps)
    def _(k):
        slot = slots.slot(step + k)
        slots.wait(slot)
        a, b = slots["a"].at[slot, mine], slots["b"].at[slot]
        if kept is not None:
            _keep(a, *kept)
        product(sums, a, b.transpose((1, 0)) if transposed else b)
        plgpu.wgmma_wait(1)
        pl.when(k > 0)(lambda: slots.free(slots.slot(step + k - 1)))

    @pl.when(steps > 0)
    def _():
        plgpu.wgmma_wait(0)
        slots.free(slots.slot(step + steps - 1))


def of_groups(x, dy, sizes, tile: Tile | None = None):
    """Of the gradient's rule, on one device's arrays."""
    (count, width), columns = x.shape, dy.shape[1]
    tile = (tile or tiles.tuned("grouped_matmul", "groups", key(width, columns), count, Tile())).of(columns)
    ring = tile.ring(x.dtype, (DEPTH, TILE_ROWS), (DEPTH, tile.columns))
    given = _padded(x, DEPTH), _padded(dy, DEPTH)
    ends, most = borders(sizes, count), given[0].shape[0] - DEPTH
    grid = pl.cdiv(width, TILE_ROWS), columns // tile.columns
    tiles_of_group, groups = grid[0] * grid[1], len(sizes)
    total = groups * tiles_of_group
    claims = Claims(total, min(target_device().cores, total), CONSUMERS)

    def grouped_columns(x_ref, dy_ref, ends_ref, order_ref, dw_ref, ring_refs, exit_ref, claim_refs):
        slots = ring.of(ring_refs)

        def place(n):
            turn = lax.div(n, tiles_of_group)
            i, j = plgpu.planar_snake(n - turn * tiles_of_group, grid, minor_dim=0, tile_width=tile.together)
            return order_ref[turn], pl.ds(i * TILE_ROWS, TILE_ROWS), pl.ds(j * tile.columns, tile.columns)

        def depths(group):
            """Where the group begins and ends, and its blocks: how many, and `row(k)`, where one begins."""
            begin, end = ends_ref[group], ends_ref[group + 1]
            start = lax.div(begin, ALIGNED) * ALIGNED
            steps = jnp.where(end > begin, lax.div(end - start + DEPTH - 1, DEPTH), 0)
            return begin, end, steps, lambda k: start + k * DEPTH

        def at(row):
            """Where a block lies: the last one of all ends with the array."""
            return pl.multiple_of(jnp.minimum(row, most), ALIGNED)

        def load(n, step):
            group, of_x, of_dy = place(n)
            _, _, steps, row = depths(group)

            @pl.loop(0, steps)
            def _(k):
                depth = pl.ds(at(row(k)), DEPTH)
                slots.fill(step + k, a=x_ref.at[depth, of_x], b=dy_ref.at[depth, of_dy])

            return step + steps

        def compute(consumer, n, step):
            (group, of_x, of_dy), mine = place(n), pl.ds(consumer * ROWS, ROWS)
            begin, end, steps, row = depths(group)

            def multiply(sums):
                @pl.loop(0, steps)
                def _(k):
                    slot, first = slots.slot(step + k), row(k)
                    slots.wait(slot)
                    a, border = slots["a"].at[slot, :, mine], (first < begin) | (first + DEPTH > end)
                    pl.when(border)(lambda: _keep(a, jnp.maximum(first, begin) - at(first), end - at(first)))
                    product(sums, a.transpose((1, 0)), slots["b"].at[slot])
                    plgpu.wgmma_wait(1)
                    pl.when(k > 0)(lambda: slots.free(slots.slot(step + k - 1)))

                total = finish(sums)
                pl.when(steps > 0)(lambda: slots.free(slots.slot(step + steps - 1)))
                return total

            sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, tile.columns), jnp.float32))
            place_of = lambda columns: dw_ref.at[group, of_x, of_dy].at[mine, columns]  # noqa: E731
            _leave(sums, exit_ref.at[consumer], place_of)
            return step + steps

        end = lambda _: plgpu.wait_smem_to_gmem(0)  # noqa: E731
        claims.warpgroups(claim_refs, load=load, compute=compute, drain=slots.drain, end=end)

    out = jax.ShapeDtypeStruct((groups, width, columns), x.dtype)
    scratch = ring.scratch(), tile.exit(x.dtype), claims.scratch()
    kernel = launch(grouped_columns, consumers=CONSUMERS, blocks=claims.blocks, scratch=scratch, out_type=out)
    return results_of((x, dy), kernel(*given, ends, by_size(sizes)))
