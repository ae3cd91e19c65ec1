"""Chunked over the keys with an online softmax, on any device; memory linear in the length, backward too."""

import dataclasses

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.attention.contract import (
    Config,
    Kernels,
    Operands,
    only_finite,
    positions,
    seen_pairs,
    taint,
    visible,
)
from crescendo.pallas_kernels.attention.tiles import tuned
from crescendo.pallas_kernels.op import gradient_dtype
from crescendo.pallas_kernels.sharded import results_of


@dataclasses.dataclass(frozen=True)
class Chunk:
    """How a call is cut up: `keys` at a time."""

    keys: int = 512


def attention(config: Config, operands: Operands) -> Kernels:
    del config, operands  # any will do
    return Kernels(forward, backward, split_by_xla=True)


def _chunks(config: Config, operands: Operands):
    """Everything with a key dimension, cut into chunks on a leading axis, and the chunks' first keys."""
    _, _, keys, *_ = operands.dims
    chunk = min(tuned("chunks of keys", config, operands, Chunk()).keys, keys)
    count = -(-keys // chunk)

    def cut(array, axis):
        if array is None or array.shape[axis] != keys:
            return None
        pad = [(0, 0)] * array.ndim
        pad[axis] = (0, count * chunk - array.shape[axis])
        padded = jnp.pad(array, pad)
        shape = (*array.shape[:axis], count, chunk, *array.shape[axis + 1 :])
        return jnp.moveaxis(padded.reshape(shape), axis, 0)

    parts = {
        "k": cut(operands.k, 1),
        "v": cut(operands.v, 1),
        "bias": cut(operands.bias, 3),
        "segments": _rows(operands.k_segments, count, chunk),
        "positions": _rows(positions(operands)[1], count, chunk),
        "first": jnp.arange(count, dtype=jnp.int32) * chunk,
    }
    return parts


def _rows(array, count, chunk):
    """`[B, S]` as `[count, B, chunk]`."""
    if array is None:
        return None
    padded = jnp.pad(jnp.asarray(array), ((0, 0), (0, count * chunk - array.shape[1])))
    return jnp.moveaxis(padded.reshape(array.shape[0], count, chunk), 1, 0)


def _scores(config: Config, operands: Operands, grouped, part, exact):
    """Scores of one chunk, float `[B, K, G, T, chunk]`, -inf where unseen, and the capped part's derivative or None.

    The third result is which pairs are seen, broadcasting to the scores, or None where all are.
    """
    _, _, keys, heads, kv_heads, _ = operands.dims
    scores = config.scale * jnp.einsum("btkgd,bskd->bkgts", grouped, part["k"], preferred_element_type=exact)
    slope = None
    if config.soft_cap is not None:
        capped = jnp.tanh(scores / config.soft_cap)
        scores, slope = config.soft_cap * capped, 1 - capped**2
    bias = operands.bias if part["bias"] is None else part["bias"]
    if bias is not None:
        scores = scores + _grouped_bias(bias.astype(exact), kv_heads, heads // kv_heads)
    chunk = part["k"].shape[1]
    mask = part["first"] + jnp.arange(chunk) < keys
    near = visible(config, operands.q_segments, part["segments"], positions(operands)[0], part["positions"])
    seen = seen_pairs(bias, near)
    if seen is not None:
        seen = _grouped_bias(seen, kv_heads, heads // kv_heads)
        mask = mask & seen
    return jnp.where(mask, scores, -jnp.inf), slope, seen


def _grouped_bias(bias, kv_heads, groups):
    """`[B, H, T, S]` as `[B, K, G, T, S]`, where each size may be 1."""
    split = (1, 1) if bias.shape[1] == 1 else (kv_heads, groups)
    return bias.reshape(bias.shape[0], *split, *bias.shape[2:])


def _grouped(array, kv_heads):
    """`[B, T, H, D]` as `[B, T, K, G, D]`."""
    return array.reshape(*array.shape[:2], kv_heads, -1, array.shape[-1])


def forward(config: Config, operands: Operands):
    q, _, v = operands[:3]
    batch, length, _, heads, kv_heads, width = operands.dims
    exact = jnp.promote_types(q.dtype, jnp.float32)
    grouped = _grouped(q, kv_heads)
    parts = _chunks(config, operands)

    def step(carry, part):
        maximum, total, out = carry
        scores, _, seen = _scores(config, operands, grouped, part, exact)
        new = jnp.maximum(maximum, scores.max(-1))
        safe = jnp.where(jnp.isfinite(new), new, 0)
        weights = jnp.exp(scores - safe[..., None])
        shrink = jnp.exp(maximum - safe)
        total = total * shrink + weights.sum(-1)
        values = part["v"]
        if seen is not None:
            weights = jnp.where(seen, weights + taint(values, exact).mT[:, :, None, None], 0)
            values = only_finite(values)
        mixed = jnp.einsum("bkgts,bskd->bkgtd", weights.astype(v.dtype), values, preferred_element_type=exact)
        return (new, total, out * shrink[..., None] + mixed), None

    # Made from the queries, so that it has their sharding.
    out = jnp.zeros_like(jnp.moveaxis(grouped, 1, 3), dtype=exact)
    start = jnp.full_like(out[..., 0], -jnp.inf), out[..., 0], out
    (maximum, total, out), _ = jax.lax.scan(step, results_of(operands, start), parts)
    seen = total != 0  # NaN shows
    out = out / jnp.where(seen, total, 1)[..., None]
    lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1)) + jnp.where(seen, maximum, 0), -jnp.inf)
    out = jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width)
    return out.astype(q.dtype), lse.reshape(batch, heads, length)


