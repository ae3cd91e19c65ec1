"""Where groups lie, and the tiles that they are cut into, computed from their traced sizes.

Three sums, each a kernel of XLA's, whose operands are computed as they are read: that is most of what they cost.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Borders(NamedTuple):
    """Where groups begin and end: int32 `[E + 1]` each; rows behind the groups are the last one.

    Where sizes are more than there are rows, they go on behind the array's end.
    """

    begin: jax.Array
    end: jax.Array


def borders(sizes, rows: int) -> Borders:
    """Of groups of these sizes in so many rows.

    >>> begin, end = borders(jnp.array([3, 0, 2]), 6)
    >>> begin.tolist(), end.tolist()
    ([0, 3, 3, 5], [3, 3, 5, 6])
    """
    group, other = jnp.arange(len(sizes) + 1)[:, None], jnp.arange(len(sizes))
    # The last end as a sum too, so that all are one kernel.
    behind = (group == len(sizes)) & (other == 0)
    of_end = jnp.where(behind, rows, jnp.where((other <= group) & (group < len(sizes)), sizes, 0))
    begin = jnp.sum(jnp.where(other < group, sizes, 0), axis=1, dtype=jnp.int32)
    return Borders(begin, jnp.sum(of_end, axis=1, dtype=jnp.int32))


class Tiles(NamedTuple):
    """What tiles are of: arrays as long as there can be tiles.

    Attributes:
      group: int32; the last one of `Borders` too.
      first: int32, the first row.
      behind: int32 `[E + 1]`, the tiles of all groups up to each: the last entry says how many there are.
    """

    group: jax.Array
    first: jax.Array
    behind: jax.Array


def tiles_of(at: Borders, rows: int, tile: int, aligned: int = 1, least: int = 0) -> Tiles:
    """Tiles of so many rows, where they begin where groups do; first rows are rounded down to a multiple of `aligned`.

    A group has `least` tiles at least, also an empty one.

    >>> group, first, behind = tiles_of(borders(jnp.array([3, 0, 1]), 6), 6, 2)
    >>> group.tolist()[: behind[-1]], first.tolist()[: behind[-1]]
    ([0, 0, 2, 3], [0, 2, 3, 4])
    """
    begin, end = jnp.minimum(at.begin, rows), jnp.minimum(at.end, rows)
    start = begin // aligned * aligned
    counts = jnp.maximum(jnp.where(end > begin, (end - start + tile - 1) // tile, 0), least)
    n, number = jnp.arange(len(begin)), jnp.arange(rows // tile + 2 * len(begin))[:, None]
    behind = jnp.sum(jnp.where(n <= n[:, None], counts, 0), axis=1, dtype=jnp.int32)
    own = (number >= behind - counts) & (number < behind)
    pick = lambda values: jnp.sum(jnp.where(own, values, 0), axis=1, dtype=jnp.int32)  # noqa: E731
    return Tiles(pick(n), pick(start + (number - behind + counts) * tile), behind)


def by_size(sizes):
    """The numbers of the groups, the largest first.

    >>> by_size(jnp.array([3, 0, 4, 3])).tolist()
    [2, 0, 3, 1]
    """
    n = jnp.arange(len(sizes))
    ahead = (sizes > sizes[:, None]) | ((sizes == sizes[:, None]) & (n < n[:, None]))
    place = jnp.sum(ahead, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(place == n[:, None], n, 0), axis=1, dtype=jnp.int32)
