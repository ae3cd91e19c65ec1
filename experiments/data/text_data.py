"""Text as packed rows: tokenized once, packed, memory-mapped.

documents -> held-out split by document hash -> tokens on disk -> packed rows -> a shuffled endless stream.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crescendo.experiments.data.corpus import SPLITS, tokenize
from crescendo.experiments.data.documents import Documents, digest
from crescendo.experiments.data.packing import Packing, pack
from crescendo.experiments.data.preparation import cache_root, prepared
from crescendo.experiments.data.rows import Rows
from crescendo.experiments.data.stdlib_text import stdlib_text
from crescendo.experiments.data.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer, parse_tokenizer
from crescendo.experiments.runtime.encoding import read_text
from crescendo.experiments.runtime.errors import UserError

FORMAT = 1  # of the files on disk and of the packing: part of every identity, to be raised when either changes


@dataclass(frozen=True)
class TextData:
    """A corpus ready for training: what `text_data` returns.

    Attributes:
      train: the rows to train on.
      validation: the rows of the held-out documents.
      tokenizer: the tokenizer of both.
      documents: how many documents there are in all.
      tokens: how many tokens are in both splits, each document's end of text included.
      fingerprint: changes whenever the rows do; equal on every machine that prepares the same corpus.
    """

    train: Rows
    validation: Rows
    tokenizer: Tokenizer
    documents: int
    tokens: int
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        """The tokenizer's exact count."""
        return self.tokenizer.vocab_size

    @property
    def sequence_length(self) -> int:
        """Tokens in a row."""
        return self.train.sequence_length

    @property
    def padding_share(self) -> float:
        """The part of the training rows that is padding, in [0, 1)."""
        return self.train.padding_share

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens of {self.vocab_size:,} kinds, in rows of "
            f"{self.sequence_length:,}: {len(self.train):,} to train on ({self.padding_share:.2%} padding), "
            f"{len(self.validation):,} held out"
        )


def text_data(
    documents: Documents | None = None,
    *,
    tokenizer: str = "bytes",
    sequence_length: int = 128,
    validation_fraction: float = 0.05,
    cache_directory: str | os.PathLike | None = None,
) -> TextData:
    """Tokenizes and packs documents, or opens what an earlier call prepared.

    Each document becomes its tokens between two end-of-text tokens; every token but the first is a label exactly once.
    A document is held out if a hash of its content, as a number in [0, 1), is below `validation_fraction`, so adding
    documents never moves one from one split to the other.

    Args:
      documents: from `text_files`, `tfds_text` or `stdlib_text`; None for `stdlib_text`.
      tokenizer: "bytes"; "bpe:VOCAB_SIZE", a byte-level BPE trained on the training documents; or the path of a
        tokenizer.json file.
      sequence_length: tokens in a row, at least 1.
      validation_fraction: the part of the documents to hold out, between 0 and 1.
      cache_directory: where prepared data are kept; None for `crescendo` in $XDG_CACHE_HOME, else in ~/.cache.

    Returns:
      The data, memory-mapped.

    Raises:
      UserError: for a value out of its range, an unreadable corpus, one too small for a row of each split, or a disk
        that is full or can't be written.

    Example:
      >>> import tempfile
      >>> poem = Documents("a poem", "poem 1", lambda: (f"line {i} of a poem".encode() for i in range(200)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     data = text_data(poem, sequence_length=64, cache_directory=folder)
      >>> print(data)
      200 documents, 3,690 tokens of 257 kinds, in rows of 64: 63 to train on (13.57% padding), 4 held out
      >>> data.tokenizer.decode(data.train[0]["tokens"][:20])
      'line 100 of a poem'
    """
    if sequence_length < 1:
        raise UserError(f"text_data.sequence_length = {sequence_length} must be at least 1")
    if not 0 < validation_fraction < 1:
        raise UserError(f"text_data.validation_fraction = {validation_fraction} must lie between 0 and 1, as 0.05 does")
    spec = parse_tokenizer(tokenizer)
    documents = documents or stdlib_text(cache_directory=cache_directory)

    root = cache_root(cache_directory)
    key = digest([FORMAT, documents.identity, spec.identity, validation_fraction])
    corpus = prepared(root / "tokens" / key, lambda folder: tokenize(documents, spec.make, validation_fraction, folder))
    summary = json.loads(read_text(corpus / "summary.json"))
    pairs = summary["pairs"]
    for split in SPLITS:
        if pairs[split] < sequence_length:
            raise UserError(
                f"the corpus {documents.source} is too small: its {split} split has {pairs[split]} tokens, fewer than "
                f"one row of text_data.sequence_length = {sequence_length}; add text, lower the sequence length, or "
                f"change text_data.validation_fraction = {validation_fraction}"
            )

    def pack_splits(folder: Path) -> None:
        for split in SPLITS:
            offsets = _load_array(corpus / f"{split}_offsets.npy")
            for name, array in pack(offsets, sequence_length)._asdict().items():
                np.save(folder / f"{split}_{name}.npy", array)

    packed = prepared(root / "rows" / f"{key}-{sequence_length}", pack_splits)
    train, validation = (_open_rows(corpus, packed, split, sequence_length) for split in SPLITS)
    tokenizer_file = corpus / "tokenizer.json"
    return TextData(
        train=train,
        validation=validation,
        tokenizer=SubwordTokenizer.load(tokenizer_file) if tokenizer_file.exists() else ByteTokenizer(),
        documents=summary["documents"],
        tokens=sum(pairs.values()),
        fingerprint=digest([FORMAT, summary["digest"], sequence_length]),
    )


def _open_rows(corpus: Path, packed: Path, split: str, sequence_length: int) -> Rows:
    packing = Packing(*(_load_array(packed / f"{split}_{name}.npy") for name in Packing._fields))
    return Rows(_load_array(corpus / f"{split}_tokens.npy"), packing, sequence_length)


def _load_array(path: Path) -> np.ndarray:
    """Memory-maps a prepared array."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder {path.parent} and try again") from error
