"""Next tokens of packed text, by the decoder."""

from crescendo.experiments.tasks.base import Context, Loss
from crescendo.experiments.tasks.text import Text, TextTask
from crescendo.models import ModelConfig
from crescendo.models.loss import next_token_parts
from crescendo.models.parts import Parts


class LanguageModel(TextTask):
    """The cross-entropy of every token given those before it in its document, in nats."""

    name = "language_model"

    def parts(self, context: Context, *, scores: bool = False) -> Parts:
        """With the model's z-loss, or if `scores` without; the weight is in tokens."""
        parts = next_token_parts(
            self.config,
            scores=scores,
            z_loss=0.0 if scores else self.config.z_loss,
            implementation=context.implementation,
            layout=context.layout,
            dropout_keys=lambda rows: self.dropout_keys(rows, context),
        )
        return parts if scores else parts.giving(lambda sums: Loss(*sums))


def language_model(data: Text, model: ModelConfig) -> LanguageModel:
    """The task of predicting the next token.

    Args:
      data: packed rows, as `text_data` makes them.
      model: decided for the platform; its vocabulary is the data's, rounded up to 128.
    """
    return LanguageModel(data, model)
