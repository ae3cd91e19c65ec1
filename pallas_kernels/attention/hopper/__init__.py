"""Attention for Hopper GPUs in Pallas' Mosaic GPU dialect, after FlashAttention-3; deterministic. One kernel a file."""

import jax.numpy as jnp

from crescendo.pallas_kernels.attention.contract import Config, Kernels, Operands
from crescendo.pallas_kernels.attention.hopper import backward, forward
from crescendo.pallas_kernels.op import Unsupported, require_gpu


def check(operands: Operands) -> None:
    """Refuses what these kernels don't do."""
    require_gpu(9.0, 10.0)
    width = operands.dims[-1]
    if operands.q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"needs bfloat16 or float16, not {operands.q.dtype}")
    if operands.bias is not None:
        raise Unsupported("takes no bias")
    if width > 256:
        raise Unsupported(f"needs a head width of at most 256, not {width}")


def attention(config: Config, operands: Operands) -> Kernels:
    """The two passes."""
    del config  # any will do
    check(operands)
    return Kernels(forward.forward, backward.backward, adds_out=True)
