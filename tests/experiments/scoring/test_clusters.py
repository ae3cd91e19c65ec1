"""Prototypes beside Lloyd's iterations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.experiments.scoring import clusters


def lloyd(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    for _ in range(clusters.MOST_ITERATIONS):
        nearest = np.argmax(x @ centroids.T, axis=1)
        sums = np.array([x[nearest == k].sum(axis=0) for k in range(len(centroids))])
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(lengths > 0, sums / np.where(lengths > 0, lengths, 1), centroids)
    return centroids


@pytest.mark.parametrize(("rows", "k", "block"), [(50, 4, 16), (7, 7, 4096), (33, 1, 32)])
def test_prototypes_and_scores_are_those_of_float64(rows, k, block, monkeypatch):
    """The last block is not full, or there is but one."""
    monkeypatch.setattr(clusters, "BLOCK_ROWS", block)
    middles = np.random.default_rng(1).normal(size=(k, 6))
    x = clusters.unit_rows(middles[np.arange(rows) % k] + 0.2 * np.random.default_rng(0).normal(size=(rows, 6)))
    centroids = clusters.prototypes(x, k, seed=0)
    start = np.sort(np.random.default_rng(0).choice(rows, k, replace=False))
    expected = lloyd(x.astype(np.float64), x[start].astype(np.float64))
    np.testing.assert_allclose(centroids, expected, atol=1e-6)
    cosines = x.astype(np.float64) @ expected.T
    distances = 1 - cosines.max(axis=1)
    np.testing.assert_allclose(clusters.centroid_distances(x, centroids), distances, atol=1e-6)
    # Seven rows of seven prototypes are at distance 0, where the temperature is the least that there is.
    scaled = cosines / max(distances.mean(), 1e-6)
    p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    entropies = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
    np.testing.assert_allclose(clusters.cluster_entropies(x, centroids), entropies, atol=1e-3)


def test_a_centroid_without_rows_stays():
    x = clusters.unit_rows(np.array([[1.0, 0.1], [1.0, 0.2]]))
    blocks, counted = clusters._blocks(x)
    after, _ = clusters._lloyd(blocks, counted, jnp.array([[1.0, 0.0], [-1.0, 0.0]]))
    assert isinstance(after, jax.Array)
    assert after[1].tolist() == [-1.0, 0.0]
