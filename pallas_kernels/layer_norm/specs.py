"""Calls of real and of awkward shapes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.op import Spec


def _make(shape, dtype, options, key):
    keys = jax.random.split(key, 4)
    # A mean that is not small beside the deviations from it, as rows of a residual stream have.
    x = (2 + jax.random.normal(keys[0], shape)).astype(dtype)
    of_vectors = (*options.get("examples", ()), shape[-1])
    scale, bias = 1 + 0.1 * jax.random.normal(keys[1], of_vectors), 0.1 * jax.random.normal(keys[2], of_vectors)
    extra: dict[str, Any] = {"eps": 1e-5}
    if "residual" in options:
        extra["residual"] = jax.random.normal(keys[3], shape, dtype)
    return (x, scale, bias), extra


def _spec(name, shape, tags, dtype=jnp.bfloat16, **options) -> Spec:
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    make, tagged = functools.partial(_make, shape, dtype, options), frozenset(tags.split())
    # Of x, a residual, y and their sum; backward of that, both cotangents and one gradient for both.
    moved, backward = (4.0 * size, 4.0 * size) if "residual" in options else (2.0 * size, 3.0 * size)
    return Spec(name, make, 0.0, moved, (0, 1, 2), tagged, backward)


SPECS = (
    _spec("32768 x 2048", (32768, 2048), "real speed"),
    _spec("8192 x 8192", (8192, 8192), "real speed"),
    _spec("32768 x 768 residual", (32768, 768), "real speed", residual=True),
    _spec("two lines", (3, 5, 256), "small quick", jnp.float32, residual=True),
    _spec("one row", (1, 48), "small awkward"),
    _spec("three columns", (5, 3), "small awkward", jnp.float32),
    _spec("17 x 4099", (17, 4099), "small awkward", residual=True),
    _spec("examples of many rows", (2, 150, 40), "small awkward", jnp.float32, residual=True),
    _spec("vectors for each example", (3, 7, 40), "small awkward", examples=(3,)),
    _spec("no example", (0, 7, 40), "small awkward", jnp.float32),
    _spec("half", (6, 256), "small awkward", jnp.float16),
)
