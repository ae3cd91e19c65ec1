"""Calls of real and of awkward shapes: M rows of width D, E matrices to width F, and how rows fall into groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from crescendo.pallas_kernels.op import Spec

# In small calls: several tiles, and more steps than a ring has slots.
FINE = {
    "rows": {"columns": 128, "leaving": 64},
    "transposed rows": {"columns": 128, "leaving": 64},
    "groups": {"columns": 128, "leaving": 64},
    "triton rows": {"rows": 64, "columns": 64, "depth": 32, "together": 2},
    "triton groups": {"rows": 64, "columns": 64, "depth": 32, "together": 2},
}


def equal(rows: int, experts: int) -> np.ndarray:
    """All groups alike, as far as they can be."""
    return np.diff(np.arange(experts + 1) * rows // experts)


def skewed(rows: int, experts: int) -> np.ndarray:
    """Group n in proportion to 1 / n, in random order: the largest of 8 has 37% of the rows, of 128 18%."""
    shares = np.cumsum(1 / np.arange(1, experts + 1))
    ends = np.round(rows * shares / shares[-1]).astype(int)
    return np.random.default_rng(0).permutation(np.diff(ends, prepend=0))


def _make(n, d, f, sizes, dtype, key):
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (n, d), dtype)
    w = (jax.random.normal(keys[1], (len(sizes), d, f)) * d**-0.5).astype(dtype)
    return (x, w, jnp.asarray(sizes, jnp.int32)), {}


def _spec(name, n, d, f, sizes, tags, dtype=jnp.bfloat16) -> Spec:
    sizes = np.asarray(sizes)
    flops, moved = 2.0 * sizes.sum() * d * f, 2.0 * (n * d + len(sizes) * d * f + n * f)
    make = functools.partial(_make, n, d, f, sizes, dtype)
    return Spec(name, make, flops, moved, (0, 1), frozenset(tags.split()))


def _real(n: int, d: int, f: int, experts: int, load, tags: str = "real") -> Spec:
    return _spec(f"{n} x {d} x {f}, {experts} {load.__name__}", n, d, f, load(n, experts), tags)


SPECS = (
    _real(32768, 768, 2048, 64, skewed, "real speed"),
    _real(32768, 2048, 768, 64, skewed, "real speed"),
    _real(16384, 2048, 8192, 8, skewed, "real speed"),
    # Other sizes are the same program.
    *(_real(32768, 768, 2048, *rest) for rest in ((8, equal), (8, skewed), (64, equal), (128, equal), (128, skewed))),
    *(_real(16384, 2048, 8192, *rest) for rest in ((8, equal), (64, equal), (64, skewed))),
    _spec("groups of any size", 210, 128, 128, [0, 1, 74, 0, 64, 61, 0, 0], "small awkward quick"),
    _spec("one group has all", 256, 128, 192, [0, 256, 0], "small awkward"),
    _spec("one group", 130, 64, 128, [130], "small"),
    _spec("64 groups", 384, 128, 64, skewed(380, 64), "small awkward"),
    _spec("128 groups", 200, 64, 64, skewed(200, 128), "small awkward"),
    _spec("no group has any", 70, 64, 128, [0, 0, 0], "small awkward"),
    _spec("no row", 0, 64, 128, [0, 0], "small awkward"),
    _spec("one row", 1, 64, 64, [0, 1], "small awkward"),
    _spec("odd widths", 33, 5, 7, [10, 0, 20], "small awkward", jnp.float32),
)
