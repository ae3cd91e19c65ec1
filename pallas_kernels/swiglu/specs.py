"""Calls of real and of awkward shapes."""

import functools
import math

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.op import Spec


def _make(shape, dtype, both, key):
    gate_up = 2 * jax.random.normal(key, (*shape[:-1], 2, shape[-1]), dtype)
    return (gate_up,) if both else (gate_up[..., 0, :], gate_up[..., 1, :]), {}


def _spec(name, shape, tags, dtype=jnp.bfloat16, *, both=False) -> Spec:
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    make, tagged = functools.partial(_make, shape, dtype, both), frozenset(tags.split())
    return Spec(name, make, 0.0, 3.0 * size, (0,) if both else (0, 1), tagged, 5.0 * size)


SPECS = (
    _spec("124m", (32, 1024, 2048), "real speed"),
    _spec("1b", (4, 2048, 8192), "real speed"),
    _spec("8192 x 14336", (8192, 14336), "real speed"),
    _spec("124m side by side", (32, 1024, 2048), "real speed", both=True),
    _spec("side by side", (3, 5, 384), "small awkward quick", both=True),
    _spec("side by side, 17 x 4099", (17, 4099), "small awkward", both=True),
    _spec("one row", (1, 48), "small awkward"),
    _spec("one entry", (1,), "small awkward", jnp.float32),
    _spec("17 x 4099", (17, 4099), "small awkward"),
    _spec("three axes", (3, 6, 128), "small awkward quick", jnp.float32),
    _spec("half", (6, 256), "small awkward", jnp.float16),
)
