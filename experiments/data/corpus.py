"""Tokenizes documents into flat arrays on disk, training and held-out documents apart."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.preparation import progress
from crescendo.experiments.data.tokenizer import PIECE_BYTES, SubwordTokenizer, Tokenizer
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.schemas import Schema

TRAIN, VALIDATION = "train", "validation"
BATCH_BYTES, BATCH_DOCUMENTS = 4 << 20, 1 << 16  # documents are tokenized in batches of at most about these


class Summary(Schema):
    """What `tokenize` says of its folder, in `summary.json`.

    Attributes:
      source: the corpus, for people.
      documents: how many have a text.
      pairs: (token, label) pairs, by split.
      bytes: of the documents, by split.
      digest: of the vocabulary's size and all tokens.
    """

    source: str
    documents: int
    pairs: dict[str, int]
    bytes: dict[str, int]
    digest: str


def held_out(document: bytes, validation_fraction: float) -> bool:
    """Whether a document is for validation: its hash, as a number in [0, 1), is below `validation_fraction`.

    It depends on nothing but the document, so it never changes when others come or go.

    >>> held_out(b"to be", 0.0), held_out(b"to be", 1.0)
    (False, True)
    """
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest()) < validation_fraction * 2**64


def tokenize(
    documents: Documents,
    make_tokenizer: Callable[[Iterable[bytes]], Tokenizer],
    validation_fraction: float,
    folder: Path,
) -> None:
    """Fills `folder` with the tokens of all documents that are not empty, those of each split apart.

    The splits are "train", "validation" and the corpus's own held-out sets. Where "validation" is one of these, nothing
    else is held out; else the documents whose hash says so are. Written are, for each split, `SPLIT_tokens.npy`, uint16
    or uint32 [tokens], the documents one after the other with an end-of-text token before, between and after them, and
    `SPLIT_offsets.npy`, int64 [documents + 1], where the end-of-text tokens lie; `tokenizer.json` unless tokens are
    bytes; and `summary.json`.

    Args:
      documents: the corpus; read twice if the tokenizer is to be trained.
      make_tokenizer: gives the tokenizer from the training documents.
      validation_fraction: the part of the documents to hold out.
      folder: an existing folder.

    Raises:
      UserError: if there is no document with any text.
    """
    held_out_sets = documents.held_out or {}
    fraction = _fraction(documents, validation_fraction)
    tokenizer = make_tokenizer(training_documents(documents, validation_fraction))
    if isinstance(tokenizer, SubwordTokenizer):
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")

    with ExitStack() as stack:
        splits = {
            split: stack.enter_context(_TokenWriter(folder, split, tokenizer))
            for split in dict.fromkeys([TRAIN, VALIDATION, *held_out_sets])
        }
        for batch in _batches(_read(documents, "tokenizing"), len):
            is_held_out = [held_out(document, fraction) for document in batch]
            splits[TRAIN].write([document for document, held in zip(batch, is_held_out, strict=True) if not held])
            splits[VALIDATION].write([document for document, held in zip(batch, is_held_out, strict=True) if held])
        for split, of in held_out_sets.items():
            for batch in _batches(_read(of, "tokenizing"), len):
                splits[split].write(batch)
    if not any(writer.documents for writer in splits.values()):
        raise UserError(f"the corpus {documents.source} is empty: it has no document with any text")
    summary = Summary(
        source=documents.source.encode(errors="replace").decode(),  # a path may have bytes that are no text
        documents=sum(writer.documents for writer in splits.values()),
        pairs={split: writer.pairs for split, writer in splits.items()},
        bytes={split: writer.bytes for split, writer in splits.items()},
        digest=" ".join([str(tokenizer.vocab_size), *(writer.digest for writer in splits.values())]),
    )
    (folder / "summary.json").write_text(summary.model_dump_json(indent=2), encoding="utf-8")


def training_documents(documents: Documents, validation_fraction: float) -> Iterator[bytes]:
    """Those that a tokenizer may be trained on: that aren't empty, and aren't held out."""
    fraction = _fraction(documents, validation_fraction)
    for document in _read(documents, "training a tokenizer on"):
        if not held_out(document, fraction):
            yield document


def _fraction(documents: Documents, validation_fraction: float) -> float:
    """The part of the documents that is held out: none where the corpus brings a set for that."""
    return 0.0 if VALIDATION in (documents.held_out or {}) else validation_fraction


def _read(documents: Documents, purpose: str) -> Iterator[bytes]:
    """The documents that aren't empty, under a progress bar."""
    with progress(f"{purpose} {documents.source}", documents.total_bytes) as advance:
        for document in documents.read():
            advance(len(document))
            if document:
                yield document


def _batches[T](items: Iterable[T], size_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_bytes(item)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _TokenWriter:
    """Appends the tokens of one split to an .npy file, and where its documents begin to another.

    Attributes:
      documents: how many so far.
      pairs: (token, label) pairs so far: the tokens and one end of text for each document.
      bytes: of the documents so far.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self._tokens = _ArrayFile(folder / f"{split}_tokens.npy", self._dtype)
        self._offsets = _ArrayFile(folder / f"{split}_offsets.npy", np.dtype(np.int64))
        self._hash = hashlib.blake2b(digest_size=16)
        self.documents = self.pairs = self.bytes = 0

    def __enter__(self) -> "_TokenWriter":
        self._append(np.array([self._tokenizer.end_of_text]))
        self._offsets.append(np.array([0]))
        return self

    def __exit__(self, *exception: object) -> None:
        self._tokens.close()
        self._offsets.close()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, documents: list[bytes]) -> None:
        """Writes whole documents; a long one in pieces, since tokens take more memory than their text."""
        begun = 0  # tokens of a document whose end is in a later batch
        pieces = ((piece, last) for document in documents for piece, last in _with_last(self._pieces(document)))
        for batch in _batches(pieces, lambda piece: len(piece[0])):
            tokens, lengths = self._tokenizer.encode_batch([piece for piece, _ in batch])
            ends = np.cumsum(lengths)[np.array([last for _, last in batch], bool)]
            self._append(np.insert(tokens.astype(self._dtype), ends, self._tokenizer.end_of_text))
            counts = np.diff(ends, prepend=-begun) + 1
            begun = len(tokens) - int(ends[-1]) if len(ends) else begun + len(tokens)
            self._offsets.append(self.pairs + np.cumsum(counts))
            self.pairs += int(counts.sum())
            self.documents += len(counts)
        self.bytes += sum(map(len, documents))

    def _pieces(self, document: bytes) -> Iterable[bytes]:
        return [document] if len(document) <= PIECE_BYTES else self._tokenizer.pieces(document)

    def _append(self, tokens: np.ndarray) -> None:
        self._hash.update(self._tokens.append(tokens))


def _with_last(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each with whether it is the last one."""
    before: bytes | None = None
    for piece in pieces:
        if before is not None:
            yield before, False
        before = piece
    if before is not None:
        yield before, True


class _ArrayFile:
    """An .npy file of one dimension that grows; its length is set in its header at the end."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._dtype, self._count = dtype, 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._write_header()

    def append(self, array: np.ndarray) -> bytes:
        """Writes the entries and returns what was written."""
        content = array.astype(self._dtype).tobytes()
        self._file.write(content)
        self._count += len(array)
        return content

    def close(self) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()

    def _write_header(self) -> None:
        """Always as long: NumPy leaves room for the array's length to grow."""
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, header)
