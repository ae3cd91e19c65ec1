"""Calls of real and of awkward shapes."""

import functools
import math

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.op import Spec


def _make(shape, dtype, key):
    return tuple(2 * jax.random.normal(k, shape, dtype) for k in jax.random.split(key)), {}


def _spec(name, shape, tags, dtype=jnp.bfloat16) -> Spec:
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    make, tagged = functools.partial(_make, shape, dtype), frozenset(tags.split())
    return Spec(name, make, 0.0, 3.0 * size, (0, 1), tagged, 5.0 * size)


SPECS = (
    _spec("124m", (32, 1024, 2048), "real speed"),
    _spec("1b", (4, 2048, 8192), "real speed"),
    _spec("8192 x 14336", (8192, 14336), "real speed"),
    _spec("one row", (1, 48), "small awkward"),
    _spec("one entry", (1,), "small awkward", jnp.float32),
    _spec("17 x 4099", (17, 4099), "small awkward"),
    _spec("three axes", (3, 6, 128), "small awkward quick", jnp.float32),
    _spec("half", (6, 256), "small awkward", jnp.float16),
)
