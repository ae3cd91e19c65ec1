"""For any device: XLA's own fusions, with the shared gradient."""

import jax.numpy as jnp

from crescendo.pallas_kernels.rows import Passes
from crescendo.pallas_kernels.softmax.gradient import Call, logits, of_rows


def softmax(**_):
    """See the op."""
    return KERNELS


log_softmax = softmax


def forward(call: Call, x, mask):
    """The results."""
    if x.size == 0:
        return (x,)
    value, seen = logits(x, call.scale, call.soft_cap)
    seen = seen if mask is None else seen & mask
    value = jnp.where(seen, value, -jnp.inf)
    top = jnp.max(value, axis=call.axis, keepdims=True)
    shifted = value - jnp.where(top == -jnp.inf, 0, top)
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=call.axis, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    return ((shifted - jnp.log(total) if call.log else exponentials / total).astype(x.dtype),)


def backward(call: Call, y, dy, x):
    """The gradient of x."""
    return (of_rows(y, dy, x, call, call.axis),)


KERNELS = Passes(forward, backward, split_by_xla=True)
