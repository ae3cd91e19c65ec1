"""Where groups lie, and the tiles that they are cut into, computed from their traced sizes."""

import jax.numpy as jnp


def borders(sizes, rows: int):
    """Where each group begins, and where the last one ends, at most `rows`: int32 `[E + 1]`.

    >>> borders(jnp.array([3, 0, 4]), 6).tolist()
    [0, 3, 3, 6]
    """
    ends = jnp.arange(len(sizes) + 1)[:, None]
    # One reduction, where a cumulative sum would be several small kernels.
    return jnp.minimum(jnp.sum(jnp.where(jnp.arange(len(sizes)) < ends, sizes, 0), axis=1), rows).astype(jnp.int32)


def touched(at, tiles: int, rows: int):
    """The first and the last group with rows in each of so many tiles in fixed places; none where first > last.

    Args:
      at: `borders`.
      tiles: how many.
      rows: of a tile.

    >>> [found.tolist() for found in touched(borders(jnp.array([3, 0, 4]), 7), 3, 4)]
    [[0, 2, 3], [2, 2, 2]]
    """
    begin = jnp.arange(tiles, dtype=jnp.int32)[:, None] * rows
    first = jnp.sum(at[1:] <= begin, axis=1, dtype=jnp.int32)
    last = jnp.sum(at[1:-1] < jnp.minimum(begin + rows, at[-1]), axis=1, dtype=jnp.int32)
    return first, last


def by_size(sizes):
    """The numbers of the groups, the largest first.

    >>> by_size(jnp.array([3, 0, 4, 3])).tolist()
    [2, 0, 3, 1]
    """
    n = jnp.arange(len(sizes), dtype=jnp.int32)
    ahead = (sizes > sizes[:, None]) | ((sizes == sizes[:, None]) & (n < n[:, None]))
    return jnp.sum(jnp.where(jnp.sum(ahead, axis=1) == n[:, None], n, 0), axis=1, dtype=jnp.int32)


def tiles_of_groups(at, rows: int, tile: int):
    """The group and the first row of each tile, where tiles begin where groups do; rows behind the last are a group.

    Args:
      at: `borders`.
      rows: of the array.
      tile: rows of a tile.

    Returns:
      int32 `[rows // tile + E + 1]` twice: as many as there can be. A tile that isn't there begins at its group's end.

    >>> groups, first = tiles_of_groups(borders(jnp.array([3, 0, 1]), 6), 6, 2)
    >>> groups.tolist(), first.tolist()
    ([0, 0, 2, 3, 3, 3, 3], [0, 2, 3, 4, 6, 6, 6])
    """
    ends = jnp.append(at[1:], rows).astype(jnp.int32)
    counts = (ends - at + tile - 1) // tile
    n = jnp.arange(len(counts))
    before = jnp.sum(jnp.where(n < n[:, None], counts, 0), axis=1)
    number = jnp.arange(rows // tile + len(counts), dtype=jnp.int32)
    group = jnp.sum(number[:, None] >= (before + counts)[:-1], axis=1, dtype=jnp.int32)
    return group, jnp.minimum(at[group] + (number - before[group]) * tile, ends[group]).astype(jnp.int32)
