"""Masked tokens of packed text, by the decoder's blocks looking both ways (BERT)."""

import dataclasses
from typing import Annotated

from annotated_types import Gt, Le

from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.tasks.base import Context, Loss
from crescendo.experiments.tasks.text import MASKS, Text, TextTask
from crescendo.models import ModelConfig
from crescendo.models.encoder import masked_lm_parts
from crescendo.models.parts import Parts


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

    def parts(self, context: Context, *, scores: bool = False) -> Parts:
        """The loss with the model's z-loss; as scores, the plain cross-entropy and the accuracy of chosen tokens.

        The weight is in chosen tokens, and a held-out row has the same ones every time.
        """
        drawing = dataclasses.replace(context, seed=0) if scores else context
        parts = masked_lm_parts(
            self.config,
            lambda rows: drawing.keys(rows, MASKS),
            mask_token=self.mask_token,
            mask_fraction=self.mask_fraction,
            scores=scores,
            z_loss=0.0 if scores else self.config.z_loss,
            implementation=context.implementation,
            layout=context.layout,
            dropout_keys=lambda rows: self.dropout_keys(rows, context),
        )
        return parts if scores else parts.giving(lambda sums: Loss(*sums))


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
