"""Text as packed rows: tokenized once, packed, memory-mapped.

documents -> held-out split by document hash -> tokens on disk -> packed rows -> a shuffled endless stream.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Annotated

from annotated_types import Gt, Lt

from crescendo.experiments.data.corpus import VALIDATION
from crescendo.experiments.data.decomposed import Decomposition
from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.mixed_rows import MixedRows
from crescendo.experiments.data.mixed_text import MixedCorpus
from crescendo.experiments.data.preparation import cache_root
from crescendo.experiments.data.prepared_text import Content, Corpus, ExpectedText
from crescendo.experiments.data.rows import Rows
from crescendo.experiments.data.stdlib_text import stdlib_text
from crescendo.experiments.data.text_mixture import Mixture
from crescendo.experiments.data.tokenizer import Tokenizer, parse_tokenizer
from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.runtime.errors import UserError
from crescendo.ranges import Count


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
        open_content: Callable[[], Content],
        expect: Callable[[], ExpectedText | None] = lambda: None,
    ):
        self.sequence_length = sequence_length
        self._open_content, self._expect = open_content, expect

    @functools.cached_property
    def _content(self) -> Content:
        return self._open_content()

    def expected(self) -> ExpectedText | None:
        """What is known of data that are not prepared yet; None where they are, or nothing is known."""
        return None if "_content" in vars(self) else self._expect()

    @property
    def train(self) -> Rows | MixedRows:
        """The rows to train on."""
        return self._content.train

    @property
    def held_out(self) -> Mapping[str, Rows]:
        """The rows of the held-out documents, in sets by name: the first one "validation", or one of each source."""
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
        """The held-out set that decides what is best; of a mixture it is no set, but the mean over some."""
        return self.held_out[VALIDATION]

    @property
    def vocab_size(self) -> int:
        """The tokenizer's exact count."""
        return self.tokenizer.vocab_size

    @property
    def padding_share(self) -> float:
        """The part of the training rows that is padding, in [0, 1)."""
        return self.train.padding_share

    @property
    def validation_weights(self) -> Mapping[str, float]:
        """The shares of the held-out sets in the mean that stands for "validation"; of none where that is a set."""
        return self._content.validation_weights

    def __str__(self) -> str:
        if isinstance(self.train, MixedRows):
            sets = ", ".join(f"{len(rows):,} of {name}" for name, rows in self.held_out.items())
            to_train = ", ".join(f"{len(rows):,} of {name}" for name, rows in self.train.parts.items())
            return (
                f"{self.documents:,} documents, {self.tokens:,} tokens of {self.vocab_size:,} kinds, in rows of "
                f"{self.sequence_length:,}: to train on {to_train} ({self.padding_share:.2%} padding); held out {sets}"
            )
        sets = ", ".join(
            f"{len(rows):,} {'held out' if name == VALIDATION else name}" for name, rows in self.held_out.items()
        )
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens of {self.vocab_size:,} kinds, in rows of "
            f"{self.sequence_length:,}: {len(self.train):,} to train on ({self.train.filling}), {sets}"
        )


@checked
def text_data(
    documents: Documents | Mixture | None = None,
    *,
    tokenizer: str = "bytes",
    sequence_length: Count = 128,
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05,
    packing: Decomposition | None = None,
    cache_directory: str | os.PathLike | None = None,
) -> TextData:
    """Documents, tokenized and packed when they are first asked for; what was prepared earlier is opened.

    Each document becomes its tokens between two end-of-text tokens; every token but the first is a label exactly once.
    A document is held out if a hash of its content, as a number in [0, 1), is below `validation_fraction`, so adding
    documents never moves one from one split to the other. A corpus may bring held-out sets of its own
    (`Documents.held_out`); where one of them is called "validation", all documents are trained on. Of a mixture each
    source is prepared by itself: its held-out documents are those that it would have alone, in a set of the source's
    name (other sets that it brings are called SOURCE-SET).

    Args:
      documents: from `text_files`, `tfds_text`, `stdlib_text`, or several of them as a `text_mixture`; None for
        `stdlib_text`.
      tokenizer: "bytes"; "bpe:VOCAB_SIZE", a byte-level BPE trained on the training documents (of a mixture on those of
        all sources, each once, whatever the weights are); or the path of a tokenizer.json file.
      sequence_length: tokens in a row, at least 1.
      validation_fraction: the part of the documents to hold out, between 0 and 1.
      packing: of the training rows: `@decomposed()` fills each with pieces of one length and draws short ones first;
        None packs whole documents as well as they fit, as held-out ones always are.
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
    root, spec = cache_root(cache_directory), parse_tokenizer(tokenizer)
    if packing is not None and isinstance(documents, Mixture):
        raise UserError(
            "text_data.packing = @decomposed() orders the rows of one source, and text_data.documents is a "
            "text_mixture, which has an order of its own: leave one of them out"
        )
    corpus = (
        MixedCorpus(documents, spec, sequence_length, validation_fraction, root)
        if isinstance(documents, Mixture)
        else Corpus(documents, spec, sequence_length, validation_fraction, root, packing)
    )
    return TextData(sequence_length, corpus.open, corpus.expected)


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
    corpus = Corpus(nothing, parse_tokenizer(tokenizer), sequence_length, 0.0, cache_root(cache_directory))
    return TextData(sequence_length, lambda: corpus.prepare().content(sets))
