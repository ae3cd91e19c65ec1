"""A BERT-style masked language model on the decoder's blocks: attention both ways, within a document.

The parameters are a `Transformer`'s (`models.initialize`); what differs is the mask and the loss. Of the tokens that
are no padding 15% are chosen; of these 80% are shown as the mask token, 10% as a random token and 10% as they are, and
all of them are to be predicted (Devlin et al., 2019, "BERT", https://arxiv.org/abs/1810.04805).
"""

import jax
import jax.numpy as jnp

from crescendo.models.config import ModelConfig
from crescendo.models.loss import cross_entropy
from crescendo.models.transformer import Transformer, apply

CHOSEN = 0.15
SHOWN_AS_MASK = 0.8
SHOWN_AS_RANDOM = 0.1


def mask_tokens(tokens_BT, segment_ids_BT, key, examples_seen, *, mask_token: int):
    """What the model is shown, and what it is asked: `(inputs int32 [B, T], chosen bool [B, T])`.

    The choice for a row is a function of the key and of the row's place on the clock, `examples_seen + its number`
    alone: the same example is masked alike however the stream is cut into batches, and anew in every epoch.

    Args:
      tokens_BT: int32.
      segment_ids_BT: int32, 0 on padding, which is never chosen.
      key: of the run.
      examples_seen: the clock at the first row; may be traced.
      mask_token: the first row of the embedding that no token of the text uses; random tokens lie below it.

    >>> tokens = jnp.arange(100_000)[None] % 50
    >>> inputs, chosen = mask_tokens(tokens, jnp.ones_like(tokens), jax.random.key(0), 7, mask_token=50)
    >>> print(f"{chosen.mean():.2f} {(inputs == 50).mean():.2f} {((inputs != tokens) & (inputs < 50)).mean():.3f}")
    0.15 0.12 0.015
    """

    def draw(number):
        place, token = jax.random.split(jax.random.fold_in(key, number))
        length = tokens_BT.shape[1]
        return jax.random.uniform(place, (length,)), jax.random.randint(token, (length,), 0, mask_token)

    draws_BT, random_BT = jax.vmap(draw)(examples_seen + jnp.arange(len(tokens_BT)))
    chosen_BT = (draws_BT < CHOSEN) & (segment_ids_BT > 0)
    shown_BT = jnp.where(draws_BT < CHOSEN * (SHOWN_AS_MASK + SHOWN_AS_RANDOM), random_BT, tokens_BT)
    shown_BT = jnp.where(draws_BT < CHOSEN * SHOWN_AS_MASK, mask_token, shown_BT)
    return jnp.where(chosen_BT, shown_BT, tokens_BT), chosen_BT


def masked_lm_loss(
    config: ModelConfig, parameters: dict, batch: dict, key, examples_seen, *, mask_token: int, implementation=None
):
    """The loss of the chosen tokens: `(loss_sum in nats, weight in tokens)`, both float32 scalars.

    Args:
      config: decided for the platform, with `vocab_size` above `mask_token`.
      parameters: as `models.initialize` makes them.
      batch: `tokens`, `segment_ids`, `positions`, each int32 `[B, T]`.
      key, examples_seen, mask_token: see `mask_tokens`.
      implementation: of the attention.

    Raises:
      ValueError: a mask token outside the vocabulary.
    """
    model, hidden_BTD, chosen_BT = _encode(config, parameters, batch, key, examples_seen, mask_token, implementation)
    weights_BT = chosen_BT.astype(jnp.float32)
    return cross_entropy(
        hidden_BTD,
        model.output_table(),
        batch["tokens"],
        weights_BT,
        z_loss=config.z_loss,
        soft_cap=config.logit_soft_cap,
    )


def masked_lm_accuracy(
    config: ModelConfig, parameters: dict, batch: dict, key, examples_seen, *, mask_token: int, implementation=None
):
    """How many of the chosen tokens have the largest logit: `(correct, weight in tokens)`; else as `masked_lm_loss`."""
    model, hidden_BTD, chosen_BT = _encode(config, parameters, batch, key, examples_seen, mask_token, implementation)
    table_VD = model.output_table().astype(hidden_BTD.dtype)
    logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, table_VD, preferred_element_type=jnp.float32)
    correct_BT = (jnp.argmax(logits_BTV, axis=-1) == batch["tokens"]) & chosen_BT
    return jnp.sum(correct_BT, dtype=jnp.float32), jnp.sum(chosen_BT, dtype=jnp.float32)


def _encode(
    config, parameters, batch, key, examples_seen, mask_token, implementation
) -> tuple[Transformer, jax.Array, jax.Array]:
    """The model, its hidden states `[B, T, D]` of the masked rows, and which tokens are chosen."""
    if not 0 < mask_token < config.vocab_size:
        raise ValueError(
            f"mask_token = {mask_token} must lie between 1 and {config.vocab_size - 1}, inside config.vocab_size = "
            f"{config.vocab_size}: raise vocab_size above the number of the text's tokens"
        )
    inputs_BT, chosen_BT = mask_tokens(batch["tokens"], batch["segment_ids"], key, examples_seen, mask_token=mask_token)
    model = apply(config, parameters)
    hidden_BTD = model(inputs_BT, batch["segment_ids"], batch["positions"], causal=False, implementation=implementation)
    return model, hidden_BTD, chosen_BT
