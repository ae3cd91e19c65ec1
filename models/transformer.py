"""The decoder: embedding, blocks stacked on a leading axis, final norm, output table."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from crescendo.models import axes, functional
from crescendo.models.attention import Attention, packed_attention
from crescendo.models.axes import RESIDUAL, TAKEN_IN
from crescendo.models.config import ModelConfig
from crescendo.models.layers import RMSNorm, Table, of_rows, rotary
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.models.mlp import Mlp
from crescendo.models.moe import Moe, Routing
from crescendo.pallas_kernels.attention.blocks import FusedBlockAttention

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


Stream = tuple[jax.Array, jax.Array | None]
"""The residual stream as `(x, added)`, their sum, since the norm that reads it makes the sum in the same pass."""
Drop = Callable[[jax.Array, int], jax.Array]
"""From what a branch adds and the branch's number (0 attention, 1 feed-forward) to the same with some of it dropped."""


def joined(stream: Stream) -> jax.Array:
    """The residual stream as one array."""
    x_BTD, added_BTD = stream
    return x_BTD if added_BTD is None else x_BTD + added_BTD


def _keep(x_BTD: jax.Array, branch: int) -> jax.Array:
    del branch
    return x_BTD


def _drop(rate: float, keys_B, layer, layout: Layout, x_BTD: jax.Array, branch: int) -> jax.Array:
    """Dropout by a mask that is a function of the example's key, the layer and the branch."""

    def retained(key):
        return jax.random.bernoulli(jax.random.fold_in(key, 2 * layer + branch), 1 - rate, x_BTD.shape[1:])

    retained_BTD = layout.constrain(layout.in_row_order(jax.vmap(retained)(keys_B)), RESIDUAL)
    return jnp.where(retained_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


class Block(nnx.Module):
    """`h = h + attention(norm(h))`, then `h = h + mlp(norm(h))`; it takes a `Stream` and returns one.

    With `sparse` the feed-forward part has experts, and what is returned besides is their `Routing`, else None.
    """

    def __init__(self, config: ModelConfig, *, sparse: bool, dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, axes.EMBED, config.norm_epsilon)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, axes.EMBED, config.norm_epsilon)
        self.mlp = (
            Moe(config, dtype=dtype, rngs=rngs) if sparse else Mlp(config, config.mlp_width, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self,
        x_BTD,
        added_BTD,
        attend,
        cosine,
        sine,
        layout: Layout,
        *,
        drop: Drop = _keep,
        counted_BT=None,
        implementation=None,
    ) -> tuple[Stream, Routing | None]:
        def take_in(norm, x_BTD, added_BTD, names=TAKEN_IN):
            y_BTD, x_BTD = norm(x_BTD, added_BTD, layout, implementation=implementation)
            return layout.constrain(y_BTD, names), x_BTD

        y_BTD, x_BTD = take_in(self.attention_norm, x_BTD, added_BTD)
        mixed_BTD = self.attention(y_BTD, attend, cosine, sine, layout, implementation=implementation)
        stream, routing = (x_BTD, drop(layout.constrain(mixed_BTD, RESIDUAL), 0)), None
        if isinstance(self.mlp, Moe):
            y_BTD, x_BTD = take_in(self.mlp_norm, *stream, RESIDUAL)
            fed_BTD, routing = self.mlp(y_BTD, layout, counted_BT=counted_BT, implementation=implementation)
        else:
            y_BTD, x_BTD = take_in(self.mlp_norm, *stream)
            fed_BTD = self.mlp(y_BTD, layout, implementation=implementation)
        return (x_BTD, drop(layout.constrain(fed_BTD, RESIDUAL), 1)), routing


class Group(nnx.Module):
    """Several layers, of which the last one has experts: what is stacked where not every layer has them."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        self.names = tuple(f"layer_{i}" for i in range(config.moe_every))
        for name in self.names:
            setattr(self, name, Block(config, sparse=name == self.names[-1], dtype=dtype, rngs=rngs))


def shared_block(config: ModelConfig, *, dtype, rngs: nnx.Rngs) -> tuple[nnx.Dict, nnx.Dict]:
    """Of layers with one block's weights: what each has of its own, stacked, its norms; and what they share."""
    parts: Any = nnx.split(_block(config, dtype=dtype, rngs=rngs), lambda path, _: path[-1] == "scale", ...)
    _, own, shared = parts
    own = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.layers, *x.shape)), own)
    return _as_dict(own), _as_dict(shared)


def _block(config: ModelConfig, *, dtype, rngs: nnx.Rngs) -> Block:
    return Block(config, sparse=config.experts is not None, dtype=dtype, rngs=rngs)


