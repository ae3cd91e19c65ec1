"""Tokenizers: bytes, and subwords through the `tokenizers` library."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import ArrayLike
from tokenizers import decoders, models, pre_tokenizers, trainers

from crescendo.experiments.data.tokenizer_file import MOST_FILE_BYTES, read_tokenizer
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import read_file
from crescendo.experiments.runtime.text import in_short

END_OF_TEXT = "<|endoftext|>"
KNOWN_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
FILE_FORMAT = 2  # of what is made of a tokenizer.json: part of its identity, to be raised when that changes
SMALLEST_BPE = 257  # every byte, and the end of text
PIECE_BYTES = 256 << 10  # a longer document is tokenized in pieces of about this size
MOST_PIECE_BYTES = 16 << 20  # the library takes 170 to 330 bytes of memory for one of text
_END_OF_WORD = re.compile(r"\w(?=[ \n])")


class Tokenizer(Protocol):
    """Text to token numbers in [0, vocab_size) and back: a function, with nothing random in it.

    No text, whatever it says, encodes to `end_of_text`.
    """

    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens] of one text."""

    def encode_batch(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, lengths) of UTF-8 documents: integers [sum of lengths], all in a row, and int64 [documents]."""

    def pieces(self, document: bytes) -> Iterator[bytes]:
        """A long document in parts of about `PIECE_BYTES`, whose tokens in a row are those of the whole."""

    def decode(self, tokens: ArrayLike) -> str:
        """The text of tokens, end-of-text tokens left out; a character cut at the edge becomes U+FFFD."""

    def to_json(self) -> str:
        """The same tokenizer as the content of a tokenizer.json file, which `SubwordTokenizer.load` reads."""


class ByteTokenizer:
    """A token for each byte, and 256 for the end of text.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né").tolist()
    [110, 195, 169]
    >>> tokenizer.decode([256, 110, 195, 169, 256])
    'né'
    """

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        return np.frombuffer(b"".join(documents), np.uint8), lengths

    def pieces(self, document: bytes) -> Iterator[bytes]:
        return (document[begin : begin + PIECE_BYTES] for begin in range(0, len(document), PIECE_BYTES))

    def decode(self, tokens: ArrayLike) -> str:
        tokens = np.asarray(tokens)
        return tokens[tokens < self.end_of_text].astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> str:
        vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
        model = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = decoders.ByteLevel()
        model.add_special_tokens([END_OF_TEXT])
        return model.to_str()


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it can be seen (GPT-2's)."""
    seen = [chr(byte) if chr(byte) in set(pre_tokenizers.ByteLevel.alphabet()) else None for byte in range(256)]
    hidden = iter(range(256, 512))
    return [chr(next(hidden)) if character is None else character for character in seen]


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, such as `train_bpe` makes.

    What makes it no function of the text alone is switched off: truncation, padding, dropout. Where a text spells the
    end-of-text token, as HTML may spell "</s>", and the library would take it for that, it becomes the tokens of the
    characters.

    Args:
      model: the library's tokenizer; it must know one of the tokens in KNOWN_END_OF_TEXT.

    Raises:
      UserError: if it knows none of them.
    """

    def __init__(self, model: tokenizers.Tokenizer):
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # "<|endoftext|>" inside a document is plain text, not a document's end
        if getattr(model.model, "dropout", None):
            model.model.dropout = None
        vocabulary = model.get_vocab()
        known = [token for token in KNOWN_END_OF_TEXT if token in vocabulary]
        if not known:
            raise UserError(f"the tokenizer has no end-of-text token: add one of {', '.join(KNOWN_END_OF_TEXT)}")
        self._model = model
        self.end_of_text = vocabulary[known[0]]
        self.vocab_size = max(vocabulary.values()) + 1  # token numbers may have gaps
        self._spelled = self._characters(known[0])
        splits = model.pre_tokenizer
        self._cut_at_words = (
            isinstance(splits, pre_tokenizers.ByteLevel)
            and (splits.use_regex, splits.add_prefix_space, model.normalizer) == (True, False, None)
            and all(token.special for token in model.get_added_tokens_decoder().values())
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SubwordTokenizer":
        """Reads a tokenizer.json file.

        Raises:
          UserError: if the file does not exist, is no tokenizer, or has no end-of-text token.
        """
        model = read_tokenizer(read_file(Path(path), limit_bytes=MOST_FILE_BYTES), str(path))
        try:
            return cls(model)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def encode(self, text: str) -> np.ndarray:
        with _encoding("a text"):
            ids = self._model.encode(text, add_special_tokens=False).ids
        return self._without_end(ids).astype(np.int32)

    def encode_batch(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        texts = [document.decode() for document in documents]
        with _encoding("a document"):
            encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
        encoded = [self._without_end(e.ids) for e in encodings]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.concatenate([np.empty(0, np.uint32), *encoded]), lengths

    def pieces(self, document: bytes) -> Iterator[bytes]:
        """See `Tokenizer`; where cutting could change the tokens, as in text without words, a part is longer.

        Raises:
          UserError: for a part of more than `MOST_PIECE_BYTES`.
        """
        for piece in _cut_at_words(document) if self._cut_at_words else [document]:
            _refuse_longer(piece, document)
            yield piece

    def decode(self, tokens: ArrayLike) -> str:
        tokens = np.asarray(tokens)  # not all files call their end-of-text token special
        return self._model.decode(tokens[tokens != self.end_of_text].tolist(), skip_special_tokens=True)

    def to_json(self) -> str:
        return self._model.to_str()

    def spelling(self, token: int) -> str:
        """What the vocabulary calls a token, special ones too."""
        return self._model.id_to_token(token) or ""

    def _characters(self, spelling: str) -> list[int]:
        """The tokens of a spelling's characters, one by one; empty where the vocabulary has none for one of them."""
        try:
            characters = [[token.id for token in self._model.model.tokenize(character)] for character in spelling]
        except Exception:  # the library's own word for a character that it doesn't know
            return []
        return [token for tokens in characters for token in tokens] if all(characters) else []

    def _without_end(self, ids: list[int]) -> np.ndarray:
        """uint32 [tokens] of a text, in which what was taken for an end of text is spelled out.

        Raises:
          UserError: if the vocabulary has no tokens for that.
        """
        tokens = np.array(ids, np.uint32)
        places = np.flatnonzero(tokens == self.end_of_text)
        if not len(places):
            return tokens
        spelling = self.spelling(self.end_of_text)
        if not self._spelled:
            raise UserError(
                f"the tokenizer takes the text {spelling!r} for a document's end, and has no other tokens for it: "
                "remove that from the documents, or use another tokenizer"
            )
        parts = np.split(tokens, places)
        spelled = np.array(self._spelled, np.uint32)
        return np.concatenate([parts[0], *(part for rest in parts[1:] for part in (spelled, rest[1:]))])


