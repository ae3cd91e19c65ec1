"""Calls of real and of awkward shapes: the same ones drive the tests, the benchmark and the tuning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from crescendo.pallas_kernels.op import Spec


def packed_segments(batch: int, length: int, mean_tokens: int, seed: int = 0) -> np.ndarray:
    """int32 `[batch, length]`: documents of exponential length from 1 on, and some padding (0) at the end."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        at, document = 0, 1
        while at < length - mean_tokens // 8:
            size = int(np.clip(rng.exponential(mean_tokens), 1, length))
            row[at : at + size] = document
            at, document = at + size, document + 1
    return segments


def visible_pairs(length: int, keys: int, *, causal: bool, window: int | None, segments) -> float:
    """How many pairs of a query and a key a row of the batch has, in the mean."""
    q, k = np.arange(length)[:, None], np.arange(keys)[None]
    if segments is not None:
        total = 0.0
        for row in segments:
            sizes = np.unique(row, return_counts=True)[1].astype(float)
            total += (sizes * (sizes + 1) / 2 if causal else sizes**2).sum()
        return total / len(segments)
    if not causal and window is None:
        return float(length * keys)
    if causal and window is None and length == keys:
        return length * (length + 1) / 2
    near = q - k >= 0 if causal else k - q < (window or 0)
    return float((near if window is None else near & (q - k < window)).sum())


def _make(key, *, shape, dtype, segments, bias_shape, ids, kwargs):
    batch, length, keys, heads, kv_heads, width = shape
    parts = jax.random.split(key, 5)
    q = jax.random.normal(parts[0], (batch, length, heads, width), dtype)
    k, v = (jax.random.normal(part, (batch, keys, kv_heads, width), dtype) for part in parts[1:3])
    kwargs = dict(kwargs)
    if segments is not None:
        kwargs["segment_ids"] = jnp.asarray(segments)
    if ids:
        # Unsorted, and some of the queries' ids are no key's: those rows see nothing.
        q_ids = jax.random.randint(parts[3], (batch, length), 0, ids)
        kwargs["segment_ids"] = (q_ids, jax.random.randint(parts[4], (batch, keys), 1, ids))
    if bias_shape is not None:
        kwargs["bias"] = jax.random.normal(parts[3], bias_shape, dtype)
    return (q, k, v), kwargs


def spec(
    name: str,
    shape: tuple[int, int, int, int, int, int],
    *tags: str,
    dtype=jnp.bfloat16,
    mean_tokens: int = 0,
    segments=None,
    ids: int = 0,
    bias_shape=None,
    **kwargs,
) -> Spec:
    """A spec of the shape (B, T, S, H, K, D)."""
    batch, length, keys, heads, kv_heads, width = shape
    if mean_tokens:
        segments = packed_segments(batch, length, mean_tokens)
    make = functools.partial(
        _make, shape=shape, dtype=dtype, segments=segments, bias_shape=bias_shape, ids=ids, kwargs=kwargs
    )
    pairs = visible_pairs(
        length, keys, causal=kwargs.get("causal", False), window=kwargs.get("window"), segments=segments
    )
    size = jnp.dtype(dtype).itemsize
    return Spec(
        name=name,
        make=make,
        flops=4.0 * batch * heads * width * pairs,
        bytes=size * float(batch * width * (2 * length * heads + 2 * keys * kv_heads)),
        differentiable=(0, 1, 2),
        tags=frozenset(tags),
    )


SPECS = (
    # Those that are timed beside peers; the last three are packed rows of short documents.
    spec("gpt2", (16, 1024, 1024, 12, 12, 64), "speed", causal=True),
    spec("llama", (4, 4096, 4096, 16, 16, 128), "speed", causal=True),
    spec("llama-grouped", (4, 4096, 4096, 32, 8, 128), "speed", causal=True),
    spec("long", (1, 32768, 32768, 16, 16, 128), "speed", causal=True),
    spec("full", (4, 4096, 4096, 16, 16, 128), "speed"),
    spec("packed-gpt2", (16, 1024, 1024, 12, 12, 64), "speed", causal=True, mean_tokens=256),
    spec("packed-64", (4, 8192, 8192, 12, 12, 64), "speed", causal=True, mean_tokens=512),
    spec("packed-128", (4, 8192, 8192, 16, 16, 128), "speed", causal=True, mean_tokens=512),
    # Real models.
    spec("llama-8b", (1, 8192, 8192, 32, 8, 128), "real", causal=True),
    spec("llama-70b", (1, 4096, 4096, 64, 8, 128), "real", causal=True),
    spec("gemma-local", (1, 4096, 4096, 8, 4, 256), "real", causal=True, window=1024, soft_cap=50.0),
    spec("vit", (8, 197, 197, 12, 12, 64), "real"),
    # Awkward ones, small enough for a reference in float64.
    spec("square", (2, 256, 256, 4, 2, 64), "small", causal=True),
    spec("odd", (1, 201, 201, 2, 1, 64), "small", "awkward", causal=True),
    spec("unequal", (1, 100, 333, 2, 2, 64), "small", "awkward"),
    spec("unequal-causal", (1, 333, 100, 2, 1, 64), "awkward", causal=True),
    spec("one-token", (2, 1, 1, 2, 2, 64), "small", "awkward", causal=True),
    spec("one-query", (2, 1, 300, 4, 1, 128), "awkward"),
    spec("packed", (2, 256, 256, 2, 1, 64), "small", "awkward", causal=True, mean_tokens=48),
    spec("packed-wide", (1, 300, 300, 2, 2, 128), "awkward", causal=True, mean_tokens=40),
    spec("segments-of-one", (1, 130, 130, 2, 2, 64), "awkward", segments=np.arange(130, dtype=np.int32)[None]),
    spec("empty-rows", (1, 130, 210, 2, 2, 64), "small", "awkward", ids=5),
    spec("window", (1, 300, 300, 2, 1, 64), "small", "awkward", causal=True, window=70),
    spec("window-both-ways", (1, 200, 230, 2, 2, 64), "awkward", window=40),
    spec("window-past-the-end", (1, 150, 150, 2, 2, 64), "awkward", causal=True, window=1000),
    spec("capped", (1, 200, 200, 2, 2, 64), "small", "awkward", causal=True, soft_cap=5.0, scale=0.5),
    spec("width-80", (1, 160, 160, 2, 2, 80), "awkward", causal=True),
    spec("width-96", (1, 160, 160, 4, 2, 96), "awkward", causal=True),
    spec("width-192", (1, 160, 160, 2, 2, 192), "awkward", causal=True),
    spec("width-256", (1, 160, 160, 4, 2, 256), "awkward", causal=True),
    spec("bias", (2, 64, 64, 2, 2, 64), "small", "awkward", bias_shape=(1, 2, 64, 64)),
    spec("bias-of-keys", (2, 50, 70, 2, 2, 64), "awkward", bias_shape=(2, 1, 1, 70), causal=True),
    spec("half", (1, 200, 200, 2, 2, 64), "awkward", dtype=jnp.float16, causal=True),
)
