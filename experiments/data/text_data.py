"""Text as packed rows: tokenized once, packed, memory-mapped.

documents -> held-out split by document hash -> tokens on disk -> packed rows -> a shuffled endless stream.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
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
class _Content:
    """Prepared data, opened: see `TextData`."""

    train: Rows
    held_out: Mapping[str, Rows]
    tokenizer: Tokenizer
    documents: int
    tokens: int
    fingerprint: str


class ExpectedText:
    """What is known of data that are not prepared yet: enough to compile for them.

    It has no rows: what asks for one, or how many there are, can't be compiled ahead.

    Args:
      vocab_size: the tokenizer's count, or what it should reach.
      sequence_length: tokens in a row.
      held_out: the names of the held-out sets.

    >>> len(ExpectedText(257, 128, ["validation"]).train)
    Traceback (most recent call last):
    ...
    crescendo.experiments.data.text_data.NotPreparedError: the data are not prepared yet
    """

    fingerprint = "expected"

    def __init__(self, vocab_size: int, sequence_length: int, held_out: Iterable[str]):
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.train = _NoRows()
        self.held_out = {name: _NoRows() for name in held_out}

    def fits(self, data: "TextData") -> bool:
        """Whether the data are as was expected, so that programs for the one serve the other."""
        return (self.vocab_size, self.sequence_length) == (data.vocab_size, data.sequence_length)


class NotPreparedError(Exception):
    """Rows were asked for that nobody has made."""

    def __init__(self) -> None:
        super().__init__("the data are not prepared yet")


class _NoRows:
    """In the place of rows."""

    def __len__(self) -> int:
        raise NotPreparedError

    def take(self, row_numbers: object) -> dict[str, np.ndarray]:
        raise NotPreparedError


class TextData:
    """A corpus ready for training: what `text_data` returns. It is prepared, or opened, when it is first asked for.

    Args:
      sequence_length: tokens in a row.
      open_content: prepares the data where they aren't there.
      expect: gives what is known of them then.

    Raises:
      UserError: by every attribute but `sequence_length`: see `text_data`.

    Attributes:
      sequence_length: as given.
    """

    def __init__(
        self,
        sequence_length: int,
        open_content: Callable[[], _Content],
        expect: Callable[[], ExpectedText | None] = lambda: None,
    ):
        self.sequence_length = sequence_length
        self._open_content, self._expect = open_content, expect

    @functools.cached_property
    def _content(self) -> _Content:
        return self._open_content()

    def expected(self) -> ExpectedText | None:
        """What is known of data that are not prepared yet; None where they are, or nothing is known."""
        return None if "_content" in vars(self) else self._expect()

    @property
    def train(self) -> Rows:
        """The rows to train on."""
        return self._content.train

    @property
    def held_out(self) -> Mapping[str, Rows]:
        """The rows of the held-out documents, in sets by name; the first one is "validation"."""
        return self._content.held_out

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all."""
        return self._content.tokenizer

    @property
    def documents(self) -> int:
        """How many documents there are in all."""
        return self._content.documents

    @property
    def tokens(self) -> int:
        """How many tokens are in all documents, each document's end of text included."""
        return self._content.tokens

    @property
    def fingerprint(self) -> str:
        """Changes whenever the rows do; equal on every machine that prepares the same corpus."""
        return self._content.fingerprint

    @property
    def validation(self) -> Rows:
        """The held-out set that decides what is best."""
        return self.held_out[VALIDATION]

    @property
    def vocab_size(self) -> int:
        """The tokenizer's exact count."""
        return self.tokenizer.vocab_size

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
    """Documents, tokenized and packed when they are first asked for; what was prepared earlier is opened.

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
      UserError: for a value out of its range, or a corpus or tokenizer that isn't there; and when the data are first
        asked for, for an unreadable corpus, one too small for a row of each split, or a disk that is full or can't be
        written.

    Example:
      >>> import tempfile
      >>> poem = Documents("a poem", "poem 1", lambda: (f"line {i} of a poem".encode() for i in range(200)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     data = text_data(poem, sequence_length=64, cache_directory=folder)
      ...     print(data)
      200 documents, 3,690 tokens of 257 kinds, in rows of 64: 63 to train on (13.57% padding), 4 held out
      >>> data.tokenizer.decode(data.train[0]["tokens"][:20])
      'line 100 of a poem'
    """
    documents = documents or stdlib_text(cache_directory=cache_directory)
    corpus = _Corpus(documents, tokenizer, sequence_length, validation_fraction, cache_root(cache_directory))

    def open_content() -> _Content:
        prepared_corpus = corpus.prepare()
        pairs = prepared_corpus.summary.pairs
        for split in (split for split in (TRAIN, VALIDATION) if split not in (documents.held_out or {})):
            if pairs[split] < sequence_length:
                raise UserError(
                    f"the corpus {documents.source} is too small: its {split} split has {pairs[split]} tokens, fewer "
                    f"than one row of text_data.sequence_length = {sequence_length}; add text, lower the sequence "
                    f"length, or change text_data.validation_fraction = {validation_fraction}"
                )
        return prepared_corpus.content()

    return TextData(sequence_length, open_content, corpus.expected)


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
    ...     rows = data.held_out["poem"]
    >>> len(data.train), len(rows), round(rows.bytes_per_token, 3)  # 330 / 350
    (0, 7, 0.943)
    """
    nothing = Documents("held-out sets", "", lambda: iter(()), 0, sets)
    corpus = _Corpus(nothing, tokenizer, sequence_length, 0.0, cache_root(cache_directory))
    return TextData(sequence_length, lambda: corpus.prepare().content(sets))


@dataclass(frozen=True)
class _Prepared:
    """A corpus on disk: the folders of its tokens and of its rows, and what `tokenize` says of it."""

    tokens: Path
    rows: Path
    sequence_length: int
    of_bytes: bool
    summary: Summary

    def content(self, held_out: Iterable[str] | None = None) -> _Content:
        """The corpus, opened, with these held-out sets; None: all of them."""
        pairs = self.summary.pairs
        return _Content(
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


class _Corpus:
    """What `text_data` was asked for.

    Raises:
      UserError: for names of held-out sets, or a tokenizer, that can't be.
    """

    def __init__(
        self, documents: Documents, tokenizer: str, sequence_length: int, validation_fraction: float, root: Path
    ):
        self._sets = documents.held_out or {}
        for name in self._sets:
            if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII) or name == TRAIN:
                raise UserError(
                    f"a held-out set can't be called {name!r}: use letters, digits, _ and -, and not 'train'"
                )
        self._documents, self._spec = documents, parse_tokenizer(tokenizer)
        self._sequence_length, self._validation_fraction = sequence_length, validation_fraction
        identities = {name: of.identity for name, of in self._sets.items()}
        key = digest([FORMAT, FILES, documents.identity, self._spec.identity, validation_fraction, identities])
        self._tokens, self._rows = root / "tokens" / key, root / "rows" / f"{key}-{sequence_length}"

    def expected(self) -> ExpectedText | None:
        """What is known before rows are packed; None where they seem to be, and only need opening."""
        if self._rows.is_dir():
            return None
        vocab_size = self._spec.vocab_size
        with contextlib.suppress(UserError, ValueError):  # not there, or damaged
            vocab_size = int(schemas.read(self._tokens / "summary.json", Summary).digest.partition(" ")[0])
        return ExpectedText(vocab_size, self._sequence_length, dict.fromkeys([VALIDATION, *self._sets]))

    def prepare(self) -> _Prepared:
        """Tokenizes and packs what isn't there yet."""
        corpus = prepared(
            self._tokens,
            lambda folder: tokenize(self._documents, self._spec.make, self._validation_fraction, folder),
            by_block="*_tokens.npy",
        )
        summary = schemas.read(corpus / "summary.json", Summary)
        for name, of in self._sets.items():
            if not summary.pairs[name]:
                raise UserError(f"the held-out set {name} ({of.source}) is empty: it has no document with any text")

        def pack_splits(folder: Path) -> None:
            for split in summary.pairs:
                offsets = _load_array(corpus / f"{split}_offsets.npy")
                for name, array in pack(offsets, self._sequence_length)._asdict().items():
                    np.save(folder / f"{split}_{name}.npy", array)

        rows = prepared(self._rows, pack_splits, made_of=summary.digest)
        return _Prepared(corpus, rows, self._sequence_length, self._spec.identity == "bytes", summary)


def _load_array(path: Path) -> np.memmap:
    """Memory-maps a prepared array."""
    return np.load(path, mmap_mode="r")
