"""The order of a mixture against a walk along the clock, its shares in any window, and weights that can't be."""

import json
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments.data.mixed_rows import MixedOrder
from crescendo.experiments.data.shares import PARTS, Shares, make_shares
from crescendo.experiments.runtime.errors import UserError

WINDOW = 4096


def integral(shares: Shares, source: int, clock: int) -> Fraction:
    """Of a source's share from 0 to a clock."""
    total, ends = Fraction(0), [*shares.points.tolist()[1:], 2**40]
    parts = [*shares.parts[:, source].tolist(), int(shares.parts[-1, source])]
    for i, (begin, end) in enumerate(zip(shares.points.tolist(), ends, strict=True)):
        x = min(clock, end) - begin
        if x <= 0:
            break
        slope = Fraction(parts[i + 1] - parts[i], end - begin) if shares.between == "anneal" else 0
        total += parts[i] * x + slope * x * x / 2
    return total / PARTS


def walked(shares: Shares, examples: int) -> list[tuple[int, int]]:
    """The specification: along the clock each source gives what is due, the first source first."""
    drawn: list[tuple[int, int]] = []
    counts, clock = [0] * shares.parts.shape[1], 0
    while len(drawn) < examples:
        clock += 1
        for source, count in enumerate(counts):
            for row in range(count, int(integral(shares, source, clock) + Fraction(1, 2))):
                drawn.append((source, row))
                counts[source] = row + 1
    return drawn[:examples]


@st.composite
def mixtures(draw, least=1, most=5, points=4, furthest=6000) -> Shares:
    count = draw(st.integers(least, most))
    clocks = sorted({0, *draw(st.lists(st.integers(1, furthest), max_size=points - 1))})
    between = draw(st.sampled_from(["hold", "anneal"]))
    parts = []
    for _ in clocks:
        cuts = sorted(draw(st.lists(st.integers(0, PARTS), min_size=count - 1, max_size=count - 1)))
        parts.append(np.diff([0, *cuts, PARTS]))
    return Shares(clocks, np.array(parts), between)


def counts_of(shares: Shares, begin: int, examples: int) -> np.ndarray:
    """How many of the first examples from `begin` on are of each source, int64 [examples + 1, K]."""
    source, _ = shares.drawn(range(begin, begin + examples))
    one = source[:, None] == np.arange(shares.parts.shape[1])
    return np.concatenate([np.zeros_like(one[:1], np.int64), np.cumsum(one, axis=0)])


@given(mixtures(furthest=150))
@settings(deadline=None, max_examples=10)
def test_examples_are_drawn_as_they_become_due(shares):
    source, row = shares.drawn(range(200))
    assert list(zip(source.tolist(), row.tolist(), strict=True)) == walked(shares, 200)


@given(mixtures(points=1), st.integers(0, 10**9))
@settings(deadline=None, max_examples=20)
def test_with_constant_weights_every_window_of_4096_has_exactly_the_shares(shares, begin):
    counts = counts_of(shares, begin, 2 * WINDOW)
    assert (counts[WINDOW:] - counts[:-WINDOW] == shares.parts[0]).all()


@given(mixtures(least=2, most=2), st.integers(0, 8000))
@settings(deadline=None, max_examples=10)
def test_of_two_sources_every_window_has_its_integral_within_1(shares, begin):
    counts = counts_of(shares, begin, 500)[:, 0]
    off = counts - np.array([float(integral(shares, 0, begin + i) - integral(shares, 0, begin)) for i in range(501)])
    assert off.max() - off.min() <= 1 + 1e-9  # the floats' own error


@given(mixtures(most=8), st.integers(0, 2**31 - 2))
@settings(deadline=None, max_examples=50)
def test_counts_are_those_of_the_integral_wherever_the_clock_stands(shares, examples):
    counts = shares.before(examples)
    assert counts.sum() == examples
    bound = Fraction(shares.parts.shape[1] + 3, 2)
    for source, count in enumerate(counts.tolist()):
        assert abs(count - integral(shares, source, examples)) <= bound
    source, row = shares.drawn([examples])
    assert row[0] == counts[source[0]]
    assert (shares.before(examples + 1) - counts).tolist() == (np.arange(len(counts)) == source[0]).tolist()


