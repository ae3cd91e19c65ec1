"""Classes of images, by a residual network or a vision transformer."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.base import Context, Loss, RowArray, Source, Tree, refuse_outside
from crescendo.experiments.tasks.text import DROPOUT, fingerprint
from crescendo.models import resnet, vit
from crescendo.models.classification import classification_accuracy, classification_loss
from crescendo.models.resnet import ResNetConfig
from crescendo.models.vit import ViTConfig
from crescendo.ranges import Decay


class Pictures(Protocol):
    """What the task needs of its data; `crescendo.experiments.data.image_data.ImageData` has it."""

    @property
    def train(self) -> Source: ...
    @property
    def validation(self) -> Source: ...
    @property
    def test(self) -> Source: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def classes(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


class Weighted:
    """A source whose rows have `weights`, float32 1: rows of zeros that fill a batch up weigh nothing.

    Args:
      source: of rows without it.
      classes: labels must be below.
    """

    def __init__(self, source: Source, classes: int):
        self._source, self._classes = source, classes

    def __len__(self) -> int:
        return len(self._source)

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """The rows of these numbers, stacked.

        Raises:
          UserError: for a label that is no class, such as the -1 of pictures whose class nobody tells.
        """
        rows = self._source.take(row_numbers)
        refuse_outside("labels", rows["labels"], row_numbers, "classes", self._classes)
        return {**rows, "weights": np.ones(len(np.asarray(row_numbers)), np.float32)}


class Images:
    """The cross-entropy of an image's class, in nats.

    Attributes:
      config: the model with the data's classes and channels.
    """

    name = "images"
    unit: str
    units_per_example: int
    flops_per_example: float
    row: Mapping[str, RowArray]
    train: Source
    held_out: Mapping[str, Source]
    bytes_per_unit: Mapping[str, float] = MappingProxyType({})
    identity: Mapping[str, Any]
    fingerprint: str

    def __init__(self, data: Pictures, model: ResNetConfig | ViTConfig, label_smoothing: float):
        height, width, channels = data.shape
        self.data = data
        self.per_example_norms = True
        self.config = dataclasses.replace(model, classes=data.classes, in_channels=channels)
        self.label_smoothing = label_smoothing
        self.unit, self.units_per_example = "image", 1
        self.network: Any = vit if isinstance(model, ViTConfig) else resnet
        self.flops_per_example = (
            self.config.flops_per_example()
            if isinstance(self.config, ViTConfig)
            else self.config.flops_per_example(height, width)
        )
        self.row = {
            "images": RowArray(data.shape, "uint8", (None, None, None)),
            "labels": RowArray((), "int32", ()),
            "weights": RowArray((), "float32", ()),
        }
        self.train = Weighted(data.train, data.classes)
        self.held_out = {
            "validation": Weighted(data.validation, data.classes),
            "test": Weighted(data.test, data.classes),
        }
        network = "vit" if isinstance(model, ViTConfig) else "resnet"
        options = {"task": self.name, "network": network, "label_smoothing": label_smoothing}
        self.identity = {**self.config.identity, **options}
        self.fingerprint = fingerprint(self.identity, data.fingerprint)

    def initialize(self, key: jax.Array) -> Tree:
        """Fresh parameters."""
        return self.network.initialize(self.config, key)

    def logical_axes(self) -> Tree:
        """The names of the parameters' axes."""
        return self.network.logical_axes(self.config)

    def place(self, layout: Any) -> Any:
        """The layout for the transformer's heads; a residual network can be split by examples only."""
        layout = layout.without_experts()
        if isinstance(self.config, ViTConfig):
            layout = layout.with_heads(self.config.heads, self.config.heads)
            layout.order(self.config.patches)  # refuses patches that the mesh can't divide
            return layout
        for axis in ("sequence", "tensor"):
            if layout.sizes[axis] > 1:
                raise ValueError(
                    f"mesh {axis} = {layout.sizes[axis]}: a residual network's pictures and channels are not split; "
                    f"use {axis} = 1 and more data or fsdp"
                )
        return layout

    def loss(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> Loss:
        """With label smoothing; the weight is in images."""
        logits_BC = self._logits(parameters, rows, context)
        smoothing = self.label_smoothing if context.training else 0.0
        return Loss(*classification_loss(logits_BC, rows["labels"], rows["weights"], label_smoothing=smoothing))

    def evaluate(
        self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The plain cross-entropy, and the accuracy."""
        logits_BC = self._logits(parameters, rows, dataclasses.replace(context, training=False))
        return {
            "loss": classification_loss(logits_BC, rows["labels"], rows["weights"]),
            "accuracy": classification_accuracy(logits_BC, rows["labels"], rows["weights"]),
        }

    def _logits(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> jax.Array:
        images_BHWC = rows["images"].astype(jnp.float32) / 127.5 - 1
        if not isinstance(self.config, ViTConfig):
            return resnet.apply(self.config, parameters)(images_BHWC, layout=context.layout)
        keys_B = context.keys(rows, DROPOUT) if context.training and self.config.dropout else None
        return vit.apply(self.config, parameters)(
            images_BHWC, implementation=context.implementation, layout=context.layout, dropout_keys_B=keys_B
        )


@checked
def images(data: Pictures, model: ResNetConfig | ViTConfig, *, label_smoothing: Decay = 0.0) -> Images:
    """The task of classifying images, whose bytes are brought to -1 .. 1.

    Args:
      data: as `image_data` makes it.
      model: decided for the platform; its classes and channels become the data's.
      label_smoothing: the part of a label that is spread over all classes in training, in [0, 1).

    Raises:
      UserError: for data that are no images, a smoothing out of its range, or pictures larger than the transformer's.
    """
    if not hasattr(data, "classes"):
        raise UserError(
            f"train.data: {data} has no images with classes, which the task images is about: use @image_data()"
        )
    if isinstance(model, ViTConfig) and max(data.shape[:2]) > model.image_size:
        raise UserError(
            f"vit.image_size = {model.image_size} is smaller than pictures of {data.shape[0]} x {data.shape[1]}: "
            f"use {-(-max(data.shape[:2]) // model.patch_size) * model.patch_size}"
        )
    return Images(data, model, label_smoothing)
