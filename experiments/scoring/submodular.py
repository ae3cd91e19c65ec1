"""Rows that stand for the others: greedy choices that cover all of them, within blocks of bounded size."""

import heapq
from collections.abc import Callable

import numpy as np


def facility_gains(x_ND: np.ndarray, block_rows: int, seed: int) -> np.ndarray:
    """The gain at which a greedy choice takes each row, float32 `[N]`: of those that cover most, first.

    Within a block the value of a set S of rows is that of a facility location, sum_i max_{j in S} s_ij over all rows i
    of the block, with similarities s = (1 + cosine) / 2. Its gains only fall as S grows, so that the rows with the
    largest gains, of all blocks together, are the greedy choice for the sum of the blocks' values, which is within
    1 - 1/e of the best one of that many rows.

    Args:
      x_ND: unit rows.
      block_rows: about how many rows are in a block; their similarities take 4 bytes times its square.
      seed: of which rows are in a block together.

    >>> x = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    >>> facility_gains(x, block_rows=4, seed=0).tolist()  # one of three alike covers these, the last one itself
    [3.5, 0.0, 0.0, 0.5]

    References:
      Renduchintala et al. 2023, "INGENIOUS: Using informative data subsets for efficient pre-training of language
      models" (https://arxiv.org/abs/2305.06677).
    """
    return _by_block(lambda x_MD: greedy_gains(_similarities(x_MD)), x_ND, block_rows, seed)


def greedy_gains(similarities_MM: np.ndarray) -> np.ndarray:
    """The gains of a greedy facility location in the order in which it takes rows, at each row's place, `[M]`.

    Lazily (Minoux 1978): a gain that was computed earlier is at least what it is now, so that a row is taken once its
    fresh gain is no less than all others' earlier ones. Of equal gains the first row's is taken first.

    Args:
      similarities_MM: at least 0, `[i, j]` of the row i for which j may stand, symmetric.
    """
    rows = similarities_MM
    covered_M, gains_M = np.zeros(len(rows), rows.dtype), np.zeros(len(rows), np.float32)
    waiting = [(-float(row.sum()), j) for j, row in enumerate(rows)]
    heapq.heapify(waiting)
    while waiting:
        _, j = heapq.heappop(waiting)
        fresh = -float(np.maximum(rows[j] - covered_M, 0).sum()), j
        if waiting and fresh > waiting[0]:
            heapq.heappush(waiting, fresh)
            continue
        gains_M[j] = -fresh[0]
        covered_M = np.maximum(covered_M, rows[j])
    return gains_M


def quantized_ranks(x_ND: np.ndarray, bins: int, block_rows: int, seed: int) -> np.ndarray:
    """Ranks in [0, 1), float32 `[N]`, of which any share from the top is the same share of every bin, at random.

    Within a block rows are put into bins of one size, one bin after the other, each by a greedy choice among those that
    are left: the next row is the one that is farthest from those in its bin and nearest to the rest, by the sums of
    squared distances.

    Args:
      x_ND: unit rows.
      bins: how many.
      block_rows: see `facility_gains`.
      seed: of the blocks, and of the choice within bins.

    References:
      Zhou et al. 2023, "Dataset quantization" (https://arxiv.org/abs/2308.10524).
    """
    random = np.random.default_rng([seed, 1])

    def ranks(x_MD: np.ndarray) -> np.ndarray:
        result = np.zeros(len(x_MD), np.float32)
        for members in quantization_bins(2 - 2 * (x_MD @ x_MD.T), bins):
            result[members] = random.permutation(len(members)) / len(members)
        return result

    return _by_block(ranks, x_ND, block_rows, seed)


def quantization_bins(squared_distances_MM: np.ndarray, bins: int) -> list[np.ndarray]:
    """The rows of each bin, in the order of their choice; sizes differ by 1 at most. See `quantized_ranks`."""
    left, result = np.arange(len(squared_distances_MM)), []
    for size in (len(part) for part in np.array_split(left, bins)):
        among = squared_distances_MM[np.ix_(left, left)]
        # To those in the bin minus to the rest is twice the former minus all.
        values, chosen = -among.sum(axis=1), []
        for _ in range(size):
            best = int(np.argmax(values))
            chosen.append(best)
            values += 2 * among[best]
            values[chosen] = -np.inf
        result.append(left[chosen])
        left = np.delete(left, chosen)
    return result


def _similarities(x_MD: np.ndarray) -> np.ndarray:
    """(1 + cosine) / 2 of unit rows, float32 `[M, M]`, exactly symmetric."""
    cosines = x_MD @ x_MD.T
    return np.clip((2 + cosines + cosines.T) / 4, 0, 1)


def _by_block(function: Callable[[np.ndarray], np.ndarray], x_ND: np.ndarray, block_rows: int, seed: int) -> np.ndarray:
    """`function(rows of a block)` for blocks of one size, random rows each, at the rows' places."""
    result = np.zeros(len(x_ND), np.float32)
    order = np.random.default_rng(seed).permutation(len(x_ND))
    for block in np.array_split(order, -(-len(x_ND) // block_rows)):
        block = np.sort(block)
        result[block] = function(x_ND[block])
    return result
