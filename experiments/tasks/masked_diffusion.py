"""Text by masked diffusion: any part of a document is filled in from any other."""

import dataclasses
from collections.abc import Mapping

import jax

from crescendo.experiments.tasks.base import EXAMPLE, Context, Loss, Tree
from crescendo.experiments.tasks.text import MASKS, Text, TextTask
from crescendo.models import ModelConfig
from crescendo.models.diffusion import diffusion_loss, diffusion_scores, even_times, random_times


class MaskedDiffusion(TextTask):
    """An upper bound of the negative log-likelihood a token, in nats; see `crescendo.models.diffusion`.

    The mask token is the first row of the vocabulary behind the data's.
    """

    name = "masked_diffusion"

    def __init__(self, data: Text, model: ModelConfig):
        super().__init__(data, model, options={"task": self.name}, reserved_tokens=1, causal=False)
        self.mask_token = data.vocab_size

    def loss(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> Loss:
        """The bound's estimate at a random time for each example, with the model's z-loss; the weight is in tokens."""
        keys_B = context.keys(rows, MASKS)
        return Loss(
            *diffusion_loss(
                self.config,
                parameters,
                dict(rows),
                keys_B,
                random_times(keys_B),
                mask_token=self.mask_token,
                z_loss=self.config.z_loss,
                implementation=context.implementation,
                layout=context.layout,
                dropout_keys_B=self.dropout_keys(rows, context),
            )
        )

    def evaluate(
        self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The bound and the accuracy of masked tokens; held-out rows have the same times and masks every time.

        The times of a sample are spread evenly, which makes the bound's estimate less noisy.
        """
        return diffusion_scores(
            self.config,
            parameters,
            dict(rows),
            dataclasses.replace(context, seed=0).keys(rows, MASKS),
            even_times(rows[EXAMPLE]),
            mask_token=self.mask_token,
            implementation=context.implementation,
            layout=context.layout,
        )


def masked_diffusion(data: Text, model: ModelConfig) -> MaskedDiffusion:
    """The task of masked diffusion (Sahoo et al., 2024, https://arxiv.org/abs/2406.07524).

    Args:
      data: packed rows, as `text_data` makes them.
      model: decided for the platform; its vocabulary is the data's and the mask token, rounded up to 128.
    """
    return MaskedDiffusion(data, model)
