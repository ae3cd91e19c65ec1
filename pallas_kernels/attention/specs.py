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
    """How many pairs of a query and a key a row of the batch has, in the mean.

    >>> visible_pairs(4, 4, causal=True, window=2, segments=None)
    7.0
    """
    if segments is not None:
        total = 0.0
        for row in segments:
            sizes = np.unique(row, return_counts=True)[1].astype(float)
            total += (sizes * (sizes + 1) / 2 if causal else sizes**2).sum()
        return total / len(segments)
    if not causal and window is None:
        return float(length * keys)
    q = np.arange(length)
    end = np.minimum(keys, q + (1 if causal or window is None else window))
    begin = 0 if window is None else np.maximum(0, q - window + 1)
    return float(np.maximum(0, end - begin).sum())


def zig_zag(batch: int, length: int) -> np.ndarray:
    """int32 `[batch, length]`: the positions that a device of a ring of two holds, the first and the last quarter."""
    first = np.arange((length + 1) // 2)
    return np.broadcast_to(np.concatenate([first, first[: length // 2] + 3 * (length // 2)]), (batch, length)).astype(
        "i"
    )


def _make(key, *, shape, dtype, segments, bias_shape, hidden, ids, ring, kwargs):
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
        bias = jax.random.normal(parts[3], bias_shape, dtype)
        if hidden:
            # As a mask: some pairs, and all of the first query.
            bias = (
                jnp.where(jax.random.bernoulli(parts[4], hidden, bias_shape), -jnp.inf, bias)
                .at[..., 0, :]
                .set(-jnp.inf)
            )
        kwargs["bias"] = bias
    if ring:
        kwargs["positions"] = jnp.asarray(zig_zag(batch, length)), jnp.asarray(zig_zag(batch, keys))
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
    hidden: float = 0.0,
    ring: bool = False,
    **kwargs,
) -> Spec:
    """A spec of the shape (B, T, S, H, K, D).

    Args:
      mean_tokens: of the documents that each row is packed with, or `segments` as they are.
      ids: draws segment ids below this, unsorted; queries of segment 0 see nothing.
      bias_shape, hidden: of a random bias, and which part of it is -inf.
      ring: positions as a device of a ring holds them.
      kwargs: what `attention` takes besides.
    """
    batch, length, keys, heads, kv_heads, width = shape
    if mean_tokens:
        segments = packed_segments(batch, length, mean_tokens)
    if {"small", "awkward"} & set(tags):
        kwargs.setdefault("return_lse", True)  # which has a gradient too
    make = functools.partial(
        _make,
        shape=shape,
        dtype=dtype,
        segments=segments,
        bias_shape=bias_shape,
        hidden=hidden,
        ids=ids,
        ring=ring,
        kwargs=kwargs,
    )
    pairs = visible_pairs(
        length, keys, causal=kwargs.get("causal", False), window=kwargs.get("window"), segments=segments
    )
    size, flops = jnp.dtype(dtype).itemsize, 4.0 * batch * heads * width * pairs
    return Spec(
        name=name,
        make=make,
        flops=flops,
        bytes=size * float(batch * width * (2 * length * heads + 2 * keys * kv_heads)),
        differentiable=(0, 1, 2),
        tags=frozenset(tags),
        backward_flops=2.5 * flops,  # the scores are computed anew
    )


# The cases of the benchmark's table; the last three are packed rows of short documents.
SPEED: dict[str, tuple[tuple, dict]] = {
    "gpt2": ((16, 1024, 1024, 12, 12, 64), {"causal": True}),
    "llama": ((4, 4096, 4096, 16, 16, 128), {"causal": True}),
    "llama-grouped": ((4, 4096, 4096, 32, 8, 128), {"causal": True}),
    "long": ((1, 32768, 32768, 16, 16, 128), {"causal": True}),
    "full": ((4, 4096, 4096, 16, 16, 128), {}),
    "packed-gpt2": ((16, 1024, 1024, 12, 12, 64), {"causal": True, "mean_tokens": 256}),
    "packed-64": ((4, 8192, 8192, 12, 12, 64), {"causal": True, "mean_tokens": 512}),
    "packed-128": ((4, 8192, 8192, 16, 16, 128), {"causal": True, "mean_tokens": 512}),
}
REAL: dict[str, tuple[tuple, dict]] = {
    "llama-8b": ((1, 8192, 8192, 32, 8, 128), {"causal": True}),
    "llama-70b": ((1, 4096, 4096, 64, 8, 128), {"causal": True}),
    "gemma": ((1, 4096, 4096, 8, 4, 256), {"causal": True, "soft_cap": 50.0}),
    "gemma-local": ((1, 4096, 4096, 8, 4, 256), {"causal": True, "window": 1024, "soft_cap": 50.0}),
    "mistral": ((1, 16384, 16384, 32, 8, 128), {"causal": True, "window": 4096}),
    "vit": ((8, 197, 197, 12, 12, 64), {}),
    "t5": ((8, 512, 512, 12, 12, 64), {"bias_shape": (1, 12, 512, 512), "scale": 1.0}),
}


def scaled(name: str, shape: tuple, options: dict, length: int = 144) -> Spec:
    """The same call on a short row: as many query heads to a key head, as wide, and as many tiles to a window."""
    _, tokens, _, heads, kv_heads, width = shape
    groups = heads // kv_heads
    options = dict(options)
    for option in ("window", "mean_tokens"):
        if option in options:
            options[option] = max(1, options[option] * length // tokens)
    if "bias_shape" in options:
        options["bias_shape"] = (1, groups, length, length)
    return spec(f"{name}-scaled", (1, length, length, groups, 1, width), "awkward", "scaled", **options)


SPECS = (
    *(spec(name, shape, "speed", **options) for name, (shape, options) in SPEED.items()),
    *(spec(name, shape, "real", **options) for name, (shape, options) in REAL.items()),
    *(
        scaled(name, *call)
        for name, call in (SPEED | REAL).items()
        if name not in ("gpt2", "llama", "full", "llama-8b")
    ),
    # Awkward ones, small enough for a reference in float64.
    spec("square", (2, 256, 256, 4, 2, 64), "awkward", causal=True),
    spec("odd", (1, 201, 201, 2, 1, 64), "awkward", causal=True),
    spec("unequal", (1, 100, 333, 2, 2, 64), "small", "awkward"),
    spec("unequal-causal", (1, 333, 100, 2, 1, 64), "awkward", causal=True),
    spec("one-token", (2, 1, 1, 2, 2, 64), "small", "awkward", causal=True),
    spec("one-query", (2, 1, 300, 4, 1, 128), "awkward"),
    spec("packed", (2, 256, 256, 2, 1, 64), "small", "awkward", "quick", causal=True, mean_tokens=48),
    spec("packed-wide", (1, 300, 300, 2, 2, 128), "awkward", causal=True, mean_tokens=40),
    spec("segments-of-one", (1, 130, 130, 2, 2, 64), "awkward", segments=np.arange(130, dtype=np.int32)[None]),
    spec("empty-rows", (1, 130, 210, 2, 2, 64), "small", "awkward", ids=5),
    spec("window", (1, 300, 300, 2, 1, 64), "small", "awkward", causal=True, window=70),
    spec("window-both-ways", (1, 200, 230, 2, 2, 64), "awkward", window=40),
    spec("window-past-the-end", (1, 150, 150, 2, 2, 64), "awkward", causal=True, window=1000),
    spec("capped", (1, 200, 200, 2, 2, 64), "small", "awkward", causal=True, soft_cap=5.0, scale=0.5),
    spec("wide", (1, 200, 200, 4, 2, 128), "awkward", causal=True),
    spec("wide-full", (1, 150, 100, 2, 2, 128), "awkward"),
    spec("width-80", (1, 160, 160, 2, 2, 80), "awkward", causal=True),
    spec("width-96", (1, 160, 160, 4, 2, 96), "awkward", causal=True),
    spec("width-192", (1, 160, 160, 2, 2, 192), "awkward", causal=True),
    spec("width-256", (1, 160, 160, 4, 2, 256), "awkward", causal=True),
    spec("bias", (2, 64, 64, 2, 2, 64), "small", "awkward", bias_shape=(1, 2, 64, 64)),
    spec("bias-of-keys", (2, 50, 70, 2, 2, 64), "awkward", bias_shape=(2, 1, 1, 70), causal=True),
    spec("bias-shared", (2, 90, 150, 4, 2, 64), "awkward", bias_shape=(1, 1, 90, 150), soft_cap=5.0),
    # Of a bias that all keys share only the log-sum-exp has a gradient.
    spec("bias-of-queries", (1, 150, 150, 4, 2, 64), "awkward", bias_shape=(1, 4, 150, 1), causal=True, soft_cap=5.0),
    spec("bias-hides", (2, 90, 150, 4, 2, 64), "awkward", bias_shape=(2, 4, 90, 150), hidden=0.3),
    spec("ring", (2, 160, 160, 2, 1, 64), "awkward", ring=True, causal=True, mean_tokens=50),
    spec("ring-window", (1, 101, 203, 2, 2, 64), "awkward", ring=True, causal=True, window=90),
    spec("float32", (1, 100, 130, 2, 1, 64), "awkward", dtype=jnp.float32, causal=True),
    spec("half", (1, 200, 200, 2, 2, 64), "awkward", dtype=jnp.float16, causal=True),
)
# In an interpreter, and in small calls: several blocks to each side, and a key head a part.
FINE = {"on TPU": {"block": 128}, "chunks of keys": {"keys": 64}, "scores that are kept": {"usual_bytes": 1}}
