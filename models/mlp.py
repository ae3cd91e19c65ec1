"""The feed-forward part of a layer."""

import functools

from flax import nnx

from crescendo.models import axes
from crescendo.models.config import ModelConfig
from crescendo.models.layers import Linear, side_by_side
from crescendo.models.layout import Layout
from crescendo.pallas_kernels import swiglu


class Mlp(nnx.Module):
    """SwiGLU: `(silu(x W_gate) * x W_up) W_down` (Shazeer 2020); `width` is F, `implementation` that of the product."""

    def __init__(self, config: ModelConfig, width: int, *, dtype, rngs: nnx.Rngs):
        inner = functools.partial(
            Linear,
            (config.width,),
            (width,),
            (axes.EMBED, axes.MLP),
            dtype=dtype,
            rngs=rngs,
            matmul=config.matmul,
        )
        self.gate, self.up = inner(), inner()
        self.down = Linear(
            (width,),
            (config.width,),
            (axes.MLP, axes.EMBED),
            dtype=dtype,
            rngs=rngs,
            scale=(2 * config.layers) ** -0.5,
            matmul=config.matmul,
        )

    def __call__(self, x_BTD, layout: Layout, *, implementation: str | None = None):
        inner, product = (axes.BATCH, axes.LENGTH, axes.MLP), functools.partial(swiglu, implementation=implementation)
        gate_up = side_by_side((self.gate, self.up), x_BTD, layout)  # [B, T, 2, F]
        return self.down(layout.on_parts(product, (gate_up,), ((*inner[:-1], None, inner[-1]),), inner), layout)
