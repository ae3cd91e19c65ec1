"""Masked tokens of packed text, by the decoder's blocks looking both ways (BERT)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import jax
from annotated_types import Gt, Le

from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.tasks.base import Context, Loss, Tree
from crescendo.experiments.tasks.text import MASKS, Text, TextTask
from crescendo.models import ModelConfig
from crescendo.models.encoder import masked_lm_loss, masked_lm_scores


class MaskedLM(TextTask):
    """The cross-entropy of the chosen tokens given all others of their document, in nats.

    The mask token is the first row of the vocabulary behind the data's.
    """

    name = "masked_lm"

    def __init__(self, data: Text, model: ModelConfig, mask_fraction: float):
        options = {"task": self.name, "mask_fraction": mask_fraction}
        super().__init__(data, model, options=options, reserved_tokens=1, causal=False)
        self.mask_token, self.mask_fraction = data.vocab_size, mask_fraction
        self.bytes_per_unit = {}  # the loss is one over the chosen tokens

    def loss(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> Loss:
        """With the model's z-loss; the weight is in chosen tokens."""
        return Loss(
            *masked_lm_loss(
                self.config,
                parameters,
                dict(rows),
                context.keys(rows, MASKS),
                mask_token=self.mask_token,
                mask_fraction=self.mask_fraction,
                z_loss=self.config.z_loss,
                implementation=context.implementation,
                layout=context.layout,
                dropout_keys_B=self.dropout_keys(rows, context),
            )
        )

    def evaluate(
        self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The plain cross-entropy and the accuracy of chosen tokens; a held-out row has the same ones every time."""
        return masked_lm_scores(
            self.config,
            parameters,
            dict(rows),
            dataclasses.replace(context, seed=0).keys(rows, MASKS),
            mask_token=self.mask_token,
            mask_fraction=self.mask_fraction,
            implementation=context.implementation,
            layout=context.layout,
        )


@checked
def masked_lm(data: Text, model: ModelConfig, *, mask_fraction: Annotated[float, Gt(0), Le(1)] = 0.15) -> MaskedLM:
    """The task of predicting masked tokens (Devlin et al., 2019, https://arxiv.org/abs/1810.04805).

    Of the chosen tokens 80% are shown as the mask token, 10% as a random one and 10% as they are.

    Args:
      data: packed rows, as `text_data` makes them.
      model: decided for the platform; its vocabulary is the data's and the mask token, rounded up to 128.
      mask_fraction: the part of the tokens that is chosen, above 0 and at most 1.

    Raises:
      UserError: for a fraction out of its range.
    """
    return MaskedLM(data, model, mask_fraction)
