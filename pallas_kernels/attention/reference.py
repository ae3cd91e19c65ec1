"""The specification: all of the matrix of scores, in float32 (float64 for float64 inputs)."""

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.attention.contract import Operands, only_finite, positions, seen_pairs, taint, visible


def attention(config, operands: Operands):
    q, k, v, bias, q_segments, k_segments, *_ = operands
    batch, length, keys, heads, kv_heads, width = operands.dims
    exact = jnp.promote_types(q.dtype, jnp.float32)
    pairs = seen_pairs(bias, visible(config, q_segments, k_segments, *positions(operands)))
    of_scores: jax.typing.ArrayLike = 0
    of_values: jax.typing.ArrayLike = 0
    if pairs is not None:
        of_keys, of_values = (jnp.repeat(taint(x, exact), heads // kv_heads, axis=2).mT[:, :, None] for x in (k, v))
        of_scores = taint(q, exact).mT[..., None] + of_keys
        q, k, v = only_finite(q), only_finite(k), only_finite(v)
    grouped = q.astype(exact).reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = config.scale * jnp.einsum("btkgd,bskd->bkgts", grouped, k.astype(exact))
    scores = scores.reshape(batch, heads, length, keys)
    if pairs is not None:
        scores = jnp.where(pairs, scores + of_scores, 0)
    if config.soft_cap is not None:
        scores = config.soft_cap * jnp.tanh(scores / config.soft_cap)
    if bias is not None:
        scores = scores + bias.astype(exact)
    if pairs is not None:
        scores = jnp.where(pairs, scores, -jnp.inf)
    # A row that sees nothing (its maximum is -inf) gives 0, and so do its gradients.
    # The maximum cancels, so it has no gradient; its own would be NaN where a compiler rounds the scores twice.
    maximum = jax.lax.stop_gradient(scores.max(-1, keepdims=True, initial=-jnp.inf))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(maximum), maximum, 0))
    total = weights.sum(-1, keepdims=True)
    seen = total != 0  # NaN shows
    safe = jnp.where(seen, total, 1)
    lse = jnp.where(seen, jnp.log(safe) + jnp.where(seen, maximum, 0), -jnp.inf)[..., 0]
    weights = weights / safe
    if pairs is not None:
        weights = jnp.where(pairs, weights + of_values, 0)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, length, keys)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v.astype(exact)).reshape(batch, length, heads, width).astype(q.dtype)
    return (out, lse.swapaxes(1, 2)) if config.return_lse else out
