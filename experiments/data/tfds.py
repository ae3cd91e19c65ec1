"""Opens data sets of the TFDS catalogue as indexable sources, with no TensorFlow and, unless asked, no network."""

import contextlib
import difflib
import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from crescendo.experiments.runtime.errors import UserError


def open_source(
    name: str,
    split: str,
    data_directory: str | os.PathLike | None,
    download: bool,
    features: Sequence[str],
    called: str,
) -> tuple[Any, str, list[str]]:
    """Opens one split of a TFDS data set for random access.

    Args:
      name: as in the catalogue, such as "mnist", "imdb_reviews/plain_text" or "mnist:3.0.1".
      split: such as "train" or "train[:80%]".
      data_directory: where TFDS keeps prepared data; None for $TFDS_DATA_DIR or ~/tensorflow_datasets.
      download: whether to download and prepare the data set if it is not there.
      features: the features to decode; the others come as stored.
      called: the function whose `download` and `data_directory` these are.

    Returns:
      (source, full_name, files): source[i] is a dict of features, full_name has the configuration and the version, and
      files are the paths that hold the split.

    Raises:
      UserError: if there is no such data set, split or feature, or it is not prepared for random access.
    """
    import tensorflow_datasets as tfds  # takes a second to import

    import crescendo.experiments.data.builders.stdlib  # noqa: F401 (registers our builder)

    if re.match(r"\w+:[A-Za-z_]", name):
        raise UserError(
            f'TFDS data set "{name}": names with a namespace are looked up on the network; use text_files instead'
        )
    try:
        with _quiet():
            builder = tfds.builder(name, data_dir=data_directory)
            _check_name(os.fspath(builder.data_path), called)
            prepared = builder.is_prepared()
        if not prepared:
            if not download:
                raise UserError(
                    f'TFDS data set "{name}" is not prepared in {builder.data_path}: to download and prepare it add '
                    f"--set '{called}.download = True', or name the folder that has it by {called}.data_directory"
                )
            builder = tfds.builder(name, data_dir=data_directory, file_format="array_record")
            # The mirror bucket needs TensorFlow; the publishers' own addresses don't.
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        skipped = {feature: tfds.decode.SkipDecoding() for feature in builder.info.features if feature not in features}
        for feature in features:
            if feature not in builder.info.features:
                raise UserError(f'TFDS data set "{name}" has no feature "{feature}": it has {", ".join(skipped)}')
        source = builder.as_data_source(split, decoders=skipped)
        files = [str(path) for path in builder.info.splits[split].filepaths]
        return source, builder.info.full_name, files
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name.partition("/")[0], tfds.list_builders(with_community_datasets=False))
        raise UserError(
            f'no TFDS data set "{name}"' + (f": did you mean {', '.join(near)}?" if near else "")
        ) from error
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(f'TFDS data set "{name}", split "{split}": {" ".join(str(error).split())}') from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's own warning of what isn't prepared, which is said here, once."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check_name(folder: str, called: str) -> None:
    """That TFDS finds what it keeps in a folder: it takes `x[1]` for a pattern, and finds nothing there."""
    if glob.escape(folder) != folder:
        raise UserError(
            f"{folder}: TFDS takes [, * and ? in a folder's name for a pattern and finds nothing there: give another "
            f"one with {called}.data_directory, or for the cache with XDG_CACHE_HOME"
        )


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
    source, _, _ = open_source(name, split, data_directory, download, [image, label], "tfds_images")
    return Images(source, image, label)
