"""For CPUs: in a loop, tiles that begin where groups do, each multiplied by the matrix of its group.

XLA's ragged products multiply every row by every matrix there. A tile is stored whole: what it has of the next group's
rows is written over by the tiles behind it, and what lies behind the last group is set to 0 at the end.
"""

import jax.numpy as jnp
from jax import lax

from crescendo.pallas_kernels.grouped_matmul.gradient import Products
from crescendo.pallas_kernels.grouped_matmul.groups import borders, tiles_of
from crescendo.pallas_kernels.op import leave_to_others, target_device
from crescendo.pallas_kernels.sharded import results_of

LEAST, MOST = 8, 256  # rows of a tile


def grouped_matmul(**_):
    """See the op."""
    if target_device().platform != "cpu":
        leave_to_others("its tiles follow one another: on accelerators XLA's ragged products are there")
    return KERNELS


def of_rows(a, w, sizes, transposed):
    """Of the gradient's rule."""
    count, rows, over = len(a), _rows_of_tile(len(a), len(w)), ((1,), (1 if transposed else 0,))
    given = _with_room(a, rows)

    def visit(tile, y):
        group, first, _ = tile
        product = _product(lax.dynamic_slice_in_dim(given, first, rows), w[group], over)
        return lax.dynamic_update_slice_in_dim(y, product.astype(a.dtype), first, axis=0)

    y = jnp.zeros((len(given), w.shape[1 if transposed else 2]), a.dtype)
    y = _each_tile(sizes, count, rows, visit, results_of((a, w, sizes), y))[:count]
    return jnp.where(jnp.arange(count)[:, None] < jnp.sum(sizes), y, 0)


def of_groups(x, dy, sizes):
    """Of the gradient's rule."""
    count, rows = len(x), _rows_of_tile(len(x), len(sizes))
    given = _with_room(x, rows), _with_room(dy, rows)

    def visit(tile, dw):
        group, first, end = tile
        mine = (first + jnp.arange(rows) < end)[:, None]
        a, b = (jnp.where(mine, lax.dynamic_slice_in_dim(array, first, rows), 0) for array in given)
        return dw.at[group].add(_product(a, b, ((0,), (0,))))

    dw = jnp.zeros((len(sizes), x.shape[1], dy.shape[1]), jnp.promote_types(x.dtype, jnp.float32))
    return _each_tile(sizes, count, rows, visit, results_of((x, dy, sizes), dw)).astype(x.dtype)


def _rows_of_tile(count: int, experts: int) -> int:
    """About half a group's, so that little is multiplied that is then written over."""
    return min(max(count // (2 * experts), LEAST), MOST)


def _with_room(array, rows: int):
    """With a tile of zeros behind, where the last tile may end."""
    return jnp.pad(array, ((0, rows), (0, 0)))


def _product(a, b, over):
    return lax.dot_general(a, b, (over, ((), ())), preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _each_tile(sizes, count: int, rows: int, visit, result):
    """`result` after `visit((group, first row, the group's end), result)` of each tile, in the order of the rows."""
    at = borders(sizes, count)
    tiles = tiles_of(at, count, rows)

    def one(n, result):
        group = tiles.group[n]
        return visit((group, tiles.first[n], at.end[group]), result)

    # What is behind the groups has tiles too, the last ones.
    return lax.fori_loop(0, tiles.behind[len(sizes) - 1], one, result)


KERNELS = Products(of_rows, of_groups, split_by_xla=True)
