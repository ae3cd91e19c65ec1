"""jax-triton, Ampere and later: tiles begin where groups do, and what is behind a group is neither read nor written."""

import dataclasses
from typing import Any

import jax
import triton
import triton.language as tl

from crescendo.pallas_kernels import tiles
from crescendo.pallas_kernels.grouped_matmul.gradient import Products
from crescendo.pallas_kernels.grouped_matmul.groups import borders, tiles_of
from crescendo.pallas_kernels.op import require_gpu, target_device
from crescendo.pallas_kernels.rows import check
from crescendo.pallas_kernels.triton_call import triton_call

LARGE = (8.0, 9.0, 10.0)  # whose processors have 164 KiB of shared memory or more; others have 99


@dataclasses.dataclass(frozen=True)
class Tile:
    """How results are cut up.

    Attributes:
      rows, columns: of a tile.
      depth: of what is summed over, a step.
      together: rows of tiles that are worked on at a time.
      warps, stages: of a program.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    together: int = 8
    warps: int = 8
    stages: int = 3

    @staticmethod
    def default() -> "Tile":
        """For the target GPU."""
        return Tile(columns=256 if target_device().compute_capability in LARGE else 128)

    def of(self, dtype, rows: int, columns: int, depth: int) -> "Tile":
        """For arrays of these sizes; of a 32-bit type a step has half the depth, and takes the same memory."""
        block = lambda size, most: max(16, min(most, triton.next_power_of_2(size)))  # noqa: E731
        return dataclasses.replace(
            self,
            rows=block(rows, self.rows),
            columns=block(columns, self.columns),
            depth=block(depth, 2 * self.depth // dtype.itemsize),
        )

    def constants(self) -> dict[str, Any]:
        """What both kernels take."""
        return {
            "TILE_ROWS": self.rows,
            "TILE_COLUMNS": self.columns,
            "TILE_DEPTH": self.depth,
            "TOGETHER": self.together,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def grouped_matmul(x, w, sizes):
    """See the op."""
    del sizes
    check(x, w)
    require_gpu(8.0)
    return Products(of_rows, of_groups)


def of_rows(a, w, sizes, transposed: bool):
    """Of the gradient's rule, on one device's arrays."""
    count, depth = a.shape
    columns = w.shape[1] if transposed else w.shape[2]
    key = {"depth": depth, "columns": columns}
    tile = tiles.tuned("grouped_matmul", "triton rows", key, count, Tile.default()).of(a.dtype, count, columns, depth)
    at = borders(sizes, count)
    of_tile = tiles_of(at, count, tile.rows)
    (y,) = triton_call(
        *(a, w, at.end, *of_tile),
        kernel=_rows,
        out_shape=[jax.ShapeDtypeStruct((count, columns), a.dtype)],
        grid=(len(of_tile.group) * triton.cdiv(columns, tile.columns),),
        GROUPS=len(sizes),
        ROWS=count,
        COLUMNS=columns,
        DEPTH=depth,
        TRANSPOSED=transposed,
        EXACT=a.dtype.itemsize > 2,
        **tile.constants(),
    )
    return y


def of_groups(x, dy, sizes):
    """Of the gradient's rule, on one device's arrays."""
    (count, width), columns = x.shape, dy.shape[1]
    key = {"depth": width, "columns": columns}
    tile = tiles.tuned("grouped_matmul", "triton groups", key, count, Tile.default()).of(x.dtype, width, columns, count)
    (dw,) = triton_call(
        *(x, dy, *borders(sizes, count)),
        kernel=_columns,
        out_shape=[jax.ShapeDtypeStruct((len(sizes), width, columns), x.dtype)],
        grid=(len(sizes) * triton.cdiv(width, tile.rows) * triton.cdiv(columns, tile.columns),),
        ROWS=count,
        WIDTH=width,
        COLUMNS=columns,
        EXACT=x.dtype.itemsize > 2,
        **tile.constants(),
    )
    return dw


@triton.jit
def _place(number, rows, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr):
    """The row and the column of a tile, of so many: neighbours share what they read."""
    panel = number // (TOGETHER * COLUMNS)
    height = min(TOGETHER, rows - panel * TOGETHER)
    rest = number - panel * TOGETHER * COLUMNS
    return panel * TOGETHER + rest % height, rest // height


@triton.jit
def _rows(
    a_ptr, w_ptr, end_ptr, group_ptr, first_ptr, behind_ptr, y_ptr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr, EXACT: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    down = tl.load(behind_ptr + GROUPS)
    if tl.program_id(0) >= down * ACROSS:
        return
    i, j = _place(tl.program_id(0), down, ACROSS, TOGETHER)
    group, first = tl.load(group_ptr + i), tl.load(first_ptr + i)
    end = tl.minimum(tl.load(end_ptr + group), ROWS)
    steps = 0  # rows of no group
    if group < GROUPS:
        steps = (DEPTH + TILE_DEPTH - 1) // TILE_DEPTH
    row = first + tl.arange(0, TILE_ROWS)
    column = j * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    depth = tl.arange(0, TILE_DEPTH)
    mine, there = (row < end)[:, None], (column < COLUMNS)[None, :]
    a_at = a_ptr + row.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    w_at = w_ptr + group.to(tl.int64) * DEPTH * COLUMNS
    if TRANSPOSED:
        w_at += column[None, :] * DEPTH + depth[:, None]
    else:
        w_at += column[None, :] + depth[:, None] * COLUMNS
    sums = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for step in range(steps):
        left = DEPTH - step * TILE_DEPTH
        a = tl.load(a_at, mask=mine & (depth < left)[None, :], other=0.0)
        w = tl.load(w_at, mask=there & (depth < left)[:, None], other=0.0)
        sums = tl.dot(a, w, sums, input_precision="ieee" if EXACT else "tf32")
        a_at += TILE_DEPTH
        w_at += TILE_DEPTH if TRANSPOSED else TILE_DEPTH * COLUMNS
    y_at = y_ptr + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(y_at, sums.to(y_ptr.dtype.element_ty), mask=mine & there)


@triton.jit
def _columns(
    x_ptr, dy_ptr, begin_ptr, end_ptr, dw_ptr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr, TILE_DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    HEIGHT: tl.constexpr = (WIDTH + TILE_ROWS - 1) // TILE_ROWS
    BREADTH: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    group = tl.program_id(0) // (HEIGHT * BREADTH)
    i, j = _place(tl.program_id(0) % (HEIGHT * BREADTH), HEIGHT, BREADTH, TOGETHER)
    begin, end = tl.minimum(tl.load(begin_ptr + group), ROWS), tl.minimum(tl.load(end_ptr + group), ROWS)
    row, column = i * TILE_ROWS + tl.arange(0, TILE_ROWS), j * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    there, depth = (column < COLUMNS)[None, :], begin + tl.arange(0, TILE_DEPTH)
    x_at = x_ptr + row[:, None] + depth.to(tl.int64)[None, :] * WIDTH
    dy_at = dy_ptr + column[None, :] + depth.to(tl.int64)[:, None] * COLUMNS
    sums = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for first in range(begin, end, TILE_DEPTH):
        mine = depth < end + begin - first
        x = tl.load(x_at, mask=(row < WIDTH)[:, None] & mine[None, :], other=0.0)
        dy = tl.load(dy_at, mask=there & mine[:, None], other=0.0)
        sums = tl.dot(x, dy, sums, input_precision="ieee" if EXACT else "tf32")
        x_at += TILE_DEPTH * WIDTH
        dy_at += TILE_DEPTH * COLUMNS
    dw_at = dw_ptr + (group * WIDTH + row).to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(dw_at, sums.to(dw_ptr.dtype.element_ty), mask=(row < WIDTH)[:, None] & there)
