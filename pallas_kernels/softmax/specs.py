"""Calls of real and of awkward shapes, for `softmax` and `log_softmax`."""

import functools

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.op import Spec


def _make(shape, dtype, options, key):
    keys = jax.random.split(key, 2)
    x = 4 * jax.random.normal(keys[0], shape, dtype)
    options = dict(options)
    if options.pop("holes", False):
        # -inf in a tenth of the entries, and all of the first row.
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        x = jnp.where((jax.random.uniform(keys[1], shape) < 0.1) | (row == 0), -jnp.inf, x)
    if options.pop("masked", False):
        options["mask"] = jax.random.bernoulli(keys[1], 0.5, shape[1:])
    return (x,), options


def _spec(name, shape, tags, dtype=jnp.bfloat16, **options) -> Spec:
    size = jnp.dtype(dtype).itemsize
    for dimension in shape:
        size *= dimension
    return Spec(name, functools.partial(_make, shape, dtype, options), 0.0, 2.0 * size, (0,), frozenset(tags.split()))


SPECS = (
    *(
        _spec(f"{rows} x {columns} {jnp.dtype(dtype).name}", (rows, columns), "real speed", dtype)
        for rows, columns in ((16384, 1024), (8192, 8192), (8192, 32768), (2048, 131072), (256, 1048576))
        for dtype in (jnp.bfloat16, jnp.float32)
    ),
    _spec("one row", (1, 300), "small awkward quick"),
    _spec("whole lines", (7, 1280), "small quick", jnp.float32, holes=True, scale=0.5),
    _spec("one column", (5, 1), "small awkward", jnp.float32),
    _spec("17 x 4099", (17, 4099), "small awkward", holes=True),
    _spec("three axes", (3, 5, 40), "small awkward", jnp.float32, masked=True, axis=1),
    _spec("capped", (6, 257), "small awkward quick", jnp.float32, holes=True, scale=0.5, soft_cap=3.0),
    _spec("turned over", (6, 257), "small awkward", jnp.float32, holes=True, scale=-0.5, soft_cap=3.0),
    _spec("no axis to split", (77,), "small awkward", jnp.float16),
)
