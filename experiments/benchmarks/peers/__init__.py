"""Training steps as others write them, beside which ours is timed: each module is one, found by its name.

A peer is a module that names the packages it needs and how they are installed, `PACKAGES` and `INSTALL`, and has
`prepare(model, rows) -> Prepared`. It imports them inside of functions: a peer is listed where it can't run.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from crescendo.experiments.runtime.errors import UserError


class Prepared(NamedTuple):
    """A training step and all that it needs, on the device.

    Attributes:
      device: the device's kind.
      parameter_count: of the model.
      step: takes one step and gives its loss, which the device need not have computed yet.
      read: waits for that, and gives the mean loss of the step's rows before its update, in nats a token.
      peak_bytes: the device's memory at its peak, so far.
    """

    device: str
    parameter_count: int
    step: Callable[[], Any]
    read: Callable[[Any], float]
    peak_bytes: Callable[[], int | None]


def names() -> list[str]:
    """Every peer, in order of the alphabet; none is imported.

    >>> names()
    ['jax', 'torch']
    """
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def peer(name: str) -> ModuleType:
    """A peer's module, whose packages are there.

    Args:
      name: one of `names()`.

    Raises:
      UserError: there is no such peer, or one of its packages isn't installed.

    >>> peer("tensor")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: --peer tensor: there is no such peer; there are jax, torch
    """
    if name not in names():
        raise UserError(f"--peer {name}: there is no such peer; there are {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    missing = [package for package in module.PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--peer {name} needs {' and '.join(missing)}, not installed here: {module.INSTALL}")
    return module
