"""Text as packed rows: tokenized once, packed, memory-mapped.

documents -> held-out split by document hash -> tokens on disk -> packed rows -> a shuffled endless stream.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Gt, Lt

from crescendo.experiments.data.corpus import TRAIN, VALIDATION, Summary, tokenize
from crescendo.experiments.data.documents import Documents, digest
from crescendo.experiments.data.manifest import Blocks
from crescendo.experiments.data.packing import Packing, pack
from crescendo.experiments.data.preparation import cache_root, prepared
from crescendo.experiments.data.rows import Rows
from crescendo.experiments.data.stdlib_text import stdlib_text
from crescendo.experiments.data.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer, parse_tokenizer
from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.runtime.errors import UserError
from crescendo.ranges import Count

FORMAT = 1  # of the rows: part of every identity, to be raised when they change
FILES = 2  # of what is kept on disk, likewise of the folders' names alone


@dataclass(frozen=True)
class TextData:
    """A corpus ready for training: what `text_data` returns.

    Attributes:
      train: the rows to train on.
      held_out: the rows of the held-out documents, in sets by name; the first one is "validation".
      tokenizer: the tokenizer of all.
      documents: how many documents there are in all.
      tokens: how many tokens are in all of them, each document's end of text included.
      fingerprint: changes whenever the rows do; equal on every machine that prepares the same corpus.
    """

    train: Rows
    held_out: Mapping[str, Rows]
    tokenizer: Tokenizer
    documents: int
    tokens: int
    fingerprint: str

    @property
    def validation(self) -> Rows:
        """The held-out set that decides what is best."""
        return self.held_out[VALIDATION]

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
        sets = ", ".join(
            f"{len(rows):,} {'held out' if name == VALIDATION else name}" for name, rows in self.held_out.items()
        )
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens of {self.vocab_size:,} kinds, in rows of "
            f"{self.sequence_length:,}: {len(self.train):,} to train on ({self.padding_share:.2%} padding), {sets}"
        )


@checked
def text_data(
    documents: Documents | None = None,
    *,
    tokenizer: str = "bytes",
    sequence_length: Count = 128,
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05,
    cache_directory: str | os.PathLike | None = None,
) -> TextData:
    """Tokenizes and packs documents, or opens what an earlier call prepared.

    Each document becomes its tokens between two end-of-text tokens; every token but the first is a label exactly once.
    A document is held out if a hash of its content, as a number in [0, 1), is below `validation_fraction`, so adding
    documents never moves one from one split to the other. A corpus may bring held-out sets of its own
    (`Documents.held_out`); where one of them is called "validation", all documents are trained on.

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
    documents = documents or stdlib_text(cache_directory=cache_directory)
    corpus = _prepare(documents, tokenizer, sequence_length, validation_fraction, cache_root(cache_directory))
    pairs = corpus.summary.pairs
    for split in (split for split in (TRAIN, VALIDATION) if split not in (documents.held_out or {})):
        if pairs[split] < sequence_length:
            raise UserError(
                f"the corpus {documents.source} is too small: its {split} split has {pairs[split]} tokens, fewer than "
                f"one row of text_data.sequence_length = {sequence_length}; add text, lower the sequence length, or "
                f"change text_data.validation_fraction = {validation_fraction}"
            )
    return corpus.text_data()


def held_out_text(
    sets: Mapping[str, Documents],
    *,
    tokenizer: str,
    sequence_length: int,
    cache_directory: str | os.PathLike | None = None,
) -> TextData:
    """Held-out sets alone, to evaluate on: there are no rows to train on.

    Args:
      sets: by name.
      tokenizer: the path of a tokenizer.json file.
      sequence_length: tokens in a row.
      cache_directory: see `text_data`.

    Raises:
      UserError: for a set without any text; see `text_data`.

    >>> import tempfile
    >>> poem = Documents("a poem", "poem 1", lambda: (f"line {i} of a poem".encode() for i in range(20)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     data = held_out_text({"poem": poem}, tokenizer="bytes", sequence_length=64, cache_directory=folder)
    >>> len(data.train), len(data.held_out["poem"]), round(data.held_out["poem"].bytes_per_token, 3)  # 330 / 350
    (0, 7, 0.943)
    """
    nothing = Documents("held-out sets", "", lambda: iter(()), 0, sets)
    return _prepare(nothing, tokenizer, sequence_length, 0.0, cache_root(cache_directory)).text_data(sets)


@dataclass(frozen=True)
class _Prepared:
    """A corpus on disk: the folders of its tokens and of its rows, and what `tokenize` says of it."""

    tokens: Path
    rows: Path
    sequence_length: int
    of_bytes: bool
    summary: Summary

    def text_data(self, held_out: Iterable[str] | None = None) -> TextData:
        """The corpus, opened, with these held-out sets; None: all of them."""
        pairs = self.summary.pairs
        return TextData(
            train=self._open(TRAIN),
            held_out={split: self._open(split) for split in held_out or [each for each in pairs if each != TRAIN]},
            tokenizer=ByteTokenizer() if self.of_bytes else SubwordTokenizer.load(self.tokens / "tokenizer.json"),
            documents=self.summary.documents,
            tokens=sum(pairs.values()),
            fingerprint=digest([FORMAT, self.summary.digest, self.sequence_length]),
        )

    def _open(self, split: str) -> Rows:
        packing = Packing(*(_load_array(self.rows / f"{split}_{name}.npy") for name in Packing._fields))
        name, pairs = f"{split}_tokens.npy", self.summary.pairs[split]
        tokens = _load_array(self.tokens / name)
        bytes_per_token = self.summary.bytes[split] / pairs if pairs else None
        blocks = Blocks(self.tokens, name, tokens)
        return Rows(tokens, packing, self.sequence_length, bytes_per_token, before_reading=blocks.check)


def _prepare(
    documents: Documents, tokenizer: str, sequence_length: int, validation_fraction: float, root: Path
) -> _Prepared:
    """Tokenizes and packs what isn't there yet."""
    sets = documents.held_out or {}
    for name in sets:
        if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII) or name == TRAIN:
            raise UserError(f"a held-out set can't be called {name!r}: use letters, digits, _ and -, and not 'train'")
    spec = parse_tokenizer(tokenizer)
    identities = {name: of.identity for name, of in sets.items()}
    key = digest([FORMAT, FILES, documents.identity, spec.identity, validation_fraction, identities])
    corpus = prepared(
        root / "tokens" / key,
        lambda folder: tokenize(documents, spec.make, validation_fraction, folder),
        by_block="*_tokens.npy",
    )
    summary = schemas.read(corpus / "summary.json", Summary)
    for name, of in sets.items():
        if not summary.pairs[name]:
            raise UserError(f"the held-out set {name} ({of.source}) is empty: it has no document with any text")

    def pack_splits(folder: Path) -> None:
        for split in summary.pairs:
            offsets = _load_array(corpus / f"{split}_offsets.npy")
            for name, array in pack(offsets, sequence_length)._asdict().items():
                np.save(folder / f"{split}_{name}.npy", array)

    rows = prepared(root / "rows" / f"{key}-{sequence_length}", pack_splits, made_of=summary.digest)
    return _Prepared(corpus, rows, sequence_length, spec.identity == "bytes", summary)


def _load_array(path: Path) -> np.memmap:
    """Memory-maps a prepared array."""
    return np.load(path, mmap_mode="r")
