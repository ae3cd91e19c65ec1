"""Text by masked diffusion: any part of a document is filled in from any other."""

import dataclasses

from crescendo.experiments.tasks.base import EXAMPLE, Context, Loss
from crescendo.experiments.tasks.text import MASKS, Text, TextTask
from crescendo.models import ModelConfig
from crescendo.models.diffusion import diffusion_parts, even_times, random_times
from crescendo.models.parts import Parts


class MaskedDiffusion(TextTask):
    """An upper bound of the negative log-likelihood a token, in nats; see `crescendo.models.diffusion`.

    The mask token is the first row of the vocabulary behind the data's.
    """

    name = "masked_diffusion"

    def __init__(self, data: Text, model: ModelConfig):
        super().__init__(data, model, options={"task": self.name}, reserved_tokens=1, causal=False)
        self.mask_token = data.vocab_size

    def parts(self, context: Context, *, scores: bool = False) -> Parts:
        """The bound's estimate at a random time for each example, with the model's z-loss; the weight is in tokens.

        As scores, the bound and the accuracy of masked tokens: held-out rows have the same times and masks every time,
        and the times of a sample are spread evenly, which makes the estimate less noisy.
        """
        drawing = dataclasses.replace(context, seed=0) if scores else context

        def draws(rows):
            keys_B = drawing.keys(rows, MASKS)
            return keys_B, even_times(rows[EXAMPLE]) if scores else random_times(keys_B)

        parts = diffusion_parts(
            self.config,
            draws,
            mask_token=self.mask_token,
            scores=scores,
            z_loss=0.0 if scores else self.config.z_loss,
            implementation=context.implementation,
            layout=context.layout,
            dropout_keys=lambda rows: self.dropout_keys(rows, context),
        )
        return parts if scores else parts.giving(lambda sums: Loss(*sums))


def masked_diffusion(data: Text, model: ModelConfig) -> MaskedDiffusion:
    """The task of masked diffusion (Sahoo et al., 2024, https://arxiv.org/abs/2406.07524).

    Args:
      data: packed rows, as `text_data` makes them.
      model: decided for the platform; its vocabulary is the data's and the mask token, rounded up to 128.
    """
    return MaskedDiffusion(data, model)
