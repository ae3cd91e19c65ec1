"""Packs documents into fixed-length rows: best-fit decreasing, on groups of equal pieces at a time.

A document of n tokens between two end-of-text tokens gives n + 1 (token, label) pairs. Documents longer than a row are
cut into pieces of at most `capacity` pairs, pieces are packed whole into rows of exactly `capacity` pairs, and what
stays free in a row becomes a last piece of padding.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

PADDING = -1  # the `starts` entry of a piece of padding


class Packing(NamedTuple):
    """Rows as runs of pieces: row r consists of pieces row_offsets[r] to row_offsets[r + 1] - 1, padding last.

    Attributes:
      starts: int64 [pieces], where each piece's first token lies in the corpus, or PADDING.
      lengths: int32 [pieces], in (token, label) pairs; those of one row add up to the row's length.
      row_offsets: int64 [rows + 1].
    """

    starts: np.ndarray
    lengths: np.ndarray
    row_offsets: np.ndarray


def pack(offsets: np.ndarray, capacity: int) -> Packing:
    """Packs all (token, label) pairs of a corpus, each exactly once, into rows of `capacity` pairs.

    Args:
      offsets: int64 [documents + 1]; document i has the pairs offsets[i] to offsets[i + 1] - 1.
      capacity: the pairs in a row, at least 1.

    Returns:
      The packing. It needs at most 11/9 OPT + 6/9 rows, where OPT is the fewest possible for these pieces.

    Raises:
      ValueError: if capacity < 1.

    Example:
      Two documents, of 5 and of 2 pairs, in rows of 4: the first is cut in 4 + 1, its end shares a row with the second.

      >>> packing = pack(np.array([0, 5, 7]), capacity=4)
      >>> packing.starts.tolist(), packing.lengths.tolist(), packing.row_offsets.tolist()
      ([0, 4, 5, -1], [4, 1, 2, 1], [0, 1, 4])

    References:
      Dósa and Sgall, "Optimal analysis of best fit bin packing", ICALP 2014; Johnson, "Near-optimal bin packing
      algorithms", 1973 (the decreasing order).
    """
    starts, lengths = split_documents(offsets, capacity)
    rows = best_fit_decreasing(lengths, capacity)
    padding = capacity - np.bincount(rows, lengths).astype(np.int64)  # float64 sums are exact: far below 2**53
    padded = np.flatnonzero(padding)

    rows = np.concatenate([rows, padded])
    order = np.argsort(rows, kind="stable")
    return Packing(
        starts=np.concatenate([starts, np.full(len(padded), PADDING)])[order],
        lengths=np.concatenate([lengths, padding[padded]])[order].astype(np.int32),
        row_offsets=np.concatenate([[0], np.cumsum(np.bincount(rows))]),
    )


def split_documents(offsets: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths), int64 [pieces]: every document cut into pieces of `capacity` pairs and a shorter last one.

    Args:
      offsets: int64 [documents + 1]; document i has the pairs offsets[i] to offsets[i + 1] - 1.
      capacity: the pairs in a full piece, at least 1.

    Raises:
      ValueError: if capacity < 1.

    >>> [array.tolist() for array in split_documents(np.array([0, 5, 7]), capacity=4)]
    [[0, 4, 5], [4, 1, 2]]
    """
    if capacity < 1:
        raise ValueError(f"capacity = {capacity} must be at least 1")
    pieces = -(-np.diff(offsets) // capacity)
    first_piece = np.cumsum(pieces) - pieces
    within_document = np.arange(pieces.sum()) - np.repeat(first_piece, pieces)
    starts = np.repeat(offsets[:-1], pieces) + within_document * capacity
    return starts, np.minimum(np.repeat(offsets[1:], pieces) - starts, capacity)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece: longest first, each into the fullest row that still has room, else into a new row.

    Of the pieces of one length, the fullest row with room takes as many as fit before the next row's turn comes,
    because each one it takes leaves it fuller still. So whole groups of equal pieces move into whole groups of equally
    free rows at once, and the cost is a few array operations for each pair of such groups, not for each piece.

    Args:
      lengths: integers [pieces], each in 1..capacity.
      capacity: the pairs that a row holds.

    Returns:
      int64 [pieces], rows numbered from 0 without gaps.

    >>> best_fit_decreasing(np.array([3, 5, 2, 6, 4]), capacity=8).tolist()
    [1, 1, 0, 0, 2]
    """
    by_length = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=1)
    rows = np.empty(len(lengths), np.int64)
    rows_with_room: dict[int, list[np.ndarray]] = {}  # free pairs -> rows with that many
    room_sizes: list[int] = []  # the keys above, ascending
    row_count = placed = 0

    def add_room(room: int, row_group: np.ndarray) -> None:
        if room and len(row_group):
            if room not in rows_with_room:
                insort(room_sizes, room)
            rows_with_room.setdefault(room, []).append(row_group)

    for length in np.flatnonzero(counts)[::-1].tolist():
        remaining = int(counts[length])
        while remaining:
            fullest = bisect_left(room_sizes, length)
            if fullest < len(room_sizes):
                room = room_sizes.pop(fullest)
                groups = rows_with_room.pop(room)
                candidates = groups[0] if len(groups) == 1 else np.concatenate(groups)
            else:
                room = capacity
                new_rows = -(-remaining // (capacity // length))
                candidates = np.arange(row_count, row_count + new_rows)
                row_count += new_rows

            each = room // length
            taken = min(remaining, each * len(candidates))
            full, in_last = divmod(taken, each)  # rows that take `each` pieces; pieces in the one row that takes fewer
            used = full + (in_last > 0)
            rows[by_length[placed : placed + taken]] = np.repeat(candidates[:used], each)[:taken]
            add_room(room - each * length, candidates[:full])
            add_room(room - in_last * length, candidates[full:used])
            add_room(room, candidates[used:])
            placed += taken
            remaining -= taken
    return rows
