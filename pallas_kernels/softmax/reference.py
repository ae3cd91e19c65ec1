"""The specification: a few plain lines, differentiated by JAX."""

import jax.numpy as jnp


def softmax(x, *, axis, scale, soft_cap, mask):
    """See the op."""
    exponentials, total, _, _ = _parts(x, axis, scale, soft_cap, mask)
    return jnp.where(total > 0, exponentials / jnp.where(total > 0, total, 1), 0).astype(x.dtype)


def log_softmax(x, *, axis, scale, soft_cap, mask):
    """See the op."""
    _, total, shifted, seen = _parts(x, axis, scale, soft_cap, mask)
    return jnp.where(seen, shifted - jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf).astype(x.dtype)


def _parts(x, axis, scale, soft_cap, mask):
    """`exp(logits - max)` and its sum; `logits - max`, 0 where x is -inf, and where it is not."""
    logits = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * scale
    seen = x != -jnp.inf if mask is None else mask & (x != -jnp.inf)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    # The gradient must not meet inf - inf, which where() alone would let through.
    finite = jnp.where(seen, logits, 0)
    top = jnp.max(finite, axis=axis, keepdims=True, where=seen, initial=-jnp.inf)
    shifted = jnp.where(seen, finite - jnp.where(jnp.isfinite(top), top, 0), 0)
    exponentials = jnp.where(seen, jnp.exp(shifted), 0)
    return exponentials, jnp.sum(exponentials, axis=axis, keepdims=True), shifted, seen
