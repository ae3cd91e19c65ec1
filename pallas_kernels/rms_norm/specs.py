"""Calls of real and of awkward shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.op import Spec


def _norm(shape, dtype, options, key):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], shape, dtype)
    scale = 1 + 0.1 * jax.random.normal(keys[1], (*options.get("examples", ()), shape[-1]))
    extra: dict[str, Any] = {"eps": 1e-5}
    if "residual" in options:
        extra["residual"] = jax.random.normal(keys[2], shape, dtype)
    if "probe" in options:
        extra["probe"] = jnp.zeros(shape[0])
    return (x, scale), extra


def _spec(name, shape, tags, dtype=jnp.bfloat16, slack=1.0, **options) -> Spec:
    size = jnp.dtype(dtype).itemsize
    for dimension in shape:
        size *= dimension
    make, tagged = functools.partial(_norm, shape, dtype, options), frozenset(tags.split())
    # Of x, a residual, y and their sum; backward of that, both cotangents and one gradient for both.
    moved, backward = (4.0 * size, 4.0 * size) if "residual" in options else (2.0 * size, 3.0 * size)
    return Spec(name, make, 0.0, moved, (0, 1), tagged, backward, slack=slack)


SPECS = (
    _spec("32768 x 2048", (32768, 2048), "real speed"),
    _spec("8192 x 8192", (8192, 8192), "real speed"),
    _spec("32768 x 768 residual", (32768, 768), "real speed", residual=True),
    _spec("32768 x 2048 residual", (32768, 2048), "real speed", residual=True),
    _spec("one row", (1, 48), "small awkward"),
    # x / rms(x) is a sign there, whose gradient vanishes but for epsilon: what is left of it is rounding.
    _spec("one column", (5, 1), "small awkward", jnp.float32, slack=50),
    _spec("17 x 4099", (17, 4099), "small awkward quick", residual=True),
    _spec("whole lines", (2, 5, 1152), "small quick", residual=True, probe=True),
    _spec("examples", (3, 7, 40), "small awkward", residual=True, probe=True),
    _spec("examples of many rows", (2, 150, 40), "small awkward", residual=True, probe=True),
    _spec("a scale for each example", (3, 7, 40), "small awkward", jnp.float32, examples=(3,)),
    _spec("no example", (0, 7, 40), "small awkward", jnp.float32, probe=True),
)


def _rotary(shape, kv_heads, key):
    keys = jax.random.split(key, 5)
    batch, length, _, width = shape
    q = jax.random.normal(keys[0], shape, jnp.bfloat16)
    k = jax.random.normal(keys[1], (batch, length, kv_heads, width), jnp.bfloat16)
    scales = (1 + 0.1 * jax.random.normal(key, (width,)) for key in keys[2:4])
    angle = 3 * jax.random.normal(keys[4], (batch, length, width // 2))
    return (q, k, *scales, jnp.cos(angle), jnp.sin(angle)), {"eps": 1e-5}


def _heads(name, shape, kv_heads, tags, slack=1.0) -> Spec:
    batch, length, heads, width = shape
    nbytes = 2.0 * 2 * batch * length * (heads + kv_heads) * width + 4.0 * batch * length * width
    make = functools.partial(_rotary, shape, kv_heads)
    return Spec(name, make, 0.0, nbytes, (0, 1, 2, 3), frozenset(tags.split()), slack=slack)


ROTARY_SPECS = (
    _heads("llama 8b", (4, 4096, 32, 128), 8, "real speed"),
    _heads("gpt-2", (16, 1024, 12, 64), 12, "real speed"),
    _heads("width 80", (2, 5, 3, 80), 1, "small awkward"),
    _heads("many heads", (2, 300, 3, 16), 2, "small quick"),
    # In a row of two entries the gradient is what is left of a difference.
    _heads("one token", (1, 1, 1, 2), 1, "small awkward", slack=3),
)
SPECS_OF = {"qk_norm_rotary": ROTARY_SPECS}
