"""A corpus on disk: tokenized once, packed, memory-mapped; what it was asked for decides where it lies."""

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from crescendo.experiments.data.corpus import TRAIN, VALIDATION, Summary, tokenize
from crescendo.experiments.data.decomposed import Decomposition
from crescendo.experiments.data.decomposed_rows import DecomposedRows, decompose
from crescendo.experiments.data.documents import Documents, digest
from crescendo.experiments.data.manifest import Blocks
from crescendo.experiments.data.mixed_rows import MixedRows
from crescendo.experiments.data.packing import Packing, pack
from crescendo.experiments.data.preparation import prepared
from crescendo.experiments.data.rows import Rows
from crescendo.experiments.data.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer, TokenizerSpec
from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError

FORMAT = 1  # of the rows: part of every identity, to be raised when they change
FILES = 2  # of what is kept on disk, likewise of the folders' names alone


@dataclass(frozen=True)
class Content:
    """Prepared data, opened: see `TextData`, whose attributes these are."""

    train: Rows | MixedRows
    held_out: Mapping[str, Rows]
    tokenizer: Tokenizer
    documents: int
    tokens: int
    fingerprint: str
    validation_weights: Mapping[str, float] = MappingProxyType({})

    @property
    def rows(self) -> Rows:
        """The rows to train on, of what isn't a mixture."""
        assert isinstance(self.train, Rows)
        return self.train


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
    crescendo.experiments.data.prepared_text.NotPreparedError: the data are not prepared yet
    """

    fingerprint = "expected"

    def __init__(self, vocab_size: int, sequence_length: int, held_out: Iterable[str]):
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.train = _NoRows()
        self.held_out = {name: _NoRows() for name in held_out}

    def fits(self, data: Any) -> bool:
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


@dataclass(frozen=True)
class Prepared:
    """A corpus on disk: the folders of its tokens and of its rows, and what `tokenize` says of it.

    Attributes:
      decomposed: where training rows are pieces of one length each, their folder, and how they were cut.
    """

    tokens: Path
    rows: Path
    sequence_length: int
    of_bytes: bool
    summary: Summary
    decomposed: tuple[Path, Decomposition] | None = None

    def content(self, held_out: Iterable[str] | None = None) -> Content:
        """The corpus, opened, with these held-out sets; None: all of them."""
        pairs = self.summary.pairs
        return Content(
            train=self._open(TRAIN),
            held_out={split: self._open(split) for split in held_out or [each for each in pairs if each != TRAIN]},
            tokenizer=ByteTokenizer() if self.of_bytes else SubwordTokenizer.load(self.tokens / "tokenizer.json"),
            documents=self.summary.documents,
            tokens=sum(pairs.values()),
            fingerprint=digest([FORMAT, self.summary.digest, self.sequence_length, *self._order]),
        )

    @property
    def _order(self) -> list[Any]:
        """What fixes the training rows beside the tokens."""
        return [] if self.decomposed is None else [self.decomposed[1].identity]

    def _open(self, split: str) -> Rows:
        decomposed = self.decomposed if split == TRAIN else None
        folder = self.rows if decomposed is None else decomposed[0]
        packing = Packing(*(_load_array(folder / f"{split}_{name}.npy") for name in Packing._fields))
        name, pairs = f"{split}_tokens.npy", self.summary.pairs[split]
        tokens = _load_array(self.tokens / name)
        bytes_per_token = self.summary.bytes[split] / pairs if pairs else None
        blocks = Blocks(self.tokens, name, tokens)
        if decomposed is not None:
            return DecomposedRows(tokens, packing, self.sequence_length, decomposed[1], before_reading=blocks.check)
        return Rows(tokens, packing, self.sequence_length, bytes_per_token, before_reading=blocks.check)


class Corpus:
    """One corpus, as `text_data` was asked for it.

    Args:
      documents: to read.
      tokenizer: to apply.
      sequence_length: tokens in a row.
      validation_fraction: the part of the documents to hold out.
      root: the folder for prepared data.
      decomposition: of the training documents; None: they are packed like the others.

    Raises:
      UserError: for names of held-out sets that can't be, and rows whose length the decomposition doesn't serve.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: TokenizerSpec,
        sequence_length: int,
        validation_fraction: float,
        root: Path,
        decomposition: Decomposition | None = None,
    ):
        self._sets = documents.held_out or {}
        for name in self._sets:
            if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII) or name == TRAIN:
                raise UserError(
                    f"a held-out set can't be called {name!r}: use letters, digits, _ and -, and not 'train'"
                )
        self._documents, self._spec = documents, tokenizer
        self._sequence_length, self._validation_fraction = sequence_length, validation_fraction
        identities = {name: of.identity for name, of in self._sets.items()}
        key = digest([FORMAT, FILES, documents.identity, self._spec.identity, validation_fraction, identities])
        self._tokens, self._rows = root / "tokens" / key, root / "rows" / f"{key}-{sequence_length}"
        self._decomposition = decomposition
        self._lengths = [] if decomposition is None else decomposition.lengths(sequence_length)

    def expected(self) -> ExpectedText | None:
        """What is known before rows are packed; None where they seem to be, and only need opening."""
        if self._rows.is_dir():
            return None
        vocab_size = self._spec.vocab_size
        with contextlib.suppress(UserError, ValueError):  # not there, or damaged
            vocab_size = int(schemas.read(self._tokens / "summary.json", Summary).digest.partition(" ")[0])
        return ExpectedText(vocab_size, self._sequence_length, self.held_out)

    @property
    def held_out(self) -> list[str]:
        """The names of the held-out sets; the first one is "validation"."""
        return list(dict.fromkeys([VALIDATION, *self._sets]))

    def open(self) -> Content:
        """The corpus, prepared and opened.

        Raises:
          UserError: for one that is too small for a row of each split; see `prepare`.
        """
        prepared_corpus = self.prepare()
        pairs = prepared_corpus.summary.pairs
        for split in (split for split in (TRAIN, VALIDATION) if split not in self._sets):
            if pairs[split] < self._sequence_length:
                raise UserError(
                    f"the corpus {self._documents.source} is too small: its {split} split has {pairs[split]} tokens, "
                    f"fewer than one row of text_data.sequence_length = {self._sequence_length}; add text, lower the "
                    f"sequence length, or change text_data.validation_fraction = {self._validation_fraction}"
                )
        return prepared_corpus.content()

    def prepare(self) -> Prepared:
        """Tokenizes and packs what isn't there yet.

        Raises:
          UserError: for a corpus that can't be read or has no text, and a disk that is full or can't be written.
        """
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
                _save(folder, split, pack(_load_array(corpus / f"{split}_offsets.npy"), self._sequence_length))

        def decompose_training(folder: Path) -> None:
            _save(folder, TRAIN, decompose(_load_array(corpus / f"{TRAIN}_offsets.npy"), self._lengths))

        rows = prepared(self._rows, pack_splits, made_of=summary.digest)
        decomposed = None
        if self._decomposition is not None:
            folder = self._rows.with_name(f"{self._rows.name}-from-{self._decomposition.shortest}")
            decomposed = prepared(folder, decompose_training, made_of=summary.digest), self._decomposition
        of_bytes = self._spec.identity == "bytes"
        return Prepared(corpus, rows, self._sequence_length, of_bytes, summary, decomposed)


def _save(folder: Path, split: str, packing: Packing) -> None:
    for name, array in packing._asdict().items():
        np.save(folder / f"{split}_{name}.npy", array)


def _load_array(path: Path) -> np.memmap:
    """Memory-maps a prepared array."""
    return np.load(path, mmap_mode="r")
