"""Every setting that configs have, from the signatures and docstrings of the functions that they name."""

import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

from crescendo.experiments.configs.binding import GIVEN
from crescendo.experiments.configs.factories import FACTORIES, optax_factories
from crescendo.experiments.configs.references import default_text
from crescendo.experiments.runtime.command import parameter_docs
from crescendo.ranges import told


class Setting(NamedTuple):
    """A parameter that a config may bind.

    Attributes:
      name: `FUNCTION.PARAMETER`.
      default: as a config would write it, or "required".
      range: what it may be, in words; empty where any value of its type will do.
      says: its first sentence.
    """

    name: str
    default: str
    range: str
    says: str


def settings(experiment: Callable, word: str = "") -> Iterator[Setting]:
    """The settings of an experiment and of all that configs can name, the experiment's first.

    Args:
      experiment: a function.
      word: only those with it in their name, in any case; those of optax are given for a word alone.

    >>> from crescendo.experiments.trainer.training import train
    >>> next(settings(train, "total_examples")).default
    'required'
    >>> next(settings(train, "adamw.b2")).range
    'at least 0 and below 1'
    """
    tables = {**FACTORIES, **(optax_factories() if word else {})}
    ours = [name for factories in FACTORIES.values() for name in factories]
    functions = {experiment.__name__: experiment}
    for module, factories in tables.items():
        for name, factory in factories.items():
            qualified = module not in FACTORIES or ours.count(name) > 1
            functions[f"{module.removeprefix('optim.')}.{name}" if qualified else name] = factory
    for called, function in functions.items():
        said = parameter_docs(function)
        for parameter in inspect.signature(function).parameters.values():
            name = f"{called}.{parameter.name}"
            hidden = function is experiment and parameter.name in ("run", *GIVEN)
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or hidden:
                continue
            if word.lower() in name.lower():
                says = _first_sentence(said.get(parameter.name, ""))
                yield Setting(name, default_text(parameter), told(parameter.annotation), says)


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")
