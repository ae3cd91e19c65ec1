"""For any device: XLA's own fusions, with the shared gradient."""

import jax.numpy as jnp

from crescendo.pallas_kernels.softmax.gradient import Options, differentiable, logits, of_rows


def softmax(x, *, axis, scale, soft_cap, mask):
    """See the op."""
    return differentiable(Options(forward, backward, False, axis, scale, soft_cap), x, mask)


def log_softmax(x, *, axis, scale, soft_cap, mask):
    """See the op."""
    return differentiable(Options(forward, backward, True, axis, scale, soft_cap), x, mask)


def forward(x, mask, options: Options):
    """The results."""
    if x.size == 0:
        return x
    value, seen = logits(x, options.scale, options.soft_cap)
    seen = seen if mask is None else seen & mask
    value = jnp.where(seen, value, -jnp.inf)
    top = jnp.max(value, axis=options.axis, keepdims=True)
    shifted = value - jnp.where(top == -jnp.inf, 0, top)
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=options.axis, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    return (shifted - jnp.log(total) if options.log else exponentials / total).astype(x.dtype)


def backward(y, dy, x, options: Options):
    """The gradient of x."""
    return of_rows(y, dy, x, options, options.axis)
