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


def visible_pairs(length: int, keys: int, *, causal: bool, window: int | None, segments, first: int = 0) -> float:
    """How many pairs of a query and a key a row of the batch has, in the mean; `first` is the first query's position.

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
    q = first + np.arange(length)
    end = np.minimum(keys, q + (1 if causal or window is None else window))
    begin = 0 if window is None else np.maximum(0, q - window + 1)
    return float(np.maximum(0, end - begin).sum())


def zig_zag(batch: int, length: int) -> np.ndarray:
    """int32 `[batch, length]`: the positions that a device of a ring of two holds, the first and the last quarter."""
    first = np.arange((length + 1) // 2)
    return np.broadcast_to(np.concatenate([first, first[: length // 2] + 3 * (length // 2)]), (batch, length)).astype(
        "i"
    )


def tail(batch: int, length: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries that are the last tokens of a cache, and of its keys, int32."""
    sides = (np.arange(keys - length, keys, dtype=np.int32), np.arange(keys, dtype=np.int32))
    return np.broadcast_to(sides[0], (batch, length)), np.broadcast_to(sides[1], (batch, keys))


def _make(key, *, shape, dtype, segments, bias_shape, hidden, ids, ring, last, begin, kwargs):
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
    if last:
        kwargs["positions"] = tuple(map(jnp.asarray, tail(batch, length, keys)))
    if begin is not None:
        kwargs["positions"] = jnp.int32(begin)
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
    last: bool = False,
    begin: int | None = None,
    by_bytes: bool = False,
    **kwargs,
) -> Spec:
    """A spec of the shape (B, T, S, H, K, D).

    Args:
      mean_tokens: of the documents that each row is packed with, or `segments` as they are.
      ids: draws segment ids below this, unsorted; queries of segment 0 see nothing.
      bias_shape, hidden: of a random bias, and which part of it is -inf.
      ring: positions as a device of a ring holds them.
      last: the queries are the last tokens of a cache.
      begin: how many tokens of a cache the queries follow, where it is told as one number.
      by_bytes: its rate is one of bytes, not of operations.
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
        last=last,
        begin=begin,
        kwargs=kwargs,
    )
    causal, window, first = kwargs.get("causal", False), kwargs.get("window"), keys - length if last else begin or 0
    pairs = visible_pairs(length, keys, causal=causal, window=window, segments=segments, first=first)
    size, flops = jnp.dtype(dtype).itemsize, 0.0 if by_bytes else 4.0 * batch * heads * width * pairs
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
# Few queries over many keys: what decoding asks for.
DECODE: dict[str, tuple[tuple, dict]] = {
    "decode": ((1, 1, 65536, 32, 8, 128), {}),
    "decode-16": ((4, 16, 32768, 32, 8, 128), {"causal": True, "begin": 32752}),
    "decode-64": ((8, 1, 16384, 16, 16, 64), {}),
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
    *(spec(name, shape, "speed", by_bytes=True, **options) for name, (shape, options) in DECODE.items()),
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
    spec("few-queries", (2, 3, 304, 4, 2, 64), "small", "awkward", causal=True, last=True),
    spec("few-queries-window", (1, 5, 200, 6, 2, 128), "awkward", causal=True, last=True, window=70),
    spec("few-queries-begun", (2, 3, 304, 4, 2, 64), "small", "awkward", causal=True, begin=170),
    spec("few-queries-begun-window", (1, 9, 392, 16, 1, 64), "awkward", causal=True, begin=250, window=90),
    spec("few-queries-apart", (2, 6, 328, 2, 1, 64), "awkward", ids=4),
    spec("few-queries-capped", (1, 2, 1100, 6, 1, 128), "awkward", soft_cap=5.0),
    spec("many-heads", (1, 9, 392, 16, 1, 64), "awkward", causal=True),
    spec("packed", (2, 192, 192, 2, 1, 64), "small", "awkward", "quick", causal=True, mean_tokens=48),
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


def _make_prefix(key, *, shape, dtype, kwargs):
    groups, members, length, prefix, keys, heads, kv_heads, width = shape
    parts = jax.random.split(key, 5)
    q = jax.random.normal(parts[0], (groups * members, length, heads, width), dtype)
    of_prefix = (jax.random.normal(part, (groups, prefix, kv_heads, width), dtype) for part in parts[1:3])
    own = (jax.random.normal(part, (groups * members, keys, kv_heads, width), dtype) for part in parts[3:])
    kwargs = dict(kwargs)
    if (of_ids := kwargs.pop("lengths", None)) is not None:
        # Members of different lengths: past its end a member has another segment.
        ends = jnp.asarray(of_ids, jnp.int32)[:, None]
        kwargs["segment_ids"] = (jnp.arange(length)[None] < ends).astype(jnp.int32)
    if kwargs.pop("last", False):
        kwargs["positions"] = tuple(map(jnp.asarray, tail(groups * members, length, keys)))
    return (q, *of_prefix, *own), kwargs


def prefix_spec(name: str, shape: tuple, *tags: str, dtype=jnp.bfloat16, by_bytes: bool = False, **kwargs) -> Spec:
    """A call of `shared_prefix` of the shape (G, members, T, P, S, H, K, D).

    `lengths` of the members give segment ids, and `last` positions.
    """
    groups, members, length, prefix, keys, heads, kv_heads, width = shape
    if {"small", "awkward"} & set(tags):
        kwargs.setdefault("return_lse", True)  # which has a gradient too
    first = keys - length if kwargs.get("last") else 0
    causal = kwargs.get("causal", False)
    pairs = length * prefix + visible_pairs(length, keys, causal=causal, window=None, segments=None, first=first)
    flops = 0.0 if by_bytes else 4.0 * groups * members * heads * width * pairs
    entries = 2 * members * (length * heads + keys * kv_heads) + 2 * prefix * kv_heads
    return Spec(
        name=name,
        make=functools.partial(_make_prefix, shape=shape, dtype=dtype, kwargs=kwargs),
        flops=flops,
        bytes=jnp.dtype(dtype).itemsize * float(groups * width * entries),
        differentiable=(0, 1, 2, 3, 4),
        tags=frozenset(tags),
        backward_flops=2.5 * flops,
    )


PREFIX_SPECS = (
    prefix_spec("answers", (1, 16, 1, 32768, 512, 32, 8, 128), "speed", by_bytes=True),
    prefix_spec("rollouts", (2, 8, 512, 4096, 512, 16, 16, 128), "speed", causal=True),
    prefix_spec("members", (2, 3, 20, 70, 20, 4, 2, 64), "small", "awkward", "quick", causal=True),
    prefix_spec("lengths", (1, 3, 18, 33, 18, 2, 1, 64), "awkward", causal=True, lengths=(18, 1, 7)),
    prefix_spec("later", (2, 2, 3, 1, 40, 6, 2, 32), "awkward", causal=True, last=True, soft_cap=5.0),
    prefix_spec("alone", (1, 1, 1, 5, 1, 2, 2, 64), "small", "awkward", dtype=jnp.float32),
)
SPECS_OF = {"shared_prefix": PREFIX_SPECS}
