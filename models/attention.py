"""Grouped-query attention over packed rows."""

import functools

from flax import nnx

from crescendo.models import axes
from crescendo.models.config import ModelConfig
from crescendo.models.layers import Linear, RMSNorm, of_one_input, rotate, scale_names
from crescendo.models.layout import Layout
from crescendo.pallas_kernels import attention, qk_norm_rotary


def packed_attention(q_BTHE, k_BTKE, v_BTKE, segment_ids_BT, *, causal: bool, implementation: str | None = None):
    """Attention within documents, `[B, T, H, E]`; if `causal`, to keys that are not later."""
    return attention(q_BTHE, k_BTKE, v_BTKE, causal=causal, segment_ids=segment_ids_BT, implementation=implementation)


class Attention(nnx.Module):
    """`softmax(q k^T / sqrt(E)) v` with H query heads over K key and value heads (Ainslie et al. 2023).

    It is called with cosines and sines of the rotary angles, `[B, T, E / 2]`; `implementation` is that of the norms
    with rotation, None for the first that serves.
    """

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        width, heads, kv_heads, head_width = config.width, config.heads, config.kv_heads, config.head_size

        def projection(heads: int, axis: str):
            names = (axes.EMBED, axis, axes.HEAD_WIDTH)
            return Linear((width,), (heads, head_width), names, dtype=dtype, rngs=rngs, matmul=config.matmul)

        self.query = projection(heads, axes.HEADS)
        self.key = projection(kv_heads, axes.KV_HEADS)
        self.value = projection(kv_heads, axes.KV_HEADS)
        self.output = Linear(
            (heads, head_width),
            (width,),
            (axes.HEADS, axes.HEAD_WIDTH, axes.EMBED),
            dtype=dtype,
            rngs=rngs,
            scale=(2 * config.layers) ** -0.5,
            matmul=config.matmul,
        )
        if config.qk_norm:
            self.query_norm = RMSNorm(head_width, axes.HEAD_WIDTH, config.norm_epsilon)
            self.key_norm = RMSNorm(head_width, axes.HEAD_WIDTH, config.norm_epsilon)
        self.qk_norm = config.qk_norm

    def __call__(self, x_BTD, attend, cosine, sine, layout: Layout, *, implementation: str | None = None):
        q_BTHE, k_BTKE, v_BTKE = of_one_input((self.query, self.key, self.value), x_BTD, layout)
        if self.qk_norm:
            norm = functools.partial(qk_norm_rotary, eps=self.query_norm.epsilon, implementation=implementation)
            scales = self.query_norm.scale[...], self.key_norm.scale[...]
            heads, angles = ("batch", "length", "heads", None), ("batch" if len(cosine) > 1 else None, "length", None)
            q_BTHE, k_BTKE = layout.on_parts(
                norm,
                (q_BTHE, k_BTKE, *scales, cosine, sine),
                (heads, heads, *map(scale_names, scales), angles, angles),
                (heads, heads),
            )
        else:
            q_BTHE, k_BTKE = rotate(q_BTHE, cosine, sine), rotate(k_BTKE, cosine, sine)
        return self.output(attend(q_BTHE, k_BTKE, v_BTKE), layout)
