"""Texts of the TFDS catalogue."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Literal

from crescendo.experiments.data.documents import Documents, Utf8, digest
from crescendo.experiments.data.tfds import open_source
from crescendo.experiments.runtime.errors import UserError

TFDS_READ_EXAMPLES = 256


def tfds_text(
    name: str,
    *,
    split: str = "train",
    validation_split: str | Mapping[str, str] | None = None,
    feature: str = "text",
    data_directory: str | os.PathLike | None = None,
    download: bool = False,
    errors: Literal["strict", "replace"] = "strict",
) -> Documents:
    """The texts of a TFDS data set, an example a document.

    Args:
      name: as in the catalogue, such as "ag_news_subset" or "imdb_reviews/plain_text".
      split: such as "train" or "train[:80%]".
      validation_split: to validate on, such as "test", or several held-out sets by name, such as {"validation":
        "train[80%:]", "test": "test"}; where none is called "validation", that set is split off from the documents.
      feature: the text feature to take.
      data_directory: where TFDS keeps prepared data; None for $TFDS_DATA_DIR or ~/tensorflow_datasets.
      download: whether to download and prepare the data set if it is not there; else the network is never tried.
      errors: "strict" refuses bytes that are not UTF-8; with "replace" U+FFFD stands for them, and how often is said.

    Raises:
      UserError: if there is no such data set, split or feature, it is not prepared for random access, or the feature is
        no text.

    References:
      https://www.tensorflow.org/datasets/catalog/overview
    """
    Utf8("tfds_text", errors)  # refuses what it doesn't know
    named = {"validation": validation_split} if isinstance(validation_split, str) else validation_split or {}

    def documents(split: str) -> Documents:
        return _documents(name, split, feature, data_directory, download, errors)

    return dataclasses.replace(documents(split), held_out={each: documents(of) for each, of in named.items()})


def _documents(
    name: str,
    split: str,
    feature: str,
    data_directory: str | os.PathLike | None,
    download: bool,
    errors: Literal["strict", "replace"],
) -> Documents:
    """Of one split."""
    source = open_source(name, split, data_directory, download, [feature], "tfds_text")
    full_name = source.full_name

    def read() -> Iterator[bytes]:
        utf8 = Utf8("tfds_text", errors)
        for begin in range(0, len(source), TFDS_READ_EXAMPLES):
            numbers = range(begin, min(begin + TFDS_READ_EXAMPLES, len(source)))
            for number, example in zip(numbers, source.take(numbers), strict=True):
                text = example[feature]
                if not isinstance(text, bytes):
                    raise UserError(f'TFDS data set "{name}": feature "{feature}" is {type(text).__name__}, not text')
                yield utf8(text, f"{full_name} {split}[{number}]")
        utf8.report(f"{full_name} {split}")

    identity = f"tfds {digest([full_name, split, feature, errors, source.digests()])}"
    return Documents(f"{full_name} {split}", identity, read, sum(path.stat().st_size for path in source.files))
