"""Documents cut by the binary digits of their lengths, and the order of the lengths, against plain loops over both."""

import collections
import dataclasses
import itertools
import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments.data.decomposed import decomposed
from crescendo.experiments.data.decomposed_rows import LengthOrder, decompose
from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.rows import Stream
from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.data.text_mixture import text_mixture
from crescendo.experiments.runtime.errors import UserError
from crescendo.pallas_kernels.attention.contract import Config, Operands, block_ranges

TEXTS = [f"{i} " + "words and " * (i * i % 17) + "so" * (i % 7) for i in range(400)]


def corpus(texts=TEXTS) -> Documents:
    return Documents("a corpus", json.dumps(texts), lambda: (text.encode() for text in texts))


def pieces_of(counts, lengths):
    """(start, length) of every piece: documents one after the other, the longest piece that fits taken each time."""
    begin, pieces = 0, []
    for count in counts:
        at, left = begin, count
        while left >= lengths[0]:
            length = max(each for each in lengths if each <= left)
            pieces.append((at, length))
            at, left = at + length, left - length
        begin += count
    return pieces


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.integers(0, 3),
    st.integers(0, 4),
)
def test_documents_are_cut_by_their_binary_digits(counts, first, more):
    lengths = [1 << digit for digit in range(first, first + more + 1)]
    row = lengths[-1]
    starts, of, row_offsets = decompose(np.concatenate([[0], np.cumsum(counts)]), lengths)
    kept = list(zip(starts.tolist(), of.tolist(), strict=True))
    every = pieces_of(counts, lengths)
    assert len(set(kept)) == len(kept)
    assert set(kept) <= set(every)
    available = collections.Counter(length for _, length in every)
    used = collections.Counter(of.tolist())
    assert {length: used[length] for length in lengths} == {
        length: available[length] - available[length] % (row // length) for length in lengths
    }
    rows = [of[begin:end].tolist() for begin, end in itertools.pairwise(row_offsets.tolist())]
    assert all(sum(each) == row and len(set(each)) == 1 for each in rows)
    assert [each[0] for each in rows] == sorted(each[0] for each in rows)


def test_pieces_of_a_row_are_not_of_neighbouring_documents():
    starts, of, _ = decompose(np.arange(0, 8 * 1001, 8), [8, 64])
    assert set(of.tolist()) == {8}
    apart = np.abs(np.diff(starts)) // 8
    assert 250 < apart.mean() < 420  # a third of 1,000 documents, where they are independent
    assert np.mean(apart < 4) < 0.02


def plain_order(rows_of, cycle, group, odds):
    """The lengths of a cycle's groups: exact fractions, sorted."""
    rows, groups = sum(rows_of.values()), cycle // group
    exact = {length: Fraction(groups * count, rows) for length, count in rows_of.items()}
    counts = {length: int(part) for length, part in exact.items()}
    by_rest = sorted(exact, key=lambda length: (counts[length] - exact[length], length))
    for length in by_rest[: groups - sum(counts.values())]:
        counts[length] += 1
    places = []
    for longer, (length, count) in enumerate(reversed(counts.items())):
        weight = count * Fraction(odds) ** longer
        places += [((j + Fraction(1, 2)) / weight, length) for j in range(count)]
    return [length for _, length in sorted(places)]


@pytest.mark.parametrize("odds", [1.0, 2.0, 3.0, 100.0, 0.5])
def test_lengths_come_in_cycles_as_the_rule_says(odds):
    rows_of = {16: 37, 32: 50, 64: 93, 128: 120}
    order = LengthOrder(rows_of, 128, decomposed(16, odds=odds, cycle=120, group=3), seed=5)
    lengths = order.lengths(range(360)).tolist()
    assert lengths == [each for each in plain_order(rows_of, 120, 3, odds) * 3 for _ in range(3)]
    halves = np.mean(lengths[:60]), np.mean(lengths[60:120])
    assert odds == 1 or (halves[0] < halves[1]) == (odds > 1)
    if odds == 2.0:  # shares times 8, 4, 2 and 1, up to where the shortest are used up
        first = collections.Counter(lengths[:36])
        for length, weight in zip(rows_of, (8, 4, 2, 1), strict=True):
            weights = sum(count * w for count, w in zip(rows_of.values(), (8, 4, 2, 1), strict=True))
            assert first[length] / 36 == pytest.approx(rows_of[length] * weight / weights, abs=0.09)


def test_an_example_s_row_depends_on_its_number_alone_and_passes_are_whole():
    rows_of = {16: 20, 32: 30, 64: 41}
    order = LengthOrder(rows_of, 64, decomposed(16, cycle=60, group=4), seed=3)
    rows = order(range(280))
    at = np.random.default_rng(0).permutation(280)[:90]
    np.testing.assert_array_equal(order(at), rows[at])
    np.testing.assert_array_equal(np.concatenate([order(range(a, a + 7)) for a in range(70, 140, 7)]), rows[70:140])
    bounds = np.cumsum([0, *rows_of.values()])
    for i, (length, count) in enumerate(rows_of.items()):
        mine = rows[(rows >= bounds[i]) & (rows < bounds[i + 1])]
        assert (order.lengths(np.flatnonzero((rows >= bounds[i]) & (rows < bounds[i + 1]))) == length).all()
        passes = [mine[k : k + count].tolist() for k in range(0, len(mine) - count + 1, count)]
        assert all(sorted(each) == list(range(bounds[i], bounds[i + 1])) for each in passes)
        assert len({tuple(each) for each in passes}) == len(passes)
    other = LengthOrder(rows_of, 64, decomposed(16, cycle=60, group=4), seed=4)
    np.testing.assert_array_equal(other.lengths(range(280)), order.lengths(range(280)))
    assert (other(range(80)) != rows[:80]).any()


def test_rows_are_full_of_pieces_of_one_length_and_held_out_rows_are_packed(tmp_path):
    options = {"sequence_length": 64, "validation_fraction": 0.2, "cache_directory": tmp_path}
    packing = decomposed(8, cycle=256, group=8)
    packed, data = text_data(corpus(), **options), text_data(corpus(), packing=packing, **options)
    text = {tuple(data.tokenizer.encode(each)) for each in TEXTS}
    rows = data.train.take(range(len(data.train)))
    ids = rows["segment_ids"]
    assert ids.min() == 1
    assert data.padding_share == 0
    inside = b"".join(bytes(each) + b"\n" for each in text)
    for row in range(0, len(ids), 17):
        length = 64 // ids[row].max()
        np.testing.assert_array_equal(ids[row], np.repeat(np.arange(64 // length), length) + 1)
        np.testing.assert_array_equal(rows["positions"][row], np.tile(np.arange(length), 64 // length))
        tokens, labels = (rows[name][row].reshape(-1, length) for name in ("tokens", "labels"))
        np.testing.assert_array_equal(tokens[:, 1:], labels[:, :-1])
        for piece in np.concatenate([tokens, labels[:, -1:]], axis=1):
            assert bytes(token for token in piece.tolist() if token < 256) in inside
    np.testing.assert_array_equal(data.validation[0]["tokens"], packed.validation[0]["tokens"])
    assert len(data.validation) == len(packed.validation)
    order = data.train.order(1)
    np.testing.assert_array_equal(Stream(data.train, 1).read(8, 8)["segment_ids"], ids[order(range(8, 16))])
    for first in range(0, 128, 8):  # a batch of a group's size has pieces of one length
        assert len(set(order.lengths(range(first, first + 8)).tolist())) == 1
    assert "pieces of 8 to 64, " in str(data)


def test_the_fingerprint_is_of_the_rows_and_their_order(tmp_path):
    def fingerprint(packing=None):
        return text_data(corpus(), sequence_length=64, packing=packing, cache_directory=tmp_path).fingerprint

    base = decomposed(8, cycle=64, group=8)
    others = {"shortest": 16, "odds": 1.0, "cycle": 128, "group": 4}
    every = [None, base, *(dataclasses.replace(base, **{name: value}) for name, value in others.items())]
    assert len({fingerprint(each) for each in every}) == len(every)
    assert fingerprint(base) == fingerprint(dataclasses.replace(base))


def test_a_row_of_pieces_costs_the_blocks_of_attention_that_its_pieces_would_cost_as_rows():
    row, block, lengths = 1024, 32, [32, 64, 256, 1024]
    ids = np.stack([np.repeat(np.arange(row // length) + 1, length) for length in lengths]).astype(np.int32)

    @jax.jit
    def blocks(ids):
        q = jnp.zeros((*ids.shape, 1, 8))
        ranges, _ = block_ranges(Config(scale=1.0, causal=True), Operands(q, q, q, None, ids, ids), block, block)
        return (ranges.hi - ranges.lo).sum(axis=1)

    n = [length // block for length in lengths]
    assert blocks(ids).tolist() == [row // block // each * each * (each + 1) // 2 for each in n]


@pytest.mark.parametrize(
    ("packing", "options", "message"),
    [
        ({"shortest": 48}, {}, r"decomposed\.shortest = 48 must be a power of two: use 32 or 64"),
        ({"cycle": 100}, {}, r"decomposed\.cycle = 100 must be whole groups of .*group = 32 examples: use 96 or 128"),
        ({"cycle": 20}, {}, r"use 32$"),
        ({}, {"sequence_length": 100}, r"text_data\.sequence_length = 100 must be a power of two.*use 64 or 128"),
        ({"shortest": 128}, {}, r"decomposed\.shortest = 128 is longer than a row of text_data\.sequence_length = 64"),
        ({}, {"sequence_length": 512}, r"no document has the 512 tokens of text_data\.sequence_length"),
    ],
)
def test_what_can_t_be_is_one_line(packing, options, message, tmp_path):
    options = {"sequence_length": 64, "cache_directory": tmp_path, **options}
    with pytest.raises(UserError, match=message):
        str(text_data(corpus(), packing=decomposed(**packing), **options))


def test_a_length_without_rows_a_cycle_without_room_and_a_run_without_a_cycle_are_refused(tmp_path):
    of_64 = corpus([f"{i:063}" for i in range(200)] + ["y" * 71])
    options = {"sequence_length": 64, "validation_fraction": 0.2, "cache_directory": tmp_path}
    with pytest.raises(UserError, match=r"too few pieces of 32 tokens for a row .* = 64: set decomposed.shortest = 64"):
        str(text_data(of_64, packing=decomposed(8), **options))
    rows_of = {32: 1, 64: 999}
    with pytest.raises(UserError, match=r"pieces of 32 tokens are 0\.10% of all, and a cycle of 100 .* groups of 10"):
        LengthOrder(rows_of, 64, decomposed(32, cycle=100, group=10), seed=0)
    with pytest.raises(UserError, match=r"an eighth of the 1,000 rows is less than decomposed\.group = 200"):
        LengthOrder(rows_of, 64, decomposed(32, group=200), seed=0)
    order = LengthOrder({32: 100, 64: 900}, 64, decomposed(32, group=4), seed=0)
    order.check(124)  # an eighth of 1,000 in whole groups
    with pytest.raises(UserError, match=r"123 examples are less than one cycle of 124, .* decomposed\.cycle = 12, or"):
        order.check(123)
    with pytest.raises(UserError, match=r"data seed = -1 must lie in"):
        LengthOrder({32: 100, 64: 900}, 64, decomposed(32, group=4), seed=-1)


def test_a_mixture_has_an_order_of_its_own(tmp_path):
    mixture = text_mixture({"a": corpus(), "b": corpus(TEXTS[::-1])}, {"a": 1, "b": 1})
    with pytest.raises(UserError, match=r"orders the rows of one source, and text_data\.documents is a text_mixture"):
        text_data(mixture, sequence_length=64, packing=decomposed(), cache_directory=tmp_path)
