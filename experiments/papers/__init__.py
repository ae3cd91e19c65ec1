"""What papers claim, tried here: each module is one paper's experiment and a command of its name.

A paper states itself in `PAPER`. The page `docs/papers/NAME.md` says what of it is here, `docs/results/NAME.md` what
was measured, and `tests/experiments/papers/test_NAME.py` covers it.
"""

import importlib
import pkgutil
from typing import NamedTuple


class Paper(NamedTuple):
    """What a paper says, and how it is tried here.

    Attributes:
      title: the paper's.
      authors: and its year.
      arxiv: its number there.
      claim: with the figure or the number that shows it.
      command: that tries it.
      device: that the expected result was measured on.
      expected: what the command shows, as measured.
    """

    title: str
    authors: str
    arxiv: str
    claim: str
    command: str
    device: str
    expected: str


def names() -> list[str]:
    """The papers' modules, in order of the alphabet; none is imported.

    >>> "batch_warmup" in names()
    True
    """
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def papers() -> dict[str, Paper]:
    """What every paper states, by name; imports them all."""
    return {name: importlib.import_module(f"{__name__}.{name}").PAPER for name in names()}
