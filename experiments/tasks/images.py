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
from crescendo.models.parts import Parts
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
        layout = layout.with_experts(None)
        if isinstance(self.config, ViTConfig):
            layout = layout.with_heads(self.config.heads, self.config.heads)
            layout.order(self.config.patches)  # refuses patches that the mesh can't divide
            return layout
        layout = layout.without_stages()
        for axis in ("sequence", "tensor"):
            if layout.sizes[axis] > 1:
                raise ValueError(
                    f"mesh {axis} = {layout.sizes[axis]}: a residual network's pictures and channels are not split; "
                    f"use {axis} = 1 and more data or fsdp"
                )
        return layout

    def loss(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> Loss:
        """With label smoothing; the weight is in images."""
        return self._of_batch(parameters, rows, context, scores=False)

    def evaluate(
        self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The plain cross-entropy, and the accuracy."""
        return self._of_batch(parameters, rows, dataclasses.replace(context, training=False), scores=True)

    def features(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> jax.Array:
        """What the last layer is given: the mean over places behind the last norm, or over pixels, float32 `[B, D]`."""
        config, layout, implementation = self.config, context.layout, context.implementation
        if not isinstance(config, ViTConfig):
            return resnet.apply(config, parameters).features(_pixels(rows), layout)
        model = vit.apply(config, parameters)
        stream = model.through(model.enter(_pixels(rows), layout), implementation=implementation, layout=layout)
        return model.features(stream, layout, implementation=implementation)

    def parts(self, context: Context, *, scores: bool = False) -> Parts | None:
        """Those of the transformer; a residual network has none."""
        config, layout, implementation = self.config, context.layout, context.implementation
        if not isinstance(config, ViTConfig):
            return None

        def enter(parameters, rows):
            return vit.apply(config, parameters).enter(_pixels(rows), layout)

        def layers(parameters, stream, rows, first):
            stream = vit.apply(config, parameters).through(
                stream,
                implementation=implementation,
                layout=layout,
                dropout_keys_B=context.keys(rows, DROPOUT) if context.training and config.dropout else None,
                first_layer=first,
            )
            return stream, None

        def leave(parameters, stream, rows):
            logits_BC = vit.apply(config, parameters).leave(stream, layout, implementation=implementation)
            return self._sums(logits_BC, rows, context, scores)

        return Parts(enter, layers, leave)

    def _of_batch(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context, *, scores: bool):
        if (parts := self.parts(context, scores=scores)) is not None:
            return parts(parameters, rows)
        assert isinstance(self.config, ResNetConfig)
        logits_BC = resnet.apply(self.config, parameters)(_pixels(rows), layout=context.layout)
        return self._sums(logits_BC, rows, context, scores)

    def _sums(self, logits_BC: jax.Array, rows: Mapping[str, jax.Array], context: Context, scores: bool):
        labels_B, weights_B = rows["labels"], rows["weights"]
        if scores:
            return {
                "loss": classification_loss(logits_BC, labels_B, weights_B),
                "accuracy": classification_accuracy(logits_BC, labels_B, weights_B),
            }
        smoothing = self.label_smoothing if context.training else 0.0
        return Loss(*classification_loss(logits_BC, labels_B, weights_B, label_smoothing=smoothing))


def _pixels(rows: Mapping[str, jax.Array]) -> jax.Array:
    return rows["images"].astype(jnp.float32) / 127.5 - 1


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