def backward(config: Config, operands: Operands, lse, dout, delta, _out=None):
    q, k, v, bias = operands[:4]
    batch, length, keys, heads, kv_heads, _ = operands.dims
    groups = heads // kv_heads
    exact = jnp.promote_types(q.dtype, jnp.float32)
    grouped, dout = _grouped(q, kv_heads), _grouped(dout, kv_heads)
    lse = jnp.where(jnp.isfinite(lse), lse, jnp.inf).reshape(batch, kv_heads, groups, length, 1)
    delta = delta.reshape(batch, kv_heads, groups, length, 1)
    parts, narrow = _chunks(config, operands), gradient_dtype(q.dtype)
    of_v, of_q, of_dout = only_finite(dout), only_finite(grouped), jnp.moveaxis(taint(dout, exact), 1, 3)[..., None]

    def product(letters, left, right):
        return jnp.einsum(letters, left.astype(narrow), right.astype(narrow), preferred_element_type=exact)

    def step(dq, part):
        scores, slope, seen = _scores(config, operands, grouped, part, exact)
        weights = jnp.exp(scores - lse)
        dweights = jnp.einsum("btkgd,bskd->bkgts", dout, part["v"], preferred_element_type=exact)
        dscores = weights * (dweights - delta)
        weights = weights + of_dout
        if seen is not None:
            weights, dscores = jnp.where(seen, weights, 0), jnp.where(seen, dscores, 0)
            slope = None if slope is None else jnp.where(seen, slope, 0)
        dv = product("bkgts,btkgd->bskd", weights, of_v)
        dbias = None
        if bias is not None:
            dbias = dscores.reshape(batch, heads, length, -1)
            axes = tuple(axis for axis in range(3) if bias.shape[axis] == 1)
            dbias = dbias.sum(axes, keepdims=True)
        dscores = config.scale * (dscores if slope is None else dscores * slope)
        dk = product("bkgts,btkgd->bskd", dscores, of_q)
        dq = dq + product("bkgts,bskd->btkgd", dscores, only_finite(part["k"]))
        return dq, (dk, dv, dbias)

    dq, (dk, dv, dbias) = jax.lax.scan(step, results_of(operands, jnp.zeros_like(grouped, dtype=exact)), parts)

    def joined(array, axis):
        array = jnp.moveaxis(array, 0, axis)
        return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])

    dk, dv = joined(dk, 1)[:, :keys], joined(dv, 1)[:, :keys]
    if bias is not None:
        dbias = joined(dbias, 3)[..., :keys]
        dbias = (dbias.sum(3, keepdims=True) if bias.shape[3] == 1 else dbias).astype(bias.dtype)
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias
