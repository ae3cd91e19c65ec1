"""Tokenizes documents into flat arrays on disk, training and held-out documents apart."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.preparation import progress
from crescendo.experiments.data.tokenizer import SubwordTokenizer, Tokenizer
from crescendo.experiments.runtime.errors import UserError

TRAIN, VALIDATION = "train", "validation"
BATCH_BYTES = 4 << 20  # documents are tokenized in batches of about this size


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
    fraction = 0.0 if VALIDATION in held_out_sets else validation_fraction

    def read(purpose: str, of: Documents = documents) -> Iterator[bytes]:
        with progress(f"{purpose} {of.source}", of.total_bytes) as advance:
            for document in of.read():
                advance(len(document))
                if document:
                    yield document

    tokenizer = make_tokenizer(
        document for document in read("training a tokenizer on") if not held_out(document, fraction)
    )
    if isinstance(tokenizer, SubwordTokenizer):
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")

    with ExitStack() as stack:
        splits = {
            split: stack.enter_context(_TokenWriter(folder, split, tokenizer))
            for split in dict.fromkeys([TRAIN, VALIDATION, *held_out_sets])
        }
        for batch in _batches(read("tokenizing")):
            is_held_out = [held_out(document, fraction) for document in batch]
            splits[TRAIN].write([document for document, held in zip(batch, is_held_out, strict=True) if not held])
            splits[VALIDATION].write([document for document, held in zip(batch, is_held_out, strict=True) if held])
        for split, of in held_out_sets.items():
            for batch in _batches(read("tokenizing", of)):
                splits[split].write(batch)
    if not any(writer.documents for writer in splits.values()):
        raise UserError(f"the corpus {documents.source} is empty: it has no document with any text")
    summary = {
        "source": documents.source,
        "documents": sum(writer.documents for writer in splits.values()),
        "pairs": {split: writer.pairs for split, writer in splits.items()},
        "bytes": {split: writer.bytes for split, writer in splits.items()},
        "digest": " ".join([str(tokenizer.vocab_size), *(writer.digest for writer in splits.values())]),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


class _TokenWriter:
    """Appends the tokens of one split to an .npy file, whose length is set in its header at the end.

    Attributes:
      bytes: of the documents so far.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        self._folder, self._split, self._tokenizer = folder, split, tokenizer
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self._hash = hashlib.blake2b(digest_size=16)
        self._pair_counts: list[np.ndarray] = []
        self.bytes = 0

    def __enter__(self) -> "_TokenWriter":
        self._file = open(self._folder / f"{self._split}_tokens.npy", "wb")
        self._write_header()
        self._append(np.array([self._tokenizer.end_of_text]))
        return self

    def __exit__(self, *exception: object) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()
        np.save(self._folder / f"{self._split}_offsets.npy", np.cumsum(np.concatenate([[0], *self._pair_counts])))

    @property
    def documents(self) -> int:
        return sum(map(len, self._pair_counts))

    @property
    def pairs(self) -> int:
        """(token, label) pairs: the tokens and one end of text for each document."""
        return sum(int(counts.sum()) for counts in self._pair_counts)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, documents: list[bytes]) -> None:
        tokens, lengths = self._tokenizer.encode_batch(documents)
        self._append(np.insert(tokens.astype(self._dtype), np.cumsum(lengths), self._tokenizer.end_of_text))
        self._pair_counts.append(lengths + 1)
        self.bytes += sum(map(len, documents))

    def _append(self, tokens: np.ndarray) -> None:
        content = tokens.astype(self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)

    def _write_header(self) -> None:
        """Always as long: NumPy leaves room for the array's length to grow."""
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.pairs + 1,)}
        np.lib.format.write_array_header_1_0(self._file, header)
