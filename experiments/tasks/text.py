"""What the tasks over packed text share: their rows, their model's vocabulary, and where their parameters go."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from crescendo import models
from crescendo.experiments.data.rows import Order, row_order
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.base import Context, Loss, RowArray, Source, Tree, refuse_outside
from crescendo.models import ModelConfig, axes
from crescendo.models.parts import Parts
from crescendo.parallel.rules import check_groups

VOCAB_MULTIPLE = 128
"""The vocabulary is rounded up to this, so that the output matmul fills the hardware's tiles."""

# What a task's random draws are for (`Context.keys`): the numbers keep them apart.
DROPOUT, MASKS = 0, 1


class Text(Protocol):
    """What a task needs of its data; `crescendo.experiments.data.text_data.TextData` has it."""

    @property
    def train(self) -> Source: ...
    @property
    def held_out(self) -> Mapping[str, Source]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


class InVocabulary:
    """A source of packed rows that refuses tokens that a vocabulary doesn't have: a model has no vector for them.

    Args:
      source: of the rows.
      vocab_size: tokens and labels must be below, but for padding.
    """

    def __init__(self, source: Source, vocab_size: int):
        self._source, self._vocab_size = source, vocab_size

    def __len__(self) -> int:
        return len(self._source)

    def order(self, seed: int) -> Order:
        """The source's."""
        return row_order(self._source, seed)

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """The rows of these numbers, stacked.

        Raises:
          UserError: names the first token that isn't in the vocabulary.
        """
        rows = self._source.take(row_numbers)
        for name in ("tokens", "labels"):
            refuse_outside(name, rows[name], row_numbers, "vocab_size", self._vocab_size, rows["segment_ids"] > 0)
        return rows


class TextTask:
    """A transformer over packed rows; a task adds its name and `parts`.

    A loss that isn't one over every token of a text empties `bytes_per_unit`.

    Args:
      data: packed rows.
      model: decided for the platform; its vocabulary becomes the data's, rounded up to `VOCAB_MULTIPLE`.
      options: what else fixes what is computed, as JSON.
      reserved_tokens: rows of the vocabulary to keep behind the data's.
      causal: whether attention looks back only, for the count of FLOPs.

    Attributes:
      data: as given.
      config: the model with its vocabulary.

    Raises:
      UserError: for data that are no text, and later for rows with tokens outside of its vocabulary.
    """

    name: str
    unit: str
    units_per_example: int
    flops_per_example: float
    row: Mapping[str, RowArray]
    train: Source
    held_out: Mapping[str, Source]
    bytes_per_unit: Mapping[str, float]
    identity: Mapping[str, Any]
    fingerprint: str
    per_example_norms = True

    def __init__(
        self,
        data: Text,
        model: ModelConfig,
        *,
        options: Mapping[str, Any] = MappingProxyType({}),
        reserved_tokens: int = 0,
        causal: bool = True,
    ):
        if not hasattr(data, "sequence_length"):
            raise UserError(
                f"train.data: {data} has no rows of tokens, which the task {self.name} is about: use @text_data()"
            )
        if not isinstance(model, ModelConfig):
            raise UserError(
                f"train.model is a {type(model).__name__}, which reads no tokens, as the task {self.name} has them: "
                "use @model(), or another train.task"
            )
        vocab_size = -(-(data.vocab_size + reserved_tokens) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        length, self._causal = data.sequence_length, causal
        self.data = data
        self.config = dataclasses.replace(model, vocab_size=vocab_size)
        self.unit = "token"
        self.units_per_example = length
        self.config.expert_rows(length)  # refuses a capacity below one token
        self.flops_per_example = self.config.flops_per_token(length, causal=causal) * length
        self.row = dict.fromkeys(
            ("tokens", "labels", "segment_ids", "positions"), RowArray((length,), "int32", (axes.LENGTH,))
        )
        self.train = InVocabulary(data.train, data.vocab_size)
        self.held_out = {name: InVocabulary(rows, data.vocab_size) for name, rows in data.held_out.items()}
        lengths = {name: getattr(rows, "bytes_per_token", None) for name, rows in data.held_out.items()}
        self.bytes_per_unit = {name: length for name, length in lengths.items() if length is not None}
        self.identity = {**self.config.identity, **options}
        self.fingerprint = fingerprint(self.identity, data.fingerprint)

    def initialize(self, key: jax.Array) -> Tree:
        """Fresh parameters."""
        return models.initialize(self.config, key)

    def logical_axes(self) -> Tree:
        """The names of the parameters' axes."""
        return models.logical_axes(self.config)

    def place(self, layout: Any) -> Any:
        """The layout for this model's heads."""
        layout = layout.with_experts(self.config.experts).with_heads(self.config.heads, self.config.kv_heads)
        if self.config.moe_every > 1:
            check_groups(
                *(self.config.layers, self.config.moe_every),
                stage=layout.sizes["stage"],
                chunks=layout.strategy.chunks,
            )
        order = layout.order(self.data.sequence_length)  # refuses rows that the mesh can't divide
        if order is not None and self.config.expert_capacity is not None:
            raise ValueError(
                f"expert_capacity = {self.config.expert_capacity:g} fills experts in the order of a row's tokens, "
                f"which a ring of devices doesn't keep: use strategy.ulysses = {layout.sizes['sequence']}, mesh "
                "sequence = 1, or None to drop no token"
            )
        if self.config.shared_layers:
            layout = layout.without_stages("its layers share one block's weights, which no stage would have alone")
        return layout.without_stages() if type(self).parts is TextTask.parts else layout

    def parts(self, context: Context, *, scores: bool = False) -> Parts:
        """The training loss, a `Loss`, or if `scores` what is evaluated, in the parts that stages of a pipeline share.

        A task that gives `loss` and `evaluate` instead can be split over all axes but `stage`.
        """
        raise NotImplementedError

    def loss(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> Loss:
        """The training loss of a batch."""
        return self.parts(context)(parameters, rows)

    def evaluate(
        self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """What is evaluated of held-out rows."""
        return self.parts(dataclasses.replace(context, training=False), scores=True)(parameters, rows)

    def features(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> jax.Array:
        """The mean of each row's hidden states behind the last norm, padding left out, float32 `[B, D]`."""
        hidden_BTD = models.apply(self.config, parameters)(
            rows["tokens"],
            rows["segment_ids"],
            rows["positions"],
            causal=self._causal,
            implementation=context.implementation,
            layout=context.layout,
        )
        weights_BT = (rows["segment_ids"] > 0).astype(jnp.float32)
        sums_BD = jnp.einsum("btd,bt->bd", hidden_BTD.astype(jnp.float32), weights_BT)
        return sums_BD / jnp.maximum(jnp.sum(weights_BT, axis=1, keepdims=True), 1)

    def dropout_keys(self, rows: Mapping[str, jax.Array], context: Context) -> jax.Array | None:
        """The keys of the batch's dropout; None where there is none."""
        return context.keys(rows, DROPOUT) if context.training and self.config.dropout else None


def fingerprint(identity: Mapping[str, Any], of_data: str) -> str:
    """Of a model and the rows that it reads, 16 hexadecimal digits.

    >>> fingerprint({"width": 8}, "rows") == fingerprint({"width": 9}, "rows")
    False
    """
    return hashlib.blake2b(json.dumps([dict(identity), of_data]).encode(), digest_size=8).hexdigest()
