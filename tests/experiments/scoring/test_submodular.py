"""Greedy choices beside their definitions, a few lines each."""

import itertools

import numpy as np
import pytest

from crescendo.experiments.scoring.clusters import unit_rows
from crescendo.experiments.scoring.submodular import (
    _similarities,
    facility_gains,
    greedy_gains,
    quantization_bins,
    quantized_ranks,
)


def directions(rows: int, width: int = 5, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).normal(size=(rows, width)))


def plainly(similarities: np.ndarray) -> list[tuple[int, float]]:
    """Every row's gain anew in every step; of equal ones the first row's."""
    covered, left, taken = np.zeros_like(similarities[0]), list(range(len(similarities))), []
    while left:
        gains = [float(np.maximum(similarities[j] - covered, 0).sum()) for j in left]
        best = int(np.argmax(gains))
        taken.append((left[best], gains[best]))
        covered = np.maximum(covered, similarities[left.pop(best)])
    return taken


@pytest.mark.parametrize("rows", [1, 2, 33, 100])
def test_a_lazy_choice_is_the_plain_one_with_rows_alike_among_them(rows):
    x = np.concatenate([directions(rows), directions(rows)[: rows // 3]])
    similarities = _similarities(x)
    gains = greedy_gains(similarities)
    for j, gain in plainly(similarities):
        assert gains[j] == np.float32(gain)


def test_the_first_choices_are_worth_most_of_what_the_best_set_is():
    similarities = _similarities(directions(12))
    three = np.argsort(-greedy_gains(similarities), kind="stable")[:3]
    best = max(similarities[list(of)].max(axis=0).sum() for of in itertools.combinations(range(12), 3))
    assert (1 - 1 / np.e) * best < similarities[three].max(axis=0).sum() <= best * (1 + 1e-6)


def test_blocks_are_chosen_from_together_by_their_gains():
    """The largest gains of all blocks are what a greedy choice of the sum of their values takes."""
    x = directions(64)
    gains = facility_gains(x, block_rows=16, seed=3)
    order = np.random.default_rng(3).permutation(64)
    blocks = [np.sort(block) for block in np.array_split(order, 4)]
    steps = sorted(((gain, block[j]) for block in blocks for j, gain in plainly(_similarities(x[block]))), reverse=True)
    assert {row for _, row in steps[:20]} == set(np.argsort(-gains)[:20].tolist())
    np.testing.assert_array_equal(facility_gains(x, block_rows=16, seed=3), gains)


def test_bins_are_filled_by_the_rule():
    x = directions(21).astype(np.float64)
    distances = 2 - 2 * (x @ x.T)
    bins = quantization_bins(distances, 4)
    assert sorted(np.concatenate(bins).tolist()) == list(range(21))
    assert [len(members) for members in bins] == [6, 5, 5, 5]
    left = set(range(21))
    for members in bins:
        inside: list[int] = []
        for row in members.tolist():
            rest = left - set(inside)
            value = {j: sum(distances[j, i] for i in inside) - sum(distances[j, i] for i in rest) for j in sorted(rest)}
            assert value[row] == pytest.approx(max(value.values()), abs=1e-9)
            inside.append(row)
        left -= set(inside)


def test_any_share_of_the_ranks_is_that_share_of_every_bin():
    x = directions(40)
    ranks = quantized_ranks(x, bins=4, block_rows=40, seed=0)
    kept = set(np.argsort(-ranks, kind="stable")[:20].tolist())
    assert [len(kept & set(members.tolist())) for members in quantization_bins(2 - 2 * (x @ x.T), 4)] == [5, 5, 5, 5]
    assert (quantized_ranks(x, bins=4, block_rows=40, seed=1) != ranks).any()
