"""Prototypes of rows, and how each row lies to them: scores that need no labels."""

import jax
import jax.numpy as jnp
import numpy as np

MOST_ITERATIONS = 100
BLOCK_ROWS = 4096


def unit_rows(x_ND: np.ndarray) -> np.ndarray:
    """Every row at length 1, float32; rows of zeros stay.

    >>> print(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])))
    [[0.6 0.8]
     [0.  0. ]]
    """
    lengths = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return (x_ND / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def prototypes(x_ND: np.ndarray, clusters: int, seed: int) -> jax.Array:
    """The centroids of a k-means of directions, unit vectors float32 `[K, D]`.

    Lloyd's iterations from K rows chosen at random: each row belongs to the centroid with the largest inner product,
    the first of equal ones, and a centroid is the mean of its rows at length 1; one without rows stays where it is.
    They end when no centroid moves, or after 100.

    Args:
      x_ND: unit rows, at least as many as clusters.
      clusters: K.
      seed: of the choice.

    >>> x = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    >>> sorted(prototypes(x, 2, seed=1).tolist())
    [[0.0, 1.0], [1.0, 0.0]]
    """
    blocks, counted = _blocks(x_ND)
    start = np.random.default_rng(seed).choice(len(x_ND), clusters, replace=False)
    centroids_KD = jnp.asarray(x_ND[np.sort(start)])
    for _ in range(MOST_ITERATIONS):
        centroids_KD, moved = _lloyd(blocks, counted, centroids_KD)
        if not moved:
            break
    return centroids_KD


def centroid_distances(x_ND: np.ndarray, centroids_KD: jax.Array) -> np.ndarray:
    """1 minus the cosine to the nearest centroid, float32 `[N]`: large for rows that are unlike the others.

    Sorscher et al. 2022, "Beyond neural scaling laws: beating power law scaling via data pruning"
    (https://arxiv.org/abs/2206.14486): with plenty of data the far ones are worth most, with few the near ones.

    >>> print(centroid_distances(np.array([[0.6, 0.8]], np.float32), jnp.eye(2)).round(3))
    [0.2]
    """
    blocks, _ = _blocks(x_ND)
    largest = _over_blocks(lambda cosines_BK: jnp.max(cosines_BK, axis=1), blocks, centroids_KD)
    return 1 - np.asarray(largest)[: len(x_ND)]


def cluster_entropies(x_ND: np.ndarray, centroids_KD: jax.Array) -> np.ndarray:
    """How undecided it is which centroid a row belongs to, in nats, float32 `[N]`: up to the logarithm of K.

    The entropy of softmax(cosines / t), t being the mean distance of rows to their nearest centroid.

    >>> x = np.array([[1, 0], [0.7071, 0.7071]], np.float32)
    >>> print(cluster_entropies(x, jnp.eye(2)).round(2))  # the second lies in the middle: log 2
    [0.01 0.69]
    """
    blocks, _ = _blocks(x_ND)
    temperature = max(float(np.mean(centroid_distances(x_ND, centroids_KD))), 1e-6)

    def entropy(cosines_BK: jax.Array) -> jax.Array:
        logs_BK = jax.nn.log_softmax(cosines_BK / temperature, axis=1)
        return -jnp.sum(jnp.exp(logs_BK) * logs_BK, axis=1)

    return np.asarray(_over_blocks(entropy, blocks, centroids_KD))[: len(x_ND)]


def _blocks(x_ND: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """`(x [blocks, rows, D], counted bool [blocks, rows])`, filled up with zeros that don't count."""
    rows = min(BLOCK_ROWS, len(x_ND))
    blocks = -(-len(x_ND) // rows)
    filled = np.zeros((blocks * rows, x_ND.shape[1]), np.float32)
    filled[: len(x_ND)] = x_ND
    counted = np.arange(blocks * rows) < len(x_ND)
    return jnp.asarray(filled.reshape(blocks, rows, -1)), jnp.asarray(counted.reshape(blocks, rows))


def _cosines(x_BD: jax.Array, centroids_KD: jax.Array) -> jax.Array:
    return jnp.matmul(x_BD, centroids_KD.T, precision="highest")


def _over_blocks(function, blocks: jax.Array, centroids_KD: jax.Array) -> jax.Array:
    """`function(cosines [rows, K])` of each block, one after the other, as one array."""
    return jax.jit(lambda c_KD: jax.lax.map(lambda x_BD: function(_cosines(x_BD, c_KD)), blocks).ravel())(centroids_KD)


@jax.jit
def _lloyd(blocks: jax.Array, counted: jax.Array, centroids_KD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The centroids of the rows that are nearest to each, and whether any has moved."""

    def add(sums_KD, block):
        x_BD, counted_B = block
        nearest_B = jnp.argmax(_cosines(x_BD, centroids_KD), axis=1)
        member_BK = (nearest_B[:, None] == jnp.arange(len(centroids_KD))) & counted_B[:, None]
        return sums_KD + jnp.matmul(member_BK.T.astype(jnp.float32), x_BD, precision="highest"), None

    sums_KD, _ = jax.lax.scan(add, jnp.zeros_like(centroids_KD), (blocks, counted))
    lengths_K1 = jnp.linalg.norm(sums_KD, axis=1, keepdims=True)
    after_KD = jnp.where(lengths_K1 > 0, sums_KD / jnp.where(lengths_K1 > 0, lengths_K1, 1), centroids_KD)
    return after_KD, jnp.any(after_KD != centroids_KD)
