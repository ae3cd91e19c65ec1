"""The decoder: embedding, blocks stacked on a leading axis, final norm, output table."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from crescendo.models import axes
from crescendo.models.attention import Attention, FusedBlockAttention, packed_attention
from crescendo.models.config import ModelConfig
from crescendo.models.layers import Linear, RMSNorm, Table, rotary
from crescendo.models.layout import ONE_DEVICE, Layout

# Left to itself the partitioner may split activations like the parameters.
RESIDUAL = (axes.BATCH, axes.RESIDUAL_LENGTH, None)
# What matmuls take in: where they split their outputs over devices, each needs all the tokens.
TAKEN_IN = (axes.BATCH, axes.LENGTH, None)


REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Mlp(nnx.Module):
    """SwiGLU: `(silu(x W_gate) * x W_up) W_down` (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        inner = functools.partial(
            Linear, (config.width,), (config.mlp_width,), (axes.EMBED, axes.MLP), dtype=dtype, rngs=rngs
        )
        self.gate, self.up = inner(), inner()
        self.down = Linear(
            (config.mlp_width,),
            (config.width,),
            (axes.MLP, axes.EMBED),
            dtype=dtype,
            rngs=rngs,
            scale=(2 * config.layers) ** -0.5,
        )

    def __call__(self, x_BTD, layout: Layout):
        inner_BTF = jax.nn.silu(self.gate(x_BTD, layout)) * self.up(x_BTD, layout)
        return self.down(layout.constrain(inner_BTF, (axes.BATCH, axes.LENGTH, axes.MLP)), layout)


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, axes.EMBED, config.norm_epsilon)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, axes.EMBED, config.norm_epsilon)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD, attend, cosine, sine, layout: Layout):
        def take_in(norm, x_BTD):
            # Norms are split like the residual stream: said twice, or their float32 insides would cross the devices.
            return layout.constrain(layout.constrain(norm(x_BTD), RESIDUAL), TAKEN_IN)

        mixed_BTD = self.attention(take_in(self.attention_norm, x_BTD), attend, cosine, sine, layout)
        x_BTD = x_BTD + layout.constrain(mixed_BTD, RESIDUAL)
        return x_BTD + layout.constrain(self.mlp(take_in(self.mlp_norm, x_BTD), layout), RESIDUAL)


class Transformer(nnx.Module):
    """A decoder over packed rows.

    Call it with `tokens`, `segment_ids` and `positions`, each int32 `[B, T]`; it returns the normalised hidden
    states `[B, T, D]` in the compute dtype. `output_table()` is the `[V, D]` matrix that makes logits of them: the
    loss multiplies by it, so that logits need never exist in full. With `causal=False` a token sees its whole
    document, as in an encoder.

    Args:
      config: `scan_layers` and `dtype` decided (`ModelConfig.for_platform`).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if config.scan_layers is None or config.dtype is None:
            raise ValueError("scan_layers and dtype are undecided: pass config.for_platform('cpu' | 'gpu' | 'tpu')")
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.embedding = Table(config.vocab_size, config.width, (axes.VOCAB, axes.EMBED), rngs=rngs)

        @nnx.split_rngs(splits=config.layers)
        @functools.partial(nnx.vmap, in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return Block(config, dtype=dtype, rngs=rngs)

        self.blocks = stacked(rngs)
        self.final_norm = RMSNorm(config.width, axes.EMBED, config.norm_epsilon)
        if not config.tied_head:
            self.head = Table(config.vocab_size, config.width, (axes.VOCAB, axes.EMBED), rngs=rngs)

    def output_table(self):
        """`[V, D]`, float32."""
        return (self.embedding if self.config.tied_head else self.head).table[...]

    def __call__(
        self,
        tokens_BT,
        segment_ids_BT,
        positions_BT,
        *,
        causal: bool = True,
        implementation: str | None = None,
        layout: Layout = ONE_DEVICE,
    ):
        config = self.config
        x_BTD = layout.constrain(layout.look_up(self.embedding.table[...], tokens_BT, config.dtype), RESIDUAL)
        attention = functools.partial(packed_attention, causal=causal, implementation=implementation)
        cosine, sine = rotary(positions_BT, config.head_size, config.rope_theta)
        structure, stacked = nnx.split(self.blocks)

        def attend(q_BTHE, k_BTKE, v_BTKE):
            return layout.attend(
                attention, q_BTHE, k_BTKE, v_BTKE, segment_ids_BT, causal=causal, blocks=FusedBlockAttention
            )

        def block(x_BTD, parameters):
            layer: Any = nnx.merge(structure, parameters)
            return layer(x_BTD, attend, cosine, sine, layout), None

        if config.remat != "none":
            block = jax.checkpoint(block, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
        unroll = 1 if config.scan_layers else config.layers
        x_BTD, _ = jax.lax.scan(block, x_BTD, stacked, unroll=unroll)
        return layout.constrain(self.final_norm(x_BTD), RESIDUAL)


@functools.cache
def _abstract(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def initialize(config: ModelConfig, key) -> dict:
    """Fresh float32 parameters as nested dicts of arrays; pure, so it can be jitted with output shardings."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))


def apply(config: ModelConfig, parameters: dict) -> Transformer:
    """The model that holds `parameters` (as `initialize` makes them).

    >>> config = ModelConfig.preset("debug").for_platform("cpu")
    >>> parameters = initialize(config, jax.random.key(0))
    >>> tokens = jnp.zeros((2, 8), jnp.int32)
    >>> apply(config, parameters)(tokens, tokens + 1, jnp.arange(8)[None].repeat(2, 0)).shape
    (2, 8, 128)
    """
    structure, state = _abstract(config)
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(structure, state)


def logical_axes(config: ModelConfig) -> dict:
    """The logical axis names of every parameter, as nested dicts of tuples; blocks have a leading `layers`."""
    _, state = _abstract(config)
    named = nnx.to_pure_dict(state, extract_fn=lambda parameter: tuple(parameter.axes))
    named["blocks"] = jax.tree.map(
        lambda names: (axes.LAYERS, *names), named["blocks"], is_leaf=lambda x: isinstance(x, tuple)
    )
    return named
