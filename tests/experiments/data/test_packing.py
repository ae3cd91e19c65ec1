"""Packing: every pair once, no row too full, and exactly what best-fit decreasing does piece by piece."""

import time
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crescendo.experiments.data.packing import PADDING, best_fit_decreasing, pack, split_documents

capacities = st.integers(1, 40)
document_pairs = st.lists(st.integers(1, 150), max_size=40)


@st.composite
def lengths_and_capacity(draw, most=60):
    capacity = draw(capacities)
    return draw(st.lists(st.integers(1, capacity), max_size=most)), capacity


def offsets_of(pairs):
    return np.cumsum([0, *pairs], dtype=np.int64)


def rows_of(packing):
    starts, lengths, row_offsets = (array.tolist() for array in packing)
    for begin, end in pairwise(row_offsets):
        yield list(zip(starts[begin:end], lengths[begin:end], strict=True))


def best_fit_decreasing_by_piece(lengths, capacity):
    """The room left in each row when piece after piece, longest first, has gone into the fullest row that has room.

    That leaves open which of several equally full rows is taken, but not how much room is left in how many rows.
    """
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(room)) if room[row] >= length]
        if fitting:
            room[min(fitting, key=lambda row: room[row])] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


def fewest_rows(lengths, capacity):
    """The optimum, by trying every row for every piece."""

    @cache
    def most_rows_needed(piece, room):
        if piece == len(ordered):
            return 0
        options = [1 + most_rows_needed(piece + 1, tuple(sorted((*room, capacity - ordered[piece]))))]
        for row in range(len(room)):
            if room[row] >= ordered[piece]:
                left = tuple(sorted((*room[:row], room[row] - ordered[piece], *room[row + 1 :])))
                options.append(most_rows_needed(piece + 1, left))
        return min(options)

    ordered = sorted(lengths, reverse=True)
    return most_rows_needed(0, ())


@given(document_pairs, capacities)
def test_every_pair_of_every_document_is_in_exactly_one_piece_of_its_own_document(pairs, capacity):
    offsets = offsets_of(pairs)
    packing = pack(offsets, capacity)
    seen = [
        position for row in rows_of(packing) for start, length in row if start != PADDING
        for position in range(start, start + length)
    ]  # fmt: skip
    assert sorted(seen) == list(range(offsets[-1]))
    for row in rows_of(packing):
        for start, length in row:
            if start != PADDING:
                document = np.searchsorted(offsets, start, side="right") - 1
                assert start + length <= offsets[document + 1]


@given(document_pairs, capacities)
def test_rows_are_exactly_full_with_at_most_one_piece_of_padding_at_the_end(pairs, capacity):
    for row in rows_of(pack(offsets_of(pairs), capacity)):
        assert sum(length for _, length in row) == capacity
        assert all(length >= 1 for _, length in row)
        assert all(start != PADDING for start, _ in row[:-1])
        assert row[0][0] != PADDING


@given(document_pairs, capacities)
def test_documents_are_cut_into_full_pieces_and_one_remainder(pairs, capacity):
    _, lengths = split_documents(offsets_of(pairs), capacity)
    expected = [length for n in pairs for length in [capacity] * (n // capacity) + [n % capacity] * (n % capacity > 0)]
    assert lengths.tolist() == expected


@given(lengths_and_capacity())
def test_groups_are_packed_as_piece_by_piece_best_fit_decreasing_packs(case):
    lengths, capacity = case
    room = capacity - np.bincount(best_fit_decreasing(np.array(lengths, np.int64), capacity), lengths)
    assert sorted(room.tolist()) == best_fit_decreasing_by_piece(lengths, capacity)


@given(lengths_and_capacity(most=9))
def test_packing_is_within_the_bound_of_first_fit_decreasing(case):
    lengths, capacity = case
    rows = len(set(best_fit_decreasing(np.array(lengths, np.int64), capacity).tolist()))
    assert rows <= 11 / 9 * fewest_rows(lengths, capacity) + 6 / 9


def test_no_documents_make_no_rows():
    assert [array.tolist() for array in pack(np.array([0]), capacity=8)] == [[], [], [0]]


def test_a_row_of_no_pairs_is_refused():
    with pytest.raises(ValueError, match="capacity = 0 must be at least 1"):
        pack(np.array([0, 3]), capacity=0)


@pytest.mark.parametrize("median", [40, 1500])
def test_a_core_packs_50_million_pairs_a_second(median):
    # Lengths of real documents are close to log-normal; a pair of byte tokens is a byte of text.
    lengths = np.exp(np.random.default_rng(0).normal(np.log(median), 1.2, 20_000_000 // median)).astype(np.int64) + 1
    offsets = offsets_of(lengths)
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        pack(offsets, capacity=1024)
        seconds.append(time.process_time() - begin)
    assert offsets[-1] / min(seconds) > 50e6