@given(mixtures(), st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 10**9))
@settings(deadline=None, max_examples=20)
def test_a_place_depends_on_the_number_alone(shares, batches, begin):
    whole = np.stack(shares.drawn(range(begin, begin + sum(batches))))
    ends = begin + np.cumsum([0, *batches])
    parts = [np.stack(shares.drawn(range(*pair))) for pair in pairwise(ends)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(
        np.stack(shares.drawn(range(begin + sum(batches) - 1, begin - 1, -1))), whole[:, ::-1]
    )


@given(mixtures(least=2, most=3, furthest=200), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=5)
def test_each_epoch_of_a_source_has_each_of_its_rows_once_and_is_another(shares, seed):
    rows = {f"s{i}": 30 + 9 * i for i in range(shares.parts.shape[1])}
    order = MixedOrder(rows, shares, seed, {})
    numbers, begin = order(range(200)), 0
    source, _ = shares.drawn(range(200))
    for i, count in enumerate(rows.values()):
        mine = numbers[source == i] - begin
        epochs = [mine[at : at + count].tolist() for at in range(0, len(mine) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        begin += count
    assert order.epochs(200) == {name: int((source == i).sum()) / count for i, (name, count) in enumerate(rows.items())}


def test_sources_don_t_stand_in_runs():
    source, _ = Shares([0], [[2048, 1024, 1024]], "hold").drawn(range(4096))
    assert max(len(run) for run in "".join(map(str, source)).replace("1", "2").split("2")) <= 2
    assert not {"11", "22"} & {"".join(map(str, pair)) for pair in pairwise(source)}


def test_a_source_keeps_its_order_when_others_come():
    before = MixedOrder({"a": 50, "b": 9}, Shares([0], [[4096, 0]], "hold"), 3, {})
    after = MixedOrder({"a": 50, "c": 7}, Shares([0], [[2048, 2048]], "hold"), 3, {})
    rows = after(range(40))
    np.testing.assert_array_equal(rows[rows < 50], before(range((rows < 50).sum())))
    assert not np.array_equal(before(range(50)), MixedOrder({"d": 50}, Shares([0], [[4096]], "hold"), 3, {})(range(50)))


def test_weights_are_made_whole_by_the_largest_remainder():
    thirds = make_shares({"a": 1, "b": 1, "c": 1}, ["a", "b", "c"], "hold", "weights")
    assert thirds.parts.tolist() == [[1366, 1365, 1365]]
    text = {"0": {"a": 0.0, "b": 2.5}, "100": {"a": 2.5, "b": 2.5}}
    line = make_shares(json.loads(json.dumps(text)), ["a", "b"], "anneal", "weights")
    assert line.parts.tolist() == [[0, 4096], [2048, 2048]]
    assert line.before(100).tolist() == [25, 75]
    assert (line.before(10**9) - line.before(100)).tolist() == [(10**9 - 100) // 2] * 2


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_whole_parts_are_within_1_of_the_weights(weights):
    names = [str(i) for i in range(len(weights))]
    if min(weights) * PARTS < sum(weights):
        with pytest.raises(UserError, match=r"the smallest share is 1/4096"):
            make_shares(dict(zip(names, weights, strict=True)), names, "hold", "weights")
        return
    parts = make_shares(dict(zip(names, weights, strict=True)), names, "hold", "weights").parts[0]
    assert parts.sum() == PARTS
    assert np.abs(parts - PARTS * np.array(weights) / sum(weights)).max() < 1


def test_numbers_of_numpy_are_numbers():
    points = {np.int64(0): {"a": np.float64(0.25), "b": np.float32(0.75)}, np.int32(9): {"a": np.int64(1), "b": 1}}
    shares = make_shares(points, ["a", "b"], "hold", "w")
    assert shares.points.tolist() == [0, 9]
    assert shares.parts.tolist() == [[1024, 3072], [2048, 2048]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "w is empty: give each of a, b a weight"),
        ({"a": 1}, "w: b has none at 0 examples: give it 0 to leave it out"),
        ({"a": 1, "b": 1, "c": 1}, "w: 'c' at 0 examples is no source; there are a, b"),
        ({"a": 1, "b": -2}, "w: b has -2 at 0 examples: it must be a number from 0 to 1e300"),
        ({"a": 1, "b": 1e301}, "w: b has 1e+301 at 0 examples: it must be a number from 0 to 1e300"),
        ({"a": 1, "b": True}, "w: b has True at 0 examples"),
        ({"a": 1, "b": float("nan")}, "w: b has nan at 0 examples"),
        ({"a": 1, "b": float("inf")}, "w: b has inf at 0 examples"),
        ({0: {"a": 1, "b": 1}, 64: {"a": 1, "b": "x"}}, "w: b has x at 64 examples"),
        ({0: {"a": 1, "b": 1}, 64: {"a": 0, "b": 0.0}}, "w: those of a, b add up to 0 at 64 examples: give one"),
        ({0: {"a": 1, "b": 1e-5}}, "w: b has 1e-05 of all at 0 examples, and the smallest share is 1/4096: raise"),
        ({5: {"a": 1, "b": 1}}, "w begins at 5 examples: say the weights at 0 too"),
        ({0: {"a": 1, "b": 1}, "0": {"a": 1, "b": 1}}, "w says 0 examples twice"),
        ({-1: {"a": 1, "b": 1}}, "w: '-1' must be a clock"),
        ({2**31: {"a": 1, "b": 1}}, "w: '2147483648' must be a clock"),
        ({0.5: {"a": 1, "b": 1}}, "w: '0.5' must be a clock"),
        ({0: {"a": 1, "b": 1}, 9: 1}, "w: '9' must be a clock, examples seen from 0 to below 2"),
    ],
)
def test_weights_that_can_t_be_are_refused_with_source_and_clock(weights, message):
    with pytest.raises(UserError) as refused:
        make_shares(weights, ["a", "b"], "hold", "w")
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