def _cut_at_words(document: bytes) -> Iterator[bytes]:
    """Parts of about `PIECE_BYTES`, cut between a word and a space or a line's end.

    GPT-2's expression has no match across such a place, and looks only ahead, so the tokens are those of the whole.
    """
    text, begin = document.decode(), 0
    while begin < len(text):
        word = _END_OF_WORD.search(text, begin + PIECE_BYTES)
        end = word.end() if word else len(text)
        yield text[begin:end].encode()
        begin = end


def _refuse_longer(piece: bytes, document: bytes) -> None:
    if len(piece) > MOST_PIECE_BYTES:
        begin = document[:40].decode(errors="ignore")
        raise UserError(
            f"a document of {len(document):,} bytes, which begins with {begin!r}, has {len(piece):,} that a tokenizer "
            f"takes only at once, above the {MOST_PIECE_BYTES:,} that it may: split the document, or use "
            'text_data.tokenizer = "bytes"'
        )


@contextlib.contextmanager
def _encoding(what: str) -> Iterator[None]:
    """Around calls of the library, which raises `Exception` itself."""
    try:
        yield
    except Exception as error:
        raise UserError(f"the tokenizer can't encode {what} ({in_short(error)})") from error


def train_bpe(documents: Iterable[bytes], vocab_size: int) -> SubwordTokenizer:
    """Trains a byte-level byte-pair encoding.

    Args:
      documents: UTF-8 texts.
      vocab_size: the most tokens to make, all 256 bytes and the end of text among them; a small corpus yields fewer.

    Returns:
      The tokenizer; its `vocab_size` is the count reached.

    Example:
      >>> tokenizer = train_bpe([b"low lower lowest"] * 9, vocab_size=260)
      >>> len(tokenizer.encode("low low")), tokenizer.vocab_size
      (2, 260)

    References:
      Sennrich, Haddow and Birch, "Neural machine translation of rare words with subword units", 2016; Radford et al.,
      "Language models are unsupervised multitask learners", 2019 (on bytes).
    """
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for document in documents:
            for piece in [document] if len(document) <= PIECE_BYTES else _cut_at_words(document):
                _refuse_longer(piece, document)
                yield piece.decode()

    model.train_from_iterator(texts(), trainer)
    return SubwordTokenizer(model)


@dataclass(frozen=True)
class TokenizerSpec:
    """A choice of tokenizer.

    Attributes:
      identity: names it.
      make: gives the tokenizer from the training documents.
      vocab_size: the tokenizer's; of one that is trained the most that it may reach.
      trained: whether the documents matter.
    """

    identity: str
    make: Callable[[Iterable[bytes]], Tokenizer]
    vocab_size: int
    trained: bool = False


def parse_tokenizer(spec: str) -> TokenizerSpec:
    """Reads "bytes", "bpe:VOCAB_SIZE" (trained on the training documents) or the path of a tokenizer.json file.

    Raises:
      UserError: if spec is none of these, VOCAB_SIZE is below 257, or the file is not there or unfit.

    >>> parse_tokenizer("bpe:300").make([b"to be or not to be"]).vocab_size
    266
    """
    if spec == "bytes":
        return TokenizerSpec(spec, lambda documents: ByteTokenizer(), ByteTokenizer.vocab_size)
    kind, _, size = spec.partition(":")
    if kind == "bpe":
        if not size.isdecimal() or int(size) < SMALLEST_BPE:
            raise UserError(
                f'text_data.tokenizer = "{spec}": the vocabulary size must be a whole number of at least '
                f'{SMALLEST_BPE} (256 bytes and the end of text), as in "bpe:16384"'
            )
        return TokenizerSpec(spec, lambda documents: train_bpe(documents, int(size)), int(size), True)
    if not Path(spec).is_file():
        raise UserError(
            f'text_data.tokenizer = "{spec}" is neither "bytes", nor "bpe:VOCAB_SIZE", nor a tokenizer.json file'
        )
    tokenizer = SubwordTokenizer.load(spec)
    digest = hashlib.blake2b(read_file(Path(spec)), digest_size=16).hexdigest()
    return TokenizerSpec(f"json:{FILE_FORMAT}:{digest}", lambda documents: tokenizer, tokenizer.vocab_size)
