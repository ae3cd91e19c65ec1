"""A shared prefix by two calls of `attention`, of whatever implementations serve them."""

import jax.numpy as jnp

from crescendo.pallas_kernels.attention.merging import merge
from crescendo.pallas_kernels.attention.op import attention


def shared_prefix(q, prefix, own, options, return_lse: bool):
    scores = {name: options[name] for name in ("scale", "soft_cap")}
    members = q.reshape(prefix[0].shape[0], -1, *q.shape[2:])
    of_prefix, prefix_lse = attention(members, *prefix, **scores, return_lse=True)
    of_own, own_lse = attention(q, *own, **options, return_lse=True)
    lses = jnp.stack([prefix_lse.reshape(own_lse.shape), own_lse]).swapaxes(2, 3)
    out, lse = merge(jnp.stack([of_prefix.reshape(q.shape), of_own]), lses)
    out = out.astype(q.dtype)
    return (out, lse.swapaxes(1, 2)) if return_lse else out
