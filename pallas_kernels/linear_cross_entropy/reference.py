"""The specification: logits in full, differentiated by JAX."""

import jax
import jax.numpy as jnp


def linear_cross_entropy(options, x, w, labels, weights):
    """See the op. `x` and `w` are multiplied as they are, in at least float32."""
    vocab_axis, soft_cap, label_smoothing = options.vocab_axis, options.soft_cap, options.label_smoothing
    wide = jnp.promote_types(x.dtype, jnp.float32)
    vocab_size = w.shape[0]
    if vocab_axis is not None:
        w = jax.lax.all_gather(w, vocab_axis, tiled=True)
        vocab_size = w.shape[0]
    if w.dtype != x.dtype:
        # Rounded to x's dtype, but its gradient isn't.
        rounding = jnp.where(jnp.isfinite(w), w.astype(x.dtype).astype(wide) - w.astype(wide), 0)
        w = w.astype(wide) + jax.lax.stop_gradient(rounding)
    logits = jnp.dot(x.astype(wide), w.astype(wide).T, precision="highest")
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = (1 - label_smoothing) * jax.nn.one_hot(labels, vocab_size, dtype=wide) + label_smoothing / vocab_size
    losses = lse - jnp.sum(target * logits, axis=-1) + options.z_loss * jnp.square(lse)
    totals = jnp.sum(jnp.where(weights == 0, 0, weights * losses)), jnp.sum(weights)
    return (*totals, lse) if options.return_lse else totals
