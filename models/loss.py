"""Losses return `(sum, weight)`; the mean is taken once, after all microbatches and devices are added up."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from crescendo.models import moe
from crescendo.models.config import ModelConfig
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.models.parts import Parts
from crescendo.models.transformer import apply
from crescendo.pallas_kernels import linear_cross_entropy


def cross_entropy(
    hidden_BTD,
    table_VD,
    labels_BT,
    weights_BT,
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    checked: bool = False,
    implementation: str | None = None,
    vocab_axis: str | None = None,
):
    """`sum_i w_i (log Z_i - logit_i[label_i] + z_loss log^2 Z_i)` and `sum_i w_i`, both float32 scalars.

    The logits exist for some rows at a time, and gradients are computed with the loss: see
    `crescendo.pallas_kernels.linear_cross_entropy`.

    Args:
      hidden_BTD: final hidden states; the logits are `hidden table^T`, multiplied in their dtype, summed in float32.
      table_VD: the output matrix; its gradient is summed in float32.
      labels_BT: int32 in `[0, V)` where the weight is not 0; others make the loss NaN.
      weights_BT: float32, 0 on padding.
      z_loss: keeps `log Z` near 0 (PaLM, Chowdhery et al. 2022, section 5).
      soft_cap: `c` of `c tanh(logits / c)` (Gemma 2, 2024), or None.
      checked: report labels out of range: at once where they are concrete, else by `checkify`.
      implementation: of the op; None: the first one that serves.
      vocab_axis: inside a checked `jax.shard_map`, the mesh axis that splits the table by its rows; rows of maxima and
        sums cross the devices, never logits.
    """
    return linear_cross_entropy(
        hidden_BTD,
        table_VD,
        labels_BT,
        weights=weights_BT,
        z_loss=z_loss,
        soft_cap=soft_cap,
        checked=checked,
        vocab_axis=vocab_axis,
        implementation=implementation,
    )


def transformer_parts(
    config: ModelConfig,
    shown: Callable[[dict], jax.Array],
    sums: Callable[..., Any],
    *,
    causal: bool = True,
    implementation: str | None = None,
    layout: Layout = ONE_DEVICE,
    dropout_keys: Callable[[dict], jax.Array | None] = lambda batch: None,
    row_weights: Callable[[dict], jax.Array] = lambda batch: jnp.sum(batch["segment_ids"] > 0, axis=1),
) -> Parts:
    """What a `Transformer` makes of packed rows, in parts.

    With experts layers say of their routing what it sums up to over rows, and the sums have it besides: a training loss
    its terms, and as a third element their dict; scores what is told of held-out rows.

    Args:
      config: the model's.
      shown: from a batch, with `segment_ids` and `positions`, int32 `[B, T]`, to the tokens that the model is shown.
      sums: `(hidden_BTD, table_VD, batch)` -> what the last part gives: `(loss_sum, weight)`, or a dict of such scores,
        "loss" among them.
      causal: see `Transformer`.
      implementation: of the attention; "reference" is that of every other op too, which so has second derivatives.
      layout: how activations lie over the devices.
      dropout_keys: from a batch to `dropout_keys_B`, see `Transformer`.
      row_weights: from a batch to what each row adds to the loss's weight, `[B]`.
    """

    def enter(parameters: dict, batch: dict):
        return apply(config, parameters).enter(shown(batch), layout)

    def layers(parameters: dict, stream, batch: dict, first):
        stream, routing = apply(config, parameters).through(
            stream,
            batch["segment_ids"],
            batch["positions"],
            causal=causal,
            implementation=implementation,
            layout=layout,
            dropout_keys_B=dropout_keys(batch),
            first_layer=first * config.moe_every,
        )
        return stream, routing and moe.over_rows(routing, row_weights(batch).astype(jnp.float32))

    def leave(parameters: dict, stream, batch: dict):
        model = apply(config, parameters)
        hidden_BTD = model.leave(stream, layout, implementation=implementation)
        return sums(hidden_BTD, model.output_table(), batch)

    def finish(found, routing):
        if routing is None:
            return found
        if isinstance(found, dict):
            return found | moe.scores(routing, found["loss"][1])
        terms, told = moe.training_terms(config, routing, found[1])
        return found[0] + terms, found[1], told

    return Parts(enter, layers, leave, finish)


def next_token_parts(
    config: ModelConfig,
    *,
    scores: bool = False,
    z_loss: float = 0.0,
    implementation: str | None = None,
    layout: Layout = ONE_DEVICE,
    **options,
) -> Parts:
    """The loss of packed rows: `(loss_sum in nats, weight in tokens)`, padding (`segment_ids` 0) left out.

    With experts there is a third element, what training tells of them; see `transformer_parts`.

    Args:
      config: of the decoder; a batch is `tokens`, `labels`, `segment_ids`, `positions`, each int32 `[B, T]`.
      scores: whether to give `{"loss": (loss_sum, weight)}`.
      z_loss: `config.z_loss` when training; 0 gives the plain cross-entropy.
      implementation, layout, options: see `transformer_parts`.
    """
    loss = token_loss(config, z_loss=z_loss, implementation=implementation)

    def sums(hidden_BTD, table_VD, batch: dict):
        weights_BT = (batch["segment_ids"] > 0).astype(jnp.float32)
        losses = layout.cross_entropy(loss, hidden_BTD, table_VD, batch["labels"], weights_BT)
        return {"loss": losses} if scores else losses

    shown = operator.itemgetter("tokens")
    return transformer_parts(config, shown, sums, implementation=implementation, layout=layout, **options)


def next_token_loss(config: ModelConfig, parameters: dict, batch: dict, *, dropout_keys_B=None, **options):
    """The sums of `next_token_parts` of a batch.

    Args:
      config: of the decoder.
      parameters: as `initialize` makes them.
      batch: `tokens`, `labels`, `segment_ids`, `positions`, each int32 `[B, T]`.
      dropout_keys_B: see `Transformer`.
      options: see `next_token_parts`.
    """
    return next_token_parts(config, dropout_keys=lambda _: dropout_keys_B, **options)(parameters, batch)


def token_loss(config: ModelConfig, *, z_loss: float, implementation: str | None) -> Callable:
    """The `cross_entropy` of a model: what `Layout.cross_entropy` takes.

    Args:
      config: its logits' soft cap.
      z_loss: see `cross_entropy`.
      implementation: of the attention: "reference" is that of the loss too, others leave the loss to choose.
    """
    loss = functools.partial(cross_entropy, z_loss=z_loss, soft_cap=config.logit_soft_cap)
    if implementation != "reference":
        return loss

    def reference(hidden_BTD, table_VD, labels_BT, weights_BT, *, vocab_axis: str | None = None):
        sums = loss(hidden_BTD, table_VD, labels_BT, weights_BT, vocab_axis=vocab_axis, implementation="reference")
        # It gathers the table, and what each device then computes is the same without being known to be.
        return sums if vocab_axis is None else jax.lax.pmean(sums, vocab_axis)

    return reference


def correct_tokens(hidden_BTD, table_VD, labels_BT, weights_BT, *, vocab_axis: str | None = None):
    """How much weight lies on tokens whose label has the largest logit, and how much in all: float32 scalars.

    The first one of equal logits counts as the largest. `Layout.cross_entropy` takes it for a loss; the logits of a
    device's rows exist in full.

    Args:
      hidden_BTD, table_VD, labels_BT, weights_BT, vocab_axis: see `cross_entropy`.

    >>> table = jnp.eye(3)
    >>> print(*correct_tokens(table[None], table, jnp.array([[0, 1, 1]]), jnp.ones((1, 3))))
    2.0 3.0
    """
    table_VD = table_VD.astype(hidden_BTD.dtype)
    logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, table_VD, preferred_element_type=jnp.float32)
    best_BT = jnp.argmax(logits_BTV, axis=-1)
    if vocab_axis is not None:
        top_BT = jnp.max(logits_BTV, axis=-1)
        ours_BT = top_BT == jax.lax.pmax(top_BT, vocab_axis)
        best_BT = best_BT + jax.lax.axis_index(vocab_axis) * table_VD.shape[0]
        best_BT = jax.lax.pmin(jnp.where(ours_BT, best_BT, jnp.iinfo(best_BT.dtype).max), vocab_axis)
    return jnp.sum(jnp.where(best_BT == labels_BT, weights_BT, 0)), jnp.sum(weights_BT)
