"""Attention over one block of keys: what a ring of devices puts together."""

import jax.numpy as jnp

from crescendo.pallas_kernels.attention.contract import Config, Operands
from crescendo.pallas_kernels.attention.merging import merge
from crescendo.pallas_kernels.attention.op import kernels


class FusedBlockAttention:
    """Attention over one block of keys by the fused kernels.

    `forward` gives `[B, Tq, H, E]` and the log-sum-exp `[B, H, Tq]`, float32, 0 and -inf of nothing; `backward` gives
    `(dq, dk, dv)`, float32, from the log-sum-exp of all blocks and `delta = sum(dO O)`. Causal is meant for a block of
    the queries' own tokens, each of which sees itself. `merge` puts results of blocks together.

    >>> q = jnp.ones((1, 2, 1, 4))
    >>> mixed, log_sum = FusedBlockAttention.forward(q, q, q, jnp.array([[1, 2]]), jnp.array([[2, 2]]), False)
    >>> print(mixed[0, :, 0, 0], log_sum[0, 0])
    [0. 1.] [     -inf 2.6931472]
    """

    merge = staticmethod(merge)

    @staticmethod
    def _serving(q, k, v, segments_q, segments_k, causal: bool):
        config = Config(q.shape[-1] ** -0.5, causal=causal, sees_itself=causal)
        operands = Operands(q, k, v, None, segments_q, segments_k)
        return kernels(config, operands), config, operands

    @staticmethod
    def forward(q, k, v, segments_q, segments_k, causal: bool):
        """Mixed values and log-sum-exp."""
        serving, config, operands = FusedBlockAttention._serving(q, k, v, segments_q, segments_k, causal)
        mixed, log_sum = serving.forward_on_parts(config, operands)(operands)
        return mixed.astype(jnp.float32), log_sum

    @staticmethod
    def backward(q, k, v, segments_q, segments_k, causal: bool, log_sum, d_output, delta):
        """Gradients of queries, keys and values."""
        serving, config, operands = FusedBlockAttention._serving(q, k, v, segments_q, segments_k, causal)
        others = log_sum, d_output, delta, None
        dq, dk, dv, _ = serving.backward_on_parts(config, operands, *others)(operands, *others)
        return tuple(x.astype(jnp.float32) for x in (dq, dk, dv))
