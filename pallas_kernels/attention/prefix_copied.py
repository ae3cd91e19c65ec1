"""The specification of a shared prefix: every member has a copy of it."""

import jax.numpy as jnp

from crescendo.pallas_kernels.attention.contract import positions, visible
from crescendo.pallas_kernels.attention.op import attention


def shared_prefix(q, prefix, own, options, return_lse: bool):
    members = q.shape[0] // prefix[0].shape[0]
    k, v = (jnp.concatenate([jnp.repeat(a, members, 0), b], 1) for a, b in zip(prefix, own, strict=True))
    checked = attention.check(q, *own, **options)  # type: ignore[attr-defined]
    operands = checked["operands"]
    seen = visible(checked["config"], operands.q_segments, operands.k_segments, *positions(operands))
    bias = None
    if seen is not None:
        seen = jnp.pad(seen, [(0, 0), (0, 0), (prefix[0].shape[1], 0)], constant_values=True)
        bias = jnp.where(seen, 0, -jnp.inf).astype(q.dtype)[:, None]
    scores = {name: options[name] for name in ("scale", "soft_cap")}
    return attention(q, k, v, bias=bias, **scores, return_lse=return_lse, implementation="reference")
