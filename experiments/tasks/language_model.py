"""Next tokens of packed text, by the decoder."""

import dataclasses
from collections.abc import Mapping

import jax

from crescendo.experiments.tasks.base import Context, Loss, Tree
from crescendo.experiments.tasks.text import Text, TextTask
from crescendo.models import ModelConfig
from crescendo.models.loss import next_token_loss


class LanguageModel(TextTask):
    """The cross-entropy of every token given those before it in its document, in nats."""

    name = "language_model"

    def loss(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> Loss:
        """With the model's z-loss; the weight is in tokens."""
        return Loss(*self._sums(parameters, rows, context, self.config.z_loss))

    def evaluate(
        self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The plain cross-entropy."""
        context = dataclasses.replace(context, training=False)
        return {"loss": self._sums(parameters, rows, context, 0.0)}

    def _sums(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context, z_loss: float):
        return next_token_loss(
            self.config,
            parameters,
            dict(rows),
            z_loss=z_loss,
            implementation=context.implementation,
            layout=context.layout,
            dropout_keys_B=self.dropout_keys(rows, context),
        )


def language_model(data: Text, model: ModelConfig) -> LanguageModel:
    """The task of predicting the next token.

    Args:
      data: packed rows, as `text_data` makes them.
      model: decided for the platform; its vocabulary is the data's, rounded up to 128.
    """
    return LanguageModel(data, model)
