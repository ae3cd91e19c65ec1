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

from collections.abc import Callable

import jax
import jax.numpy as jnp

from crescendo.models.config import ModelConfig
from crescendo.models.encoder import Sums, check_mask_token
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.models.loss import correct_tokens, token_loss, transformer_parts
from crescendo.models.parts import Parts

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


def diffusion_parts(
    config: ModelConfig,
    draws: Callable[[dict], tuple[jax.Array, jax.Array]],
    *,
    mask_token: int,
    scores: bool = False,
    z_loss: float = 0.0,
    implementation: str | None = None,
    layout: Layout = ONE_DEVICE,
    **options,
) -> Parts:
    """The bound: `(sum over masked tokens of cross-entropy / t in nats, tokens that are no padding)`, float32 scalars.

    Or as scores, sums with their weights: the bound, `loss`, and `accuracy`, of how many masked tokens the logit is the
    largest.

    Args:
      config: decided for the platform, with `vocab_size` above `mask_token`.
      draws: from a batch, `tokens`, `segment_ids`, `positions`, each int32 `[B, T]`, to the `keys_B` and `times_B` of
        `mask_tokens`.
      mask_token: see `mask_tokens`.
      scores: whether to give scores.
      z_loss: `config.z_loss` when training, weighted like the cross-entropy; 0 gives the bound.
      implementation, layout, options: see `crescendo.models.loss.transformer_parts`.

    Raises:
      ValueError: a mask token outside the vocabulary.
    """
    check_mask_token(config, mask_token)
    loss = token_loss(config, z_loss=z_loss, implementation=implementation)

    def masked(batch: dict):
        return mask_tokens(batch["tokens"], batch["segment_ids"], *draws(batch), mask_token=mask_token, layout=layout)

    def sums(hidden_BTD, table_VD, batch: dict):
        masked_BT, times_B = masked(batch)[1].astype(jnp.float32), draws(batch)[1]
        of_labels = hidden_BTD, table_VD, batch["tokens"]
        loss_sum, _ = layout.cross_entropy(loss, *of_labels, masked_BT / times_B[:, None])
        bound = loss_sum, jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)
        if not scores:
            return bound
        return {"loss": bound, "accuracy": layout.cross_entropy(correct_tokens, *of_labels, masked_BT)}

    return transformer_parts(
        *(config, lambda batch: masked(batch)[0], sums),
        causal=False,
        implementation=implementation,
        layout=layout,
        **options,
    )


def diffusion_loss(
    config: ModelConfig, parameters: dict, batch: dict, keys_B, times_B, *, dropout_keys_B=None, **options
) -> Sums:
    """The bound of `diffusion_parts` of a batch with these draws; `parameters` as `models.initialize` makes them."""
    draws, dropout = (lambda _: (keys_B, times_B)), (lambda _: dropout_keys_B)
    return diffusion_parts(config, draws, dropout_keys=dropout, **options)(parameters, batch)


def diffusion_scores(config: ModelConfig, parameters: dict, batch: dict, keys_B, times_B, **options) -> dict[str, Sums]:
    """The scores of `diffusion_parts` of a batch with these draws."""
    return diffusion_parts(config, lambda _: (keys_B, times_B), scores=True, **options)(parameters, batch)
