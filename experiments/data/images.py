"""Images of the TFDS catalogue."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from crescendo.experiments.data.tfds import open_source


class Images:
    """Labelled images by number: images[i] is {"image": uint8 [H, W, C], "label": int}."""

    def __init__(self, source: Sequence[dict[str, Any]], image: str, label: str):
        self._source, self._image, self._label = source, image, label

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self._source[range(len(self))[i]]
        return {"image": np.asarray(example[self._image], np.uint8), "label": int(example[self._label])}


def tfds_images(
    name: str,
    *,
    split: str = "train",
    image: str = "image",
    label: str = "label",
    data_directory: str | os.PathLike | None = None,
    download: bool = False,
) -> Images:
    """The labelled images of a TFDS data set, for random access.

    Args:
      name: as in the catalogue, such as "mnist".
      split: such as "train" or "test[:1000]".
      image: the feature that holds the picture.
      label: the feature that holds the class number.
      data_directory: where TFDS keeps prepared data; None for $TFDS_DATA_DIR or ~/tensorflow_datasets.
      download: whether to download and prepare the data set if it is not there; else the network is never tried.

    Returns:
      A source with a length whose item i is {"image": uint8 [H, W, C], "label": int}.

    Raises:
      UserError: if there is no such data set, split or feature, or it is not prepared for random access.

    References:
      https://www.tensorflow.org/datasets/catalog/overview
    """
    source, _, _ = open_source(name, split, data_directory, download, [image, label])
    return Images(source, image, label)
