"""Calls of real and of awkward shapes: N rows of width D, a vocabulary of V."""

import functools

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.op import Spec


def _make(n, d, v, options, key):
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (n, d), jnp.bfloat16)
    # Logits of standard deviation 1, as a model's are after its first steps.
    w = (jax.random.normal(keys[1], (v, d)) * d**-0.5).astype(jnp.bfloat16)
    labels = jax.random.randint(keys[2], (n,), 0, v)
    options = dict(options)
    if options.pop("weighted", False):
        options["weights"] = jax.random.uniform(keys[3], (n,))
        options["ignore_id"] = 0
    return (x, w, labels), options


def _spec(name, n, d, v, tags, **options) -> Spec:
    flops, nbytes = 2.0 * n * d * v, 2.0 * (n * d + v * d)
    return Spec(name, functools.partial(_make, n, d, v, options), flops, nbytes, (0, 1), frozenset(tags.split()))


EVERY_OPTION = {"weighted": True, "z_loss": 1e-2, "label_smoothing": 0.1}
SPECS = (
    _spec("8192 x 768 x 50304", 8192, 768, 50304, "real speed"),
    _spec("8192 x 2048 x 128256", 8192, 2048, 128256, "real speed"),
    _spec("16384 x 4096 x 128256", 16384, 4096, 128256, "real speed"),
    _spec("gpt2 vocabulary", 1024, 768, 50257, "real awkward", z_loss=1e-4),
    _spec("one row", 1, 64, 513, "small awkward", **EVERY_OPTION),
    _spec("no row", 0, 64, 513, "small awkward", z_loss=1e-2),
    _spec("one column", 5, 1, 7, "small awkward"),
    _spec("one class", 5, 8, 1, "small awkward", z_loss=1e-2),
    _spec("17 x 64 x 4099", 17, 64, 4099, "small awkward", **EVERY_OPTION),
    _spec("whole tiles", 256, 256, 384, "small", **EVERY_OPTION),
    _spec("capped", 33, 128, 300, "small awkward quick", soft_cap=3.0, **EVERY_OPTION),
)
# In small calls: at most four rows a chunk.
FINE = {"chunks": {"bytes": 0, "most_bytes": 0, "least_rows": 4, "alignment": 1}}