def _as_dict(state: Any) -> Any:
    return nnx.Dict({name: _as_dict(x) for name, x in state.items()}) if isinstance(state, nnx.State) else state


@functools.cache
def _structure_of_block(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: _block(config, dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(0))))[0]


def layers_in(stacked: Block | Group) -> list[Block]:
    """The layers of one entry of a stack, in order."""
    return [getattr(stacked, name) for name in stacked.names] if isinstance(stacked, Group) else [stacked]


def stacked_blocks(config: ModelConfig, *, dtype, rngs: nnx.Rngs) -> Block | Group:
    """All the layers as one `Block` whose parameters have a leading axis; or as one `Group`."""
    grouped = config.experts is not None and config.moe_every > 1

    @nnx.split_rngs(splits=config.layers // (config.moe_every if grouped else 1))
    @functools.partial(nnx.vmap, in_axes=(0,), out_axes=0)
    def stacked(rngs):
        if grouped:
            return Group(config, dtype=dtype, rngs=rngs)
        return _block(config, dtype=dtype, rngs=rngs)

    blocks: Any = stacked(rngs)
    return blocks


def within_segments(segment_ids_BT, *, causal: bool, implementation: str | None, layout: Layout) -> Callable:
    """What `through_blocks` takes for `attend`: tokens attend within their segment, and there is no state."""
    attention = functools.partial(packed_attention, causal=causal, implementation=implementation)

    def attend(q_BTHE, k_BTKE, v_BTKE, state, number):
        del number
        mixed_BTHE = layout.attend(
            attention, q_BTHE, k_BTKE, v_BTKE, segment_ids_BT, causal=causal, blocks=FusedBlockAttention
        )
        return mixed_BTHE, state

    return attend


def through_blocks(
    blocks: Block | Group | nnx.Dict,
    config: ModelConfig,
    stream: Stream,
    attend: Callable,
    cosine,
    sine,
    *,
    implementation: str | None,
    layout: Layout,
    shared: nnx.Dict | None = None,
    dropout_keys_B=None,
    counted_BT=None,
    first_layer=0,
    state: Any = None,
) -> tuple[Stream, Any, Routing | None]:
    """The residual stream behind some layers, in a loop or unrolled; what the layers made of a state; their routing.

    Of layers with experts the routing is that of `Moe`, `[layers, B, ...]`; None without any.

    Args:
      blocks: as `stacked_blocks` makes them, or some of its layers; or the first part of a `shared_block`.
      config: theirs.
      stream: before them.
      attend: `(q_BTHE, k_BTKE, v_BTKE, state, number of the layer) -> (mixed_BTHE, state)`.
      cosine, sine: `[B, T, E / 2]`, see `rotary`.
      implementation, layout, dropout_keys_B: see `Transformer`.
      shared: the second part of a `shared_block`; each layer adds to its gradient.
      counted_BT: bool, which tokens are no padding, as experts ask; None: all.
      first_layer: the number of the first one among the model's; dropout depends on it.
      state: what the layers hand on besides, such as a cache, which they so write to where it is; None: nothing.
    """
    structure, stacked = nnx.split(blocks)
    if shared is not None:
        structure = _structure_of_block(config)
    rest = () if shared is None else (nnx.state(shared),)
    groups, in_group = jax.tree.leaves(stacked)[0].shape[0], config.moe_every
    one_array = config.remat != "none"  # a checkpoint keeps what layers hand on

    def group(carry, of_group):
        (stream, state), (parameters, number) = carry, of_group
        merged: Any = nnx.merge(structure, parameters, *rest)
        routing = None
        for i, layer in enumerate(layers_in(merged)):
            of_layer = None if number is None else number + i
            drop = _keep
            if dropout_keys_B is not None:
                drop = functools.partial(_drop, config.dropout, dropout_keys_B, of_layer, layout)

            def mix(q_BTHE, k_BTKE, v_BTKE, of_layer=of_layer):
                nonlocal state
                mixed_BTHE, state = attend(q_BTHE, k_BTKE, v_BTKE, state, of_layer)
                return mixed_BTHE

            stream, routing = layer(
                *(*stream, mix, cosine, sine, layout),
                drop=drop,
                counted_BT=counted_BT,
                implementation=of_rows(implementation),
            )
        return ((joined(stream), None) if one_array else stream, state), routing

    if one_array:
        group = jax.checkpoint(group, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
    numbered = dropout_keys_B is not None or state is not None
    numbers = first_layer + in_group * jnp.arange(groups, dtype=jnp.int32) if numbered else None
    x_BTD, added_BTD = stream
    if one_array:
        stream = joined(stream), None
    elif added_BTD is None:
        stream = x_BTD, jnp.zeros_like(x_BTD)
    unroll = 1 if config.scan_layers else groups
    carry, routing = jax.lax.scan(group, (stream, state), (stacked, numbers), unroll=unroll)
    return *carry, routing


class Transformer(nnx.Module):
    """A decoder over packed rows.

    Call it with `tokens`, `segment_ids` and `positions`, each int32 `[B, T]`; it returns the normalised hidden
    states `[B, T, D]` in the compute dtype. `output_table()` is the `[V, D]` matrix that makes logits of them: the
    loss multiplies by it, so that logits need never exist in full. With `causal=False` a token sees its whole
    document, as in an encoder. With `dropout_keys_B`, a random key for each example, the configured dropout is applied:
    its masks are functions of the key, the layer and the branch, and the same however the batch lies.

    Args:
      config: `scan_layers` and `dtype` decided (`ModelConfig.for_platform`).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if config.scan_layers is None or config.dtype is None:
            raise ValueError("scan_layers and dtype are undecided: pass config.for_platform('cpu' | 'gpu' | 'tpu')")
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.embedding = Table(config.vocab_size, config.width, (axes.VOCAB, axes.EMBED), rngs=rngs)
        self.blocks: Block | Group | nnx.Dict
        self.shared_block: nnx.Dict | None
        if config.shared_layers:
            self.blocks, self.shared_block = shared_block(config, dtype=dtype, rngs=rngs)
        else:
            self.blocks, self.shared_block = stacked_blocks(config, dtype=dtype, rngs=rngs), None
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
        dropout_keys_B=None,
    ):
        stream, _ = self.through(
            self.enter(tokens_BT, layout),
            segment_ids_BT,
            positions_BT,
            causal=causal,
            implementation=implementation,
            layout=layout,
            dropout_keys_B=dropout_keys_B,
        )
        return self.leave(stream, layout, implementation=implementation)

    def enter(self, tokens_BT, layout: Layout = ONE_DEVICE) -> Stream:
        """The residual stream before the layers."""
        x_BTD = layout.look_up(self.embedding.table[...], tokens_BT, self.config.dtype)
        return layout.constrain(x_BTD, RESIDUAL), None

    def through(
        self,
        stream: Stream,
        segment_ids_BT,
        positions_BT,
        *,
        causal: bool = True,
        implementation: str | None = None,
        layout: Layout = ONE_DEVICE,
        dropout_keys_B=None,
        first_layer=0,
    ) -> tuple[Stream, Routing | None]:
        """The residual stream behind the layers that the model holds, the first one having the number `first_layer`.

        And the routing of those with experts, see `through_blocks`.
        """
        config = self.config
        stream, _, routing = through_blocks(
            self.blocks,
            config,
            stream,
            within_segments(segment_ids_BT, causal=causal, implementation=implementation, layout=layout),
            *rotary(positions_BT, config.head_size, config.rope_theta),
            implementation=implementation,
            layout=layout,
            shared=self.shared_block,
            dropout_keys_B=dropout_keys_B if config.dropout else None,
            counted_BT=segment_ids_BT > 0 if config.experts is not None else None,
            first_layer=first_layer,
        )
        return stream, routing

    def leave(self, stream: Stream, layout: Layout = ONE_DEVICE, *, implementation: str | None = None):
        """The normalised hidden states behind all layers."""
        return self.final_norm(*stream, layout, implementation=of_rows(implementation))[0]


def initialize(config: ModelConfig, key) -> dict:
    """Fresh float32 parameters as nested dicts of arrays; pure, so it can be jitted with output shardings."""
    return functional.initialize(Transformer, config, key)


def apply(config: ModelConfig, parameters: dict) -> Transformer:
    """The model that holds `parameters` (as `initialize` makes them).

    >>> config = ModelConfig.preset("debug").for_platform("cpu")
    >>> parameters = initialize(config, jax.random.key(0))
    >>> tokens = jnp.zeros((2, 8), jnp.int32)
    >>> apply(config, parameters)(tokens, tokens + 1, jnp.arange(8)[None].repeat(2, 0)).shape
    (2, 8, 128)
    """
    return functional.apply(Transformer, config, parameters)


def logical_axes(config: ModelConfig) -> dict:
    """The logical axis names of every parameter, as nested dicts of tuples; blocks have a leading `layers`."""
    return functional.logical_axes(Transformer, config, stacked=("blocks",))
