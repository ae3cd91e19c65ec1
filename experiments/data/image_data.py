"""Labelled images ready for training: three splits of one shape, read by number."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from crescendo.experiments.data.documents import digest
from crescendo.experiments.data.fashion_mnist import CLASSES, read_fashion_mnist
from crescendo.experiments.data.subset import Subset
from crescendo.experiments.data.tfds import Opened, open_source, refuse_other_pixels
from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.runtime.errors import UserError
from crescendo.ranges import Count

FORMAT = 1  # of the split: part of every fingerprint, to be raised when it changes


class ImageRows:
    """Labelled images in memory, by number.

    Args:
      images: uint8 [N, H, W, C].
      labels: integers [N].

    >>> rows = ImageRows(np.zeros((3, 2, 2, 1), np.uint8), np.array([5, 6, 7]))
    >>> {name: (x.shape, str(x.dtype)) for name, x in rows.take([0, 1, 1, 2]).items()}
    {'images': ((4, 2, 2, 1), 'uint8'), 'labels': ((4,), 'int32')}
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """The images of these numbers, in 0..len(self) - 1, stacked: uint8 [rows, H, W, C] and int32 [rows]."""
        numbers = np.asarray(row_numbers, np.int64)
        return {"images": self.images[numbers], "labels": self.labels[numbers]}


class DecodedRows:
    """Labelled images that are decoded when they are read.

    Args:
      source: its items have "image" and "label".
      name: of the data set, for messages.
      shape: of every image.
    """

    def __init__(self, source: Opened, name: str, shape: tuple[int, int, int]):
        self._source, self._name, self._shape = source, name, shape

    def __len__(self) -> int:
        return len(self._source)

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """As `ImageRows.take`.

        Raises:
          UserError: for an image of another shape.
        """
        examples = [self._source[int(i)] for i in np.asarray(row_numbers)]
        for example in examples:
            if np.shape(example["image"]) != self._shape:
                raise UserError(
                    f"{self._name} has images of {self._shape} and of {np.shape(example['image'])}: image_data needs a "
                    "set whose images are all of one size"
                )
        images = [np.asarray(example["image"], np.uint8) for example in examples]
        return {
            "images": np.stack(images) if images else np.empty((0, *self._shape), np.uint8),
            "labels": np.array([example["label"] for example in examples], np.int32),
        }


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set of labelled images: what `image_data` returns.

    Attributes:
      name: of the data set.
      train: the images to train on.
      validation: held out: they choose what is best.
      test: held out: they say how good it is.
      shape: (height, width, channels) of every image.
      classes: labels lie in 0..classes - 1.
      fingerprint: changes whenever the splits do.
    """

    name: str
    train: ImageRows | DecodedRows | Subset
    validation: ImageRows | DecodedRows | Subset
    test: ImageRows | DecodedRows | Subset
    shape: tuple[int, int, int]
    classes: int
    fingerprint: str

    def __str__(self) -> str:
        height, width, channels = self.shape
        return (
            f"{self.name}: images of {height} x {width} x {channels} in {self.classes:,} classes, {len(self.train):,} "
            f"to train on, {len(self.validation):,} to validate, {len(self.test):,} to test"
        )


@checked
def image_data(
    name: str = "fashion_mnist",
    *,
    validation_examples: Count = 5000,
    data_directory: str | os.PathLike | None = None,
    download: bool = False,
) -> ImageData:
    """Opens a set of labelled images, all of one shape.

    A split that the data set does not have ("validation", or "test") is taken from its training images, which are
    shuffled for that by a fixed permutation.

    Args:
      name: "fashion_mnist", which Debian's package dataset-fashion-mnist has too, or any TFDS set with the features
        "image" and "label", such as "cifar10".
      validation_examples: how many training images make such a split, at least 1.
      data_directory: where TFDS keeps prepared data, or the folder of Fashion-MNIST's four gzipped IDX files; None for
        $TFDS_DATA_DIR or ~/tensorflow_datasets, then Debian's folder.
      download: whether to download and prepare a TFDS set that is not there; else the network is never tried.

    Raises:
      UserError: if there is no such data set, it is not prepared, its images differ in shape, or it is too small.
    """
    splits: dict[str, Any]
    if name == "fashion_mnist" and not download and _outside_tfds(data_directory):
        splits = {
            split: ImageRows(*read_fashion_mnist(split, idx_directory=data_directory)) for split in ("train", "test")
        }
        shapes = {split: rows.images.shape[1:] for split, rows in splits.items()}
        if shapes["train"] != shapes["test"]:
            raise UserError(f"{name} has images of {shapes['train']} to train on and of {shapes['test']} to test")
        classes, identity = CLASSES, _rows_digest(splits)
    else:
        in_tfds, classes, identity = _tfds_splits(name, data_directory, download)
        splits = dict(in_tfds)
    shape = splits["train"].take([0])["images"].shape[1:]
    missing = [split for split in ("validation", "test") if split not in splits]
    if missing:
        order = np.random.default_rng(0).permutation(len(splits["train"]))
        if len(order) <= len(missing) * validation_examples:
            raise UserError(
                f"image_data.validation_examples = {validation_examples} for {' and '.join(missing)} would leave none "
                f"of the {len(order):,} training images of {name}: lower it"
            )
        source = splits["train"]
        for split in missing:
            order, taken = order[:-validation_examples], order[-validation_examples:]
            splits[split] = Subset(source, taken)
        splits["train"] = Subset(source, order)
    lengths = {split: len(rows) for split, rows in sorted(splits.items())}
    fingerprint = digest([FORMAT, identity, missing, lengths])
    return ImageData(name, splits["train"], splits["validation"], splits["test"], shape, classes, fingerprint)


def _outside_tfds(data_directory: str | os.PathLike | None) -> bool:
    """Whether Fashion-MNIST is to be looked for as `read_fashion_mnist` does, which falls back on Debian's package."""
    return data_directory is None or any(Path(data_directory).glob("*-idx3-ubyte.gz"))


def _tfds_splits(
    name: str, data_directory: str | os.PathLike | None, download: bool
) -> tuple[dict[str, DecodedRows], int, str]:
    """The splits of a TFDS set, how many classes it has, and a hash of its name and contents."""
    features = ["image", "label"]
    source = open_source(name, "train", data_directory, download, features, "image_data")
    full_name, digests = source.full_name, source.digests()
    classes = getattr(source.features["label"], "num_classes", None)
    if not classes:
        raise UserError(f'TFDS data set "{name}": its feature "label" is {source.features["label"]}, not a class')
    refuse_other_pixels(source, "image")
    shape = np.shape(source[0]["image"])
    splits = {"train": DecodedRows(source, full_name, shape)}
    for split in ("validation", "test"):
        if split in source.splits:
            held_out = open_source(name, split, data_directory, False, features, "image_data")
            splits[split] = DecodedRows(held_out, full_name, shape)
            digests += held_out.digests()
    return splits, classes, digest([full_name, digests])


def _rows_digest(splits: dict[str, ImageRows]) -> str:
    content = hashlib.blake2b(digest_size=16)
    for _, rows in sorted(splits.items()):
        content.update(np.ascontiguousarray(rows.images))
        content.update(rows.labels)
    return content.hexdigest()
