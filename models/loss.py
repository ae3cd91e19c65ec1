"""Losses return `(sum, weight)`; the mean is taken once, after all microbatches and devices are added up."""

import functools

import jax.numpy as jnp

from crescendo.models.config import ModelConfig
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.models.transformer import apply
from crescendo.pallas_kernels.linear_cross_entropy import linear_cross_entropy


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


def next_token_loss(
    config: ModelConfig,
    parameters: dict,
    batch: dict,
    *,
    z_loss: float = 0.0,
    implementation: str | None = None,
    layout: Layout = ONE_DEVICE,
):
    """The loss of packed rows: `(loss_sum in nats, weight in tokens)`, padding (`segment_ids` 0) left out.

    Args:
      batch: `tokens`, `labels`, `segment_ids`, `positions`, each int32 `[B, T]`.
      z_loss: `config.z_loss` when training; 0 gives the plain cross-entropy.
      implementation: of the attention.
      layout: how activations lie over the devices.
    """
    model = apply(config, parameters)
    hidden_BTD = model(
        batch["tokens"], batch["segment_ids"], batch["positions"], implementation=implementation, layout=layout
    )
    weights_BT = (batch["segment_ids"] > 0).astype(jnp.float32)
    loss = functools.partial(cross_entropy, z_loss=z_loss, soft_cap=config.logit_soft_cap)
    return layout.cross_entropy(loss, hidden_BTD, model.output_table(), batch["labels"], weights_BT)
