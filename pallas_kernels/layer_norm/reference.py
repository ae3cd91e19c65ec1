"""The specification: a few plain lines, differentiated by JAX."""

import jax
import jax.numpy as jnp


def layer_norm(x, scale, bias, *, eps, residual):
    """See the op."""
    h = x if residual is None else x + residual
    wide = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    u = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    if scale.ndim == 2:
        scale, bias = (jnp.expand_dims(vector, range(1, x.ndim - 1)) for vector in (scale, bias))
    y = (u * scale + bias).astype(x.dtype)
    return y if residual is None else (y, h)
