"""Attention over all keys, from attention over disjoint sets of them."""

import jax
import jax.numpy as jnp


def merge(outs, lses):
    r"""Merges partial results by their log-sum-exp, as of one softmax.

    :math:`\mathrm{lse} = \log \sum_n e^{\mathrm{lse}_n}` and
    :math:`\mathrm{out} = \sum_n e^{\mathrm{lse}_n - \mathrm{lse}} \, \mathrm{out}_n` (Dao et al. 2023, Flash-Decoding;
    Milakov and Gimelshein 2018, arXiv:1805.02867). Differentiable.

    Args:
      outs: `[N, B, T, H, D]`, of N sets of keys.
      lses: `[N, B, H, T]`, float32; -inf where a query sees none of a set.

    Returns:
      `out [B, T, H, D]` and `lse [B, H, T]`, both float32 or wider; 0 and -inf where a query sees no key at all.

    >>> sums = jnp.array([1.0, 3.0])
    >>> out, lse = merge(sums.reshape(2, 1, 1, 1, 1), jnp.log(sums).reshape(2, 1, 1, 1))
    >>> print(round(out.item(), 4), round(jnp.exp(lse).item(), 4))
    2.5 4.0
    """
    exact = jnp.promote_types(outs.dtype, jnp.float32)
    # It cancels, so it has no gradient.
    maximum = jax.lax.stop_gradient(lses.max(0))
    finite = jnp.where(jnp.isfinite(maximum), maximum, 0)
    weights = jnp.exp(lses - finite)
    total = weights.sum(0)
    seen = total != 0  # NaN shows
    safe = jnp.where(seen, total, 1)
    out = (outs.astype(exact) * (weights / safe).swapaxes(2, 3)[..., None]).sum(0)
    return out, jnp.where(seen, jnp.log(safe) + finite, -jnp.inf)
