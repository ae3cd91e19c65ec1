"""Chunked, for any device: XLA's matmuls and fusions."""

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.linear_cross_entropy import chunked
from crescendo.pallas_kernels.op import gradient_dtype


def linear_cross_entropy(**_):
    """See the op."""
    return KERNELS


def logit_pass(x, w, labels, coefficients, options: chunked.Options) -> chunked.Rows:
    """The rows' log-sum-exps and target logits, and the gradient of their logits; rows may have several axes."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    axis, cap, smoothing = options.vocab_axis, options.soft_cap, options.label_smoothing
    vocab_size = options.vocab_size(w)
    first = 0 if axis is None else jax.lax.axis_index(axis) * w.shape[0]
    logits = jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=wide)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    is_label = labels[..., None] == first + jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    top = _all(jax.lax.pmax, jax.lax.stop_gradient(jnp.max(logits, axis=-1)), axis)
    # All entries -inf, or one +inf: as jax.nn.logsumexp, and no NaN from inf - inf.
    top = jnp.where(jnp.isfinite(top), top, 0)
    total = _all(jax.lax.psum, jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), axis)
    target_logit = (1 - smoothing) * _all(jax.lax.psum, jnp.sum(jnp.where(is_label, logits, 0), axis=-1), axis)
    if smoothing:
        target_logit += smoothing / vocab_size * _all(jax.lax.psum, jnp.sum(logits, axis=-1), axis)
    lse = jnp.log(total) + top
    if coefficients is None:
        return chunked.Rows(lse, target_logit, None)
    factor = (coefficients.constant + coefficients.lse * lse)[..., None]
    target = jnp.where(is_label, 1 - smoothing + smoothing / vocab_size, smoothing / vocab_size)
    gradient = factor * jnp.exp(logits - lse[..., None]) - coefficients.target[..., None] * target
    if cap is not None:
        gradient *= 1 - jnp.square(logits / cap)
    return chunked.Rows(lse, target_logit, gradient.astype(gradient_dtype(x.dtype)))


KERNELS = chunked.Kernels(
    logit_pass,
    bytes_per_logit=lambda dtype: jnp.promote_types(dtype, jnp.float32).itemsize + gradient_dtype(dtype).itemsize,
)


def _all(reduce, value, axis):
    return value if axis is None else reduce(value, axis)
