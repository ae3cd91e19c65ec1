"""Opens data sets of the TFDS catalogue as indexable sources, with no TensorFlow and, unless asked, no network."""

import atexit
import contextlib
import difflib
import functools
import glob
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crescendo.experiments.data.documents import file_digests
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import local_path, open_file
from crescendo.experiments.runtime.text import in_short

MOST_METADATA_BYTES = 64 << 20  # of a file of JSON in a data set's folder


class Opened:
    """One split of a TFDS data set, by number; what TFDS can't read of it is a `UserError`.

    Args:
      source: TFDS' own.
      info: TFDS' own, of the data set.
      files: that hold the split.

    Attributes:
      full_name: with the configuration and the version.
      features: by name.
      splits: the names of all.
      files: as given.
    """

    def __init__(self, source: Any, info: Any, files: Sequence[Path]):
        self._source, self.files = source, files
        self.full_name, self.features, self.splits = info.full_name, info.features, list(info.splits)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One example, a dict of features."""
        with _refusals(f"{self.full_name}, example {number}"):
            return self._source[number]

    def take(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Several examples, read together."""
        with _refusals(f"{self.full_name}, examples {numbers[0]} to {numbers[-1]}"):
            return self._source.__getitems__(numbers)

    def digests(self) -> list[str]:
        """A hash of each file."""
        with _refusals(self.full_name):
            return file_digests(self.files)


def open_source(
    name: str,
    split: str,
    data_directory: str | os.PathLike | None,
    download: bool,
    features: Sequence[str],
    called: str,
) -> Opened:
    """Opens one split of a TFDS data set for random access.

    Args:
      name: as in the catalogue, such as "mnist", "imdb_reviews/plain_text" or "mnist:3.0.1".
      split: such as "train" or "train[:80%]".
      data_directory: where TFDS keeps prepared data; None for $TFDS_DATA_DIR or ~/tensorflow_datasets.
      download: whether to download and prepare the data set if it is not there.
      features: the features to decode; the others come as stored.
      called: the function whose `download` and `data_directory` these are.

    Raises:
      UserError: if there is no such data set, split or feature, it is not prepared for random access, or its folder is
        damaged or names code of its own.
    """
    import tensorflow_datasets as tfds  # takes a second to import

    import crescendo.experiments.data.builders.stdlib  # noqa: F401 (registers our builder)

    if re.match(r"\w+:[A-Za-z_]", name):
        raise UserError(
            f'TFDS data set "{name}": names with a namespace are looked up on the network; use text_files instead'
        )
    given = data_directory or os.environ.get("TFDS_DATA_DIR")
    if given and glob.escape(os.fspath(given)) != os.fspath(given):
        data_directory = _link_to(local_path(given).absolute())
    with _refusals(f'TFDS data set "{name}", split "{split}"'), _no_imports():
        try:
            _check_files(name, data_directory)
            with _quiet():
                builder = tfds.builder(name, data_dir=data_directory)
                prepared = builder.is_prepared()
        except tfds.core.DatasetNotFoundError as error:
            near = difflib.get_close_matches(name.partition("/")[0], tfds.list_builders(with_community_datasets=False))
            raise UserError(
                f'no TFDS data set "{name}"' + (f": did you mean {', '.join(near)}?" if near else "")
            ) from error
        if not prepared:
            if not download:
                folder = str(builder.data_path).replace(str(data_directory), str(given)) if given else builder.data_path
                raise UserError(
                    f'TFDS data set "{name}" is not prepared in {folder}: to download and prepare it add '
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
        files = [Path(path) for path in builder.info.splits[split].filepaths]
        return Opened(source, builder.info, files)


@functools.cache
def _link_to(directory: Path) -> Path:
    """A link to a folder whose path TFDS takes for a pattern and finds nothing; it is there while the process lives."""
    folder = tempfile.mkdtemp(prefix="tfds-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = Path(folder, "data")
    link.symlink_to(directory)
    return link


def _check_files(name: str, data_directory: str | os.PathLike | None) -> None:
    """Refuses, in the folder of a data set, what TFDS would wait for or fill the memory with."""
    import tensorflow_datasets as tfds

    data_set = tfds.core.naming.parse_builder_name_kwargs(name)[0].name
    for directory in tfds.core.utils.file_utils.list_data_dirs(given_data_dir=data_directory):
        for folder, _, names in os.walk(Path(directory).expanduser() / data_set):
            for path in (Path(folder, each) for each in names):
                with open_file(path) as file:
                    size = os.fstat(file.fileno()).st_size
                if path.suffix == ".json" and size > MOST_METADATA_BYTES:
                    raise UserError(f"{path} has {size:,} bytes, above the {MOST_METADATA_BYTES:,} that it may have")


@contextlib.contextmanager
def _no_imports() -> Iterator[None]:
    """TFDS imports the module of whatever feature a data set's folder names; here features are those that there are."""
    import tensorflow_datasets as tfds

    connector = tfds.features.FeatureConnector
    import_and_find = vars(connector)["cls_from_name"]

    def find(cls: type, name: str) -> type:
        if name not in cls._registered_features:  # type: ignore[attr-defined]
            raise UserError(
                f"the data set names the feature {name!r}, which isn't TFDS' own, and a data set's code isn't imported"
            )
        return import_and_find.__get__(None, cls)(name)

    connector.cls_from_name = classmethod(find)
    try:
        yield
    finally:
        connector.cls_from_name = import_and_find


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Around TFDS, each of whose many parts says in its own way what is wrong with a folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {in_short(error, most=300)}") from error


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


def refuse_other_pixels(source: Opened, image: str) -> None:
    """Refuses pictures whose pixels aren't bytes: as bytes, floats would become others."""
    if (dtype := getattr(source.features[image], "np_dtype", None)) != np.uint8:
        raise UserError(f'{source.full_name}: the feature "{image}" is {dtype}, and pictures must be uint8')


class Images:
    """Labelled images by number: images[i] is {"image": uint8 [H, W, C], "label": int}."""

    def __init__(self, source: Opened, image: str, label: str):
        refuse_other_pixels(source, image)
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
    source = open_source(name, split, data_directory, download, [image, label], "tfds_images")
    return Images(source, image, label)
