"""The specification: a few plain lines, differentiated by JAX."""

import jax.numpy as jnp


def softmax(x, *, axis, scale, soft_cap, mask):
    """See the op."""
    exponentials, total, _, seen = _parts(x, axis, scale, soft_cap, mask)
    return jnp.where(seen, exponentials / jnp.where(total == 0, 1, total), 0).astype(x.dtype)


def log_softmax(x, *, axis, scale, soft_cap, mask):
    """See the op."""
    _, total, shifted, seen = _parts(x, axis, scale, soft_cap, mask)
    return jnp.where(seen, shifted - jnp.log(jnp.where(total == 0, 1, total)), -jnp.inf).astype(x.dtype)


def _parts(x, axis, scale, soft_cap, mask):
    """`exp(logits - max)` and its sum; `logits - max`, 0 where an entry counts nothing, and where it counts."""
    seen = x != -jnp.inf if mask is None else mask & (x != -jnp.inf)
    # First of all: the gradient must not meet what isn't finite, which where() alone would let through.
    logits = jnp.where(seen, x, 0).astype(jnp.promote_types(x.dtype, jnp.float32)) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    top = jnp.max(logits, axis=axis, keepdims=True, where=seen, initial=-jnp.inf)
    shifted = jnp.where(seen, logits - jnp.where(jnp.isfinite(top), top, 0), 0)
    exponentials = jnp.where(seen, jnp.exp(shifted), 0)
    return exponentials, jnp.sum(exponentials, axis=axis, keepdims=True), shifted, seen
