r"""A masked diffusion language model: an encoder that fills in any part of a text.

For each example a time t is drawn uniformly from (0, 1], and each of its tokens is shown as the mask token with
probability t. The loss of the masked tokens over t is an unbiased estimate of an upper bound of the negative
log-likelihood of the text,

.. math::

  -\log p(x) \le E_{t, m} \left[ \frac{1}{t} \sum_i m_i \, (-\log p(x_i \mid x \text{ masked by } m)) \right],

because a token is masked with probability t. The time itself is not shown to the model: how much is masked says it.

Sahoo et al., 2024, "Simple and Effective Masked Diffusion Language Models", https://arxiv.org/abs/2406.07524;
Nie et al., 2025, "Large Language Diffusion Models", https://arxiv.org/abs/2502.09992.
"""

import jax
import jax.numpy as jnp

from crescendo.models.config import ModelConfig
from crescendo.models.encoder import Sums, check_mask_token, encode
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.models.loss import correct_tokens, token_loss

# Odd, and nearest to 2^32 over the golden ratio: its multiples, cut at 32 bits, fill the range most evenly.
_GOLDEN = 2654435769


def random_times(keys_B) -> jax.Array:
    """A time for each key, float32 `[B]`, uniform in (0, 1].

    >>> times = random_times(jax.random.split(jax.random.key(0), 10_000))
    >>> print(bool((times > 0).all() & (times <= 1).all()), f"{times.mean():.2f}")
    True 0.50
    """
    return 1 - jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(keys_B)


def even_times(numbers_B) -> jax.Array:
    """A time for each number, float32 `[B]` in (0, 1]: of any consecutive ones spread more evenly than random ones.

    >>> print(*(f"{time:.2f}" for time in even_times(jnp.arange(5))))
    1.00 0.38 0.76 0.15 0.53
    """
    turned = numbers_B.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    return 1 - (turned >> 8).astype(jnp.float32) * 2.0**-24


def mask_tokens(tokens_BT, segment_ids_BT, keys_B, times_B, *, mask_token: int, layout: Layout = ONE_DEVICE):
    """The tokens, each masked with its row's probability: `(inputs int32 [B, T], masked bool [B, T])`.

    Args:
      tokens_BT: int32.
      segment_ids_BT: int32, 0 on padding, which is never masked.
      keys_B: a random key for each row; with one for each example the draws are the same in any batch, on any mesh.
      times_B: float32 in (0, 1].
      mask_token: a row of the embedding that no token of the text uses.
      layout: where tokens lie.
    """
    length = tokens_BT.shape[1]
    draws_BT = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (length,)))(keys_B)
    masked_BT = (layout.in_row_order(draws_BT) < times_B[:, None]) & (segment_ids_BT > 0)
    return jnp.where(masked_BT, mask_token, tokens_BT), masked_BT


def diffusion_loss(
    config: ModelConfig,
    parameters: dict,
    batch: dict,
    keys_B,
    times_B,
    *,
    mask_token: int,
    z_loss: float = 0.0,
    implementation: str | None = None,
    layout: Layout = ONE_DEVICE,
    dropout_keys_B=None,
) -> Sums:
    """The bound: `(sum over masked tokens of cross-entropy / t in nats, tokens that are no padding)`, float32 scalars.

    Args:
      config: decided for the platform, with `vocab_size` above `mask_token`.
      parameters: as `models.initialize` makes them.
      batch: `tokens`, `segment_ids`, `positions`, each int32 `[B, T]`.
      keys_B, times_B, mask_token: see `mask_tokens`.
      z_loss: `config.z_loss` when training, weighted like the cross-entropy; 0 gives the bound.
      implementation: of the attention; "reference" is that of every other op too.
      layout: how activations lie over the devices.
      dropout_keys_B: see `Transformer`.

    Raises:
      ValueError: a mask token outside the vocabulary.
    """
    draws = (keys_B, times_B, mask_token)
    hidden_BTD, table_VD, labels_BT, masked_BT = _predicted(
        config, parameters, batch, draws, implementation, layout, dropout_keys_B
    )
    loss = token_loss(config, z_loss=z_loss, implementation=implementation)
    loss_sum, _ = layout.cross_entropy(loss, hidden_BTD, table_VD, labels_BT, masked_BT / times_B[:, None])
    return loss_sum, jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)


def diffusion_scores(
    config: ModelConfig,
    parameters: dict,
    batch: dict,
    keys_B,
    times_B,
    *,
    mask_token: int,
    implementation: str | None = None,
    layout: Layout = ONE_DEVICE,
) -> dict[str, Sums]:
    """The bound, `loss`, and the part of the masked tokens whose logit is the largest, `accuracy`.

    Sums with their weights, of one pass through the model; else as `diffusion_loss`.
    """
    draws = (keys_B, times_B, mask_token)
    hidden_BTD, table_VD, labels_BT, masked_BT = _predicted(
        config, parameters, batch, draws, implementation, layout, None
    )
    loss = token_loss(config, z_loss=0.0, implementation=implementation)
    loss_sum, _ = layout.cross_entropy(loss, hidden_BTD, table_VD, labels_BT, masked_BT / times_B[:, None])
    return {
        "loss": (loss_sum, jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)),
        "accuracy": layout.cross_entropy(correct_tokens, hidden_BTD, table_VD, labels_BT, masked_BT),
    }


def _predicted(config, parameters, batch, draws, implementation, layout, dropout_keys_B):
    """The hidden states of the masked rows, the output table, the labels, and 1 where a token is masked."""
    keys_B, times_B, mask_token = draws
    check_mask_token(config, mask_token)
    inputs_BT, masked_BT = mask_tokens(
        batch["tokens"], batch["segment_ids"], keys_B, times_B, mask_token=mask_token, layout=layout
    )
    hidden_BTD, table_VD = encode(config, parameters, inputs_BT, batch, implementation, layout, dropout_keys_B)
    return hidden_BTD, table_VD, batch["tokens"], masked_BT.astype(jnp.float32)
