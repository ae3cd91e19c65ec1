"""A mixture on disk: each source prepared by itself, all with one tokenizer."""

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

from crescendo.experiments.data.corpus import VALIDATION, training_documents
from crescendo.experiments.data.documents import digest
from crescendo.experiments.data.mixed_rows import MixedRows
from crescendo.experiments.data.preparation import prepared
from crescendo.experiments.data.prepared_text import Content, Corpus, ExpectedText
from crescendo.experiments.data.text_mixture import Mixture
from crescendo.experiments.data.tokenizer import SubwordTokenizer, Tokenizer, TokenizerSpec
from crescendo.experiments.runtime.errors import UserError

FORMAT = 1  # of the order of a mixture's examples, and of a tokenizer of several sources: to be raised when one changes


class MixedCorpus:
    """A mixture, as `text_data` was asked for it.

    A tokenizer is trained on the training documents of all sources, one source after the other, each document once: it
    doesn't depend on the weights, so that the losses of runs with other weights compare.

    Args:
      mixture: to read.
      tokenizer: to apply to all sources.
      sequence_length: tokens in a row.
      validation_fraction: the part of each source's documents to hold out.
      root: the folder for prepared data.

    Raises:
      UserError: for names of held-out sets that can't be.
    """

    def __init__(
        self, mixture: Mixture, tokenizer: TokenizerSpec, sequence_length: int, validation_fraction: float, root: Path
    ):
        self._mixture, self._sequence_length = mixture, sequence_length
        self._spec = _shared(mixture, tokenizer, validation_fraction, root) if tokenizer.trained else tokenizer
        self._corpora = {
            name: Corpus(documents, self._spec, sequence_length, validation_fraction, root)
            for name, documents in mixture.sources.items()
        }

    def expected(self) -> ExpectedText | None:
        """What is known before rows are packed; None where they seem to be, and only need opening."""
        expected = [each for corpus in self._corpora.values() if (each := corpus.expected()) is not None]
        if not expected:
            return None
        # Of one that is tokenized already the count is that of all.
        vocab_size = min(each.vocab_size for each in expected)
        sets = [_set_name(name, of) for name, corpus in self._corpora.items() for of in corpus.held_out]
        return ExpectedText(vocab_size, self._sequence_length, sets)

    def open(self) -> Content:
        """The sources, prepared and opened.

        Raises:
          UserError: names the source that can't be.
        """
        mixture, parts = self._mixture, dict[str, Content]()
        for name, corpus in self._corpora.items():
            try:
                parts[name] = corpus.open()
            except UserError as error:
                raise UserError(f"text_mixture.sources, {name}: {error}") from error
        shares = mixture.shares
        order = [shares.between, shares.points.tolist(), shares.parts.tolist()]
        return Content(
            train=MixedRows({name: part.rows for name, part in parts.items()}, shares, mixture.most_epochs),
            held_out={_set_name(name, of): rows for name, part in parts.items() for of, rows in part.held_out.items()},
            tokenizer=next(iter(parts.values())).tokenizer,
            documents=sum(part.documents for part in parts.values()),
            tokens=sum(part.tokens for part in parts.values()),
            fingerprint=digest([FORMAT, {name: part.fingerprint for name, part in parts.items()}, order]),
            validation_weights=mixture.validation_weights,
        )


def _set_name(source: str, held_out: str) -> str:
    """What a held-out set of a source is called."""
    return source if held_out == VALIDATION else f"{source}-{held_out}"


def _shared(mixture: Mixture, spec: TokenizerSpec, validation_fraction: float, root: Path) -> TokenizerSpec:
    """A tokenizer that is trained on all sources when the first of them needs it, and kept."""
    of_sources = {
        name: [documents.identity, VALIDATION in (documents.held_out or {})]
        for name, documents in mixture.sources.items()
    }
    identity = f"{spec.identity} of {digest([FORMAT, of_sources, validation_fraction])}"

    def build(folder: Path) -> None:
        every = mixture.sources.values()
        documents = itertools.chain.from_iterable(training_documents(each, validation_fraction) for each in every)
        (folder / "tokenizer.json").write_text(spec.make(documents).to_json(), encoding="utf-8")

    @functools.cache
    def trained() -> SubwordTokenizer:
        folder = prepared(root / "tokenizers" / digest(identity), build)
        return SubwordTokenizer.load(folder / "tokenizer.json")

    def make(_: Iterable[bytes]) -> Tokenizer:
        return trained()

    return TokenizerSpec(identity, make, spec.vocab_size)
