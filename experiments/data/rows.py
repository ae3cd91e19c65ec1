"""Text as rows of tokens: tokenized once, packed, memory-mapped, and read anywhere by one integer.

documents -> held-out split by document hash -> tokens on disk -> packed rows -> a shuffled endless stream.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from crescendo.experiments.data.corpus import SPLITS, tokenize
from crescendo.experiments.data.documents import Documents, stdlib_text, text_files, tfds_text
from crescendo.experiments.data.packing import PADDING, Packing, pack
from crescendo.experiments.data.prepared import cache_root, prepared
from crescendo.experiments.data.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer, parse_tokenizer
from crescendo.experiments.runtime.errors import UserError

__all__ = ["Documents", "Rows", "Stream", "TextData", "stdlib_text", "text_data", "text_files", "tfds_text"]

FORMAT = 1  # of the files on disk and of the packing: part of every identity, to be raised when either changes


class Source(Protocol):
    """An array of examples: any of them is found by its number."""

    def __len__(self) -> int: ...

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """The rows of these numbers, stacked: `[rows, ...]` each, by name."""
        ...


class Rows:
    """Packed rows of tokens, by number; the arrays behind them are memory-mapped.

    Each row is {"tokens", "labels", "segment_ids", "positions"}, int32 [sequence_length] each: `labels[t]` is the token
    after `tokens[t]` in the same document, `segment_ids` counts the documents of the row from 1 and is 0 on padding,
    `positions` counts from the start of the document's piece in this row. On padding all four are 0.

    Args:
      tokens: integers [corpus tokens].
      packing: where in `tokens` each row's pieces lie.
      sequence_length: tokens in a row.

    Example:
      >>> corpus = np.array([9, 1, 2, 3, 9, 5, 9])  # two documents, 9 is the end of text
      >>> rows = Rows(corpus, pack(np.array([0, 4, 6]), capacity=7), sequence_length=7)
      >>> {name: array.tolist() for name, array in rows[0].items()}  # doctest: +NORMALIZE_WHITESPACE
      {'tokens': [9, 1, 2, 3, 9, 5, 0], 'labels': [1, 2, 3, 9, 5, 9, 0],
       'segment_ids': [1, 1, 1, 1, 2, 2, 0], 'positions': [0, 1, 2, 3, 0, 1, 0]}
    """

    def __init__(self, tokens: np.ndarray, packing: Packing, sequence_length: int):
        self.sequence_length = sequence_length
        self._tokens = np.asarray(tokens)  # a plain view of the memory map: np.memmap's own indexing is slower
        self._packing = Packing(*map(np.asarray, packing))

    def __len__(self) -> int:
        return len(self._packing.row_offsets) - 1

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.take([range(len(self))[i]]).items()}

    @property
    def padding_share(self) -> float:
        """The part of all positions that is padding, in [0, 1)."""
        padding = self._packing.lengths[self._packing.starts == PADDING]
        return int(padding.sum()) / (len(self) * self.sequence_length)

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """The rows of these numbers, [rows] in 0..len(self) - 1, stacked: int32 [rows, sequence_length] each."""
        row_numbers = np.asarray(row_numbers, np.int64)
        starts, lengths, row_offsets = self._packing
        pieces = row_offsets[row_numbers + 1] - row_offsets[row_numbers]
        first = np.cumsum(pieces) - pieces
        within_row = np.arange(pieces.sum()) - np.repeat(first, pieces)
        piece = np.repeat(row_offsets[row_numbers], pieces) + within_row
        start, length = starts[piece], lengths[piece]

        # Rows are full, padding included, so the pieces cover the batch without gaps.
        begin = np.cumsum(length, dtype=np.int64) - length
        positions = np.arange(len(row_numbers) * self.sequence_length) - np.repeat(begin, length)
        source = np.repeat(start, length) + positions
        segment_ids = np.repeat(np.where(start == PADDING, 0, within_row + 1).astype(np.int32), length)
        padding = np.flatnonzero(segment_ids == 0)
        source[padding] = 0
        batch = {
            "tokens": self._tokens[source].astype(np.int32),
            "labels": self._tokens[source + 1].astype(np.int32),
            "segment_ids": segment_ids,
            "positions": positions.astype(np.int32),
        }
        for array in batch.values():
            array[padding] = 0
        return {name: array.reshape(-1, self.sequence_length) for name, array in batch.items()}


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
    key = _hash([FORMAT, documents.identity, spec.identity, validation_fraction])
    corpus = prepared(root / "tokens" / key, lambda folder: tokenize(documents, spec.make, validation_fraction, folder))
    summary = json.loads((corpus / "summary.json").read_text())
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
        fingerprint=_hash([FORMAT, summary["digest"], sequence_length]),
    )


class Stream:
    """An endless stream of shuffled rows, a permutation each epoch, whose whole position is one integer.

    Args:
      rows: an array of examples, at least one.
      seed: of the permutations, in [0, 2**32).

    Raises:
      UserError: if the seed is out of its range.

    Example:
      >>> corpus = np.array([9, 1, 2, 3, 9, 5, 9])
      >>> stream = Stream(Rows(corpus, pack(np.array([0, 4, 6]), capacity=2), sequence_length=2), seed=0)
      >>> stream.read(examples_seen=6, count=3)["tokens"].shape
      (3, 2)
    """

    def __init__(self, rows: Source, seed: int):
        from grain import MapDataset  # takes a second to import

        if not 0 <= seed < 2**32:
            raise UserError(f"the data seed = {seed} must lie in 0..{2**32 - 1}")
        self._rows = rows
        self._row_numbers = MapDataset.range(len(rows)).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        return len(self._row_numbers)

    def read(self, examples_seen: int, count: int) -> dict[str, np.ndarray]:
        """The global examples examples_seen to examples_seen + count - 1: see `take`."""
        return self.take(range(examples_seen, examples_seen + count))

    def take(self, examples: ArrayLike) -> dict[str, np.ndarray]:
        """The examples of these numbers, counted from the stream's begin: any process can read any share of a batch.

        Returns:
          The arrays of the rows, `[examples, ...]` each.
        """
        return self._rows.take([self._row_numbers[i] for i in np.asarray(examples).tolist()])


def _hash(content: list) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _open_rows(corpus: Path, packed: Path, split: str, sequence_length: int) -> Rows:
    packing = Packing(*(_load_array(packed / f"{split}_{name}.npy") for name in Packing._fields))
    return Rows(_load_array(corpus / f"{split}_tokens.npy"), packing, sequence_length)


def _load_array(path: Path) -> np.ndarray:
    """Memory-maps a prepared array."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder {path.parent} and try again") from error
