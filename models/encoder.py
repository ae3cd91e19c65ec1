"""A BERT-style masked language model on the decoder's blocks: attention both ways, within a document.

The parameters are a `Transformer`'s (`models.initialize`); what differs is the mask and the loss. Of the tokens that
are no padding 15% are chosen; of these 80% are shown as the mask token, 10% as a random token and 10% as they are, and
all of them are to be predicted (Devlin et al., 2019, "BERT", https://arxiv.org/abs/1810.04805).
"""

import jax
import jax.numpy as jnp

from crescendo.models.config import ModelConfig
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.models.loss import correct_tokens, token_loss
from crescendo.models.transformer import apply

CHOSEN = 0.15
SHOWN_AS_MASK = 0.8
SHOWN_AS_RANDOM = 0.1

Sums = tuple[jax.Array, jax.Array]


def mask_tokens(
    tokens_BT,
    segment_ids_BT,
    keys_B,
    *,
    mask_token: int,
    mask_fraction: float = CHOSEN,
    layout: Layout = ONE_DEVICE,
):
    """What the model is shown, and what it is asked: `(inputs int32 [B, T], chosen bool [B, T])`.

    The choice for a row is a function of its key alone: with a key for each example on the clock, an example is masked
    alike however the stream is cut into batches and however rows lie on the devices, and anew in every epoch.

    Args:
      tokens_BT: int32.
      segment_ids_BT: int32, 0 on padding, which is never chosen.
      keys_B: a random key for each row.
      mask_token: the first row of the embedding that no token of the text uses; random tokens lie below it.
      mask_fraction: the part of the tokens that is chosen.
      layout: where tokens lie.

    >>> tokens, keys = jnp.arange(100_000)[None] % 50, jax.random.fold_in(jax.random.key(0), 7)[None]
    >>> inputs, chosen = mask_tokens(tokens, jnp.ones_like(tokens), keys, mask_token=50)
    >>> print(f"{chosen.mean():.2f} {(inputs == 50).mean():.2f} {((inputs != tokens) & (inputs < 50)).mean():.3f}")
    0.15 0.12 0.015
    """

    def draw(key):
        place, token = jax.random.split(key)
        length = tokens_BT.shape[1]
        return jax.random.uniform(place, (length,)), jax.random.randint(token, (length,), 0, mask_token)

    draws_BT, random_BT = map(layout.in_row_order, jax.vmap(draw)(keys_B))
    chosen_BT = (draws_BT < mask_fraction) & (segment_ids_BT > 0)
    shown_BT = jnp.where(draws_BT < mask_fraction * (SHOWN_AS_MASK + SHOWN_AS_RANDOM), random_BT, tokens_BT)
    shown_BT = jnp.where(draws_BT < mask_fraction * SHOWN_AS_MASK, mask_token, shown_BT)
    return jnp.where(chosen_BT, shown_BT, tokens_BT), chosen_BT


def masked_lm_loss(
    config: ModelConfig,
    parameters: dict,
    batch: dict,
    keys_B,
    *,
    mask_token: int,
    mask_fraction: float = CHOSEN,
    z_loss: float = 0.0,
    implementation: str | None = None,
    layout: Layout = ONE_DEVICE,
    dropout_keys_B=None,
) -> Sums:
    """The loss of the chosen tokens: `(loss_sum in nats, weight in tokens)`, both float32 scalars.

    Args:
      config: decided for the platform, with `vocab_size` above `mask_token`.
      parameters: as `models.initialize` makes them.
      batch: `tokens`, `segment_ids`, `positions`, each int32 `[B, T]`.
      keys_B, mask_token, mask_fraction: see `mask_tokens`.
      z_loss: `config.z_loss` when training; 0 gives the plain cross-entropy.
      implementation: of the attention; "reference" is that of every other op too.
      layout: how activations lie over the devices.
      dropout_keys_B: see `Transformer`.

    Raises:
      ValueError: a mask token outside the vocabulary.
    """
    masking = (mask_token, mask_fraction)
    of_tokens = _predicted(config, parameters, batch, keys_B, masking, implementation, layout, dropout_keys_B)
    loss = token_loss(config, z_loss=z_loss, implementation=implementation)
    return layout.cross_entropy(loss, *of_tokens)


def masked_lm_scores(
    config: ModelConfig,
    parameters: dict,
    batch: dict,
    keys_B,
    *,
    mask_token: int,
    mask_fraction: float = CHOSEN,
    implementation: str | None = None,
    layout: Layout = ONE_DEVICE,
) -> dict[str, Sums]:
    """Of the chosen tokens the plain cross-entropy, `loss`, and the part whose logit is the largest, `accuracy`.

    Sums with their weight in tokens, of one pass through the model; else as `masked_lm_loss`.
    """
    masking = (mask_token, mask_fraction)
    of_tokens = _predicted(config, parameters, batch, keys_B, masking, implementation, layout, None)
    loss = token_loss(config, z_loss=0.0, implementation=implementation)
    return {
        "loss": layout.cross_entropy(loss, *of_tokens),
        "accuracy": layout.cross_entropy(correct_tokens, *of_tokens),
    }


def _predicted(config, parameters, batch, keys_B, masking, implementation, layout, dropout_keys_B):
    """The hidden states of the masked rows, the output table, the labels, and 1 where a token is chosen."""
    mask_token, mask_fraction = masking
    check_mask_token(config, mask_token)
    inputs_BT, chosen_BT = mask_tokens(
        batch["tokens"],
        batch["segment_ids"],
        keys_B,
        mask_token=mask_token,
        mask_fraction=mask_fraction,
        layout=layout,
    )
    hidden_BTD, table_VD = encode(config, parameters, inputs_BT, batch, implementation, layout, dropout_keys_B)
    return hidden_BTD, table_VD, batch["tokens"], chosen_BT.astype(jnp.float32)


def check_mask_token(config: ModelConfig, mask_token: int) -> None:
    """Raises ValueError for a mask token outside the vocabulary."""
    if not 0 < mask_token < config.vocab_size:
        raise ValueError(
            f"mask_token = {mask_token} must lie between 1 and {config.vocab_size - 1}, inside config.vocab_size = "
            f"{config.vocab_size}: raise vocab_size above the number of the text's tokens"
        )


def encode(
    config: ModelConfig,
    parameters: dict,
    inputs_BT,
    batch: dict,
    implementation: str | None,
    layout: Layout,
    dropout_keys_B=None,
) -> tuple[jax.Array, jax.Array]:
    """Hidden states `[B, T, D]` of tokens that see their whole document, and the output table `[V, D]`."""
    model = apply(config, parameters)
    hidden_BTD = model(
        inputs_BT,
        batch["segment_ids"],
        batch["positions"],
        causal=False,
        implementation=implementation,
        layout=layout,
        dropout_keys_B=dropout_keys_B,
    )
    return hidden_BTD, model.output_table()
