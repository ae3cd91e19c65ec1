"""A BERT-style masked language model on the decoder's blocks: attention both ways, within a document.

The parameters are a `Transformer`'s (`models.initialize`); what differs is the mask and the loss. Of the tokens that
are no padding 15% are chosen; of these 80% are shown as the mask token, 10% as a random token and 10% as they are, and
all of them are to be predicted (Devlin et al., 2019, "BERT", https://arxiv.org/abs/1810.04805).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from crescendo.models.config import ModelConfig
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.models.loss import correct_tokens, token_loss, transformer_parts
from crescendo.models.parts import Parts

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


def masked_lm_parts(
    config: ModelConfig,
    keys: Callable[[dict], jax.Array],
    *,
    mask_token: int,
    mask_fraction: float = CHOSEN,
    scores: bool = False,
    z_loss: float = 0.0,
    implementation: str | None = None,
    layout: Layout = ONE_DEVICE,
    **options,
) -> Parts:
    """The loss of the chosen tokens: `(loss_sum in nats, weight in tokens)`, both float32 scalars.

    Or as scores, sums with their weight in tokens: `loss`, the plain cross-entropy, and `accuracy`, of how many the
    logit is the largest.

    Args:
      config: decided for the platform, with `vocab_size` above `mask_token`.
      keys: from a batch, `tokens`, `segment_ids`, `positions`, each int32 `[B, T]`, to the `keys_B` of `mask_tokens`.
      mask_token, mask_fraction: see `mask_tokens`.
      scores: whether to give scores.
      z_loss: `config.z_loss` when training; 0 gives the plain cross-entropy.
      implementation, layout, options: see `crescendo.models.loss.transformer_parts`.

    Raises:
      ValueError: a mask token outside the vocabulary.
    """
    check_mask_token(config, mask_token)
    loss = token_loss(config, z_loss=z_loss, implementation=implementation)

    def masked(batch: dict):
        return mask_tokens(
            batch["tokens"],
            batch["segment_ids"],
            keys(batch),
            mask_token=mask_token,
            mask_fraction=mask_fraction,
            layout=layout,
        )

    def sums(hidden_BTD, table_VD, batch: dict):
        of_tokens = hidden_BTD, table_VD, batch["tokens"], masked(batch)[1].astype(jnp.float32)
        losses = layout.cross_entropy(loss, *of_tokens)
        return {"loss": losses, "accuracy": layout.cross_entropy(correct_tokens, *of_tokens)} if scores else losses

    return transformer_parts(
        *(config, lambda batch: masked(batch)[0], sums),
        causal=False,
        implementation=implementation,
        layout=layout,
        row_weights=lambda batch: jnp.sum(masked(batch)[1], axis=1),
        **options,
    )


def masked_lm_loss(
    config: ModelConfig, parameters: dict, batch: dict, keys_B, *, dropout_keys_B=None, **options
) -> Sums:
    """The loss of `masked_lm_parts` of a batch with these keys; `parameters` as `models.initialize` makes them."""
    parts = masked_lm_parts(config, lambda _: keys_B, dropout_keys=lambda _: dropout_keys_B, **options)
    return parts(parameters, batch)


def masked_lm_scores(config: ModelConfig, parameters: dict, batch: dict, keys_B, **options) -> dict[str, Sums]:
    """The scores of `masked_lm_parts` of a batch, whose rows have these keys."""
    return masked_lm_parts(config, lambda _: keys_B, scores=True, **options)(parameters, batch)


def check_mask_token(config: ModelConfig, mask_token: int) -> None:
    """Raises ValueError for a mask token outside the vocabulary."""
    if not 0 < mask_token < config.vocab_size:
        raise ValueError(
            f"mask_token = {mask_token} must lie between 1 and {config.vocab_size - 1}, inside config.vocab_size = "
            f"{config.vocab_size}: raise vocab_size above the number of the text's tokens"
        )
