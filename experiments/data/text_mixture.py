"""Several texts as one, in shares that follow the clock."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.shares import Between, Shares, make_shares
from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import local_path
from crescendo.ranges import NotNegative, Positive

RESERVED = ("train", "validation")
MOST_SOURCES = 256


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several corpora to read, and how they are mixed: what `text_data` takes.

    Attributes:
      sources: by name, in the order of the names.
      shares: of these along a run.
      most_epochs: of a source that a run may not read more often, by name.
      validation_weights: of the sources in the mean that is the validation loss; above 0, and they add up to 1.
    """

    sources: Mapping[str, Documents]
    shares: Shares
    most_epochs: Mapping[str, float]
    validation_weights: Mapping[str, float]


@checked
def text_mixture(
    sources: Mapping[str, Documents],
    weights: Mapping[Any, Any] | str,
    *,
    between: Between = "hold",
    most_epochs: Mapping[str, Positive] | None = None,
    validation_weights: Mapping[str, NotNegative] | None = None,
) -> Mixture:
    """Several texts as one: which source an example is of follows from its number on the clock, in integers.

    Sources alternate as finely as their shares allow (`Shares`), and each is read in epochs of its own, every one in
    another order. So the examples are the same for any batch sizes, on any number of hosts, after any resume.

    Args:
      sources: documents by name, as `text_data` takes them; no two may read the same.
      weights: of the sources by name, such as {"web": 3, "code": 1}; or such weights by the clock in examples seen,
        from 0 on, {0: {"web": 1, "code": 0}, 4096: {"web": 1, "code": 1}}; or the path of a JSON file with either.
        What counts are their shares in the sum, in whole 4,096ths.
      between: points of the clock: "hold" keeps the weights of one to the next, "anneal" goes there on a line.
      most_epochs: how often a run may read a source, such as {"code": 1}; others are read as often as it takes.
      validation_weights: of the sources in the mean of their losses that is the validation loss; None: all alike, so
        that runs of other weights compare.

    Raises:
      UserError: for a name that can't be, the same text in two sources, weights that aren't for just these sources, are
        negative or add up to 0, or a file that doesn't hold weights.

    Example:
      >>> import tempfile
      >>> from crescendo.experiments.data.text_data import text_data
      >>> prose = Documents("prose", "prose", lambda: (f"line {i} of prose".encode() for i in range(200)))
      >>> verse = Documents("verse", "verse", lambda: (f"{i} lines of verse".encode() for i in range(99)))
      >>> mixture = text_mixture({"prose": prose, "verse": verse}, {"prose": 3, "verse": 1})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     data = text_data(mixture, sequence_length=64, cache_directory=folder)
      ...     order = data.train.order(seed=0)
      ...     [data.train.place(row).source for row in order(range(8)).tolist()]
      ['prose', 'prose', 'verse', 'prose', 'prose', 'prose', 'verse', 'prose']
      >>> list(data.held_out)
      ['prose', 'verse']

    References:
      Blakeney et al., "Does your data spark joy? Performance gains from domain upsampling at the end of training", 2024
      (https://arxiv.org/abs/2406.03476).
    """
    _check_names(sources)
    # A configuration that was written out and is read again may have them in another order.
    sources = dict(sorted(sources.items()))
    _check_apart(sources)
    most_epochs, of_mean = most_epochs or {}, validation_weights or dict.fromkeys(sources, 1.0)
    for setting, given in {"most_epochs": most_epochs, "validation_weights": of_mean}.items():
        if unknown := [name for name in given if name not in sources]:
            raise UserError(f"text_mixture.{setting}: {unknown[0]!r} is no source; there are {', '.join(sources)}")
    if not (total := sum(of_mean.values())):
        raise UserError("text_mixture.validation_weights add up to 0: give one of the sources more")
    shares = make_shares(_read(weights), [*sources], between, "text_mixture.weights")
    in_mean = {name: of_mean[name] / total for name in sources if of_mean.get(name)}
    return Mixture(sources, shares, most_epochs, in_mean)


def _read(weights: Mapping[Any, Any] | str) -> Mapping[Any, Any]:
    """The weights, which a file may hold."""
    if not isinstance(weights, str):
        return weights
    try:
        return schemas.read(local_path(weights), dict[str, Any], limit_bytes=1 << 26)
    except UserError as error:
        raise UserError(f"text_mixture.weights: {error}") from None


def _check_names(sources: Mapping[str, Documents]) -> None:
    if not 1 <= len(sources) <= MOST_SOURCES:
        raise UserError(f"text_mixture.sources has {len(sources)} sources: name from 1 to {MOST_SOURCES}")
    for name in sources:
        if not re.fullmatch(r"[A-Za-z]\w{0,39}", name, re.ASCII) or name in RESERVED:
            raise UserError(
                f"text_mixture.sources: no source can be called {name[:50]!r}: use up to 40 letters, digits and _, and "
                f"not {' or '.join(RESERVED)}"
            )


def _check_apart(sources: Mapping[str, Documents]) -> None:
    """That no two sources read the same text, nor one what another holds out."""
    texts = {name: [of, *(of.held_out or {}).values()] for name, of in sources.items()}
    files = {name: {real: file for text in of for real, file in text.files.items()} for name, of in texts.items()}
    identities = {name: {text.identity: text.source for text in of} for name, of in texts.items()}
    for one, other in itertools.combinations(sources, 2):
        if shared := [file for real, file in files[one].items() if real in files[other]]:
            raise UserError(f"text_mixture.sources: {one} and {other} both read {shared[0]}: name it in one of them")
        if copied := [source for identity, source in identities[one].items() if identity in identities[other]]:
            raise UserError(
                f"text_mixture.sources: {one} and {other} both read {copied[0]}, or its copy: name it in one of them"
            )
