"""Gin statements made of Python values: the one place where an experiment's configs become text."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Call:
    """`@name()`: what the factory of that name makes."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@name`: the factory itself."""

    name: str


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%name`: what the macro of that name stands for."""

    name: str


type Value = bool | int | float | str | Call | Reference | Macro | Sequence[Value] | Mapping[Any, Value] | None
type Bindings = Mapping[str, Value]


def statements(bindings: Bindings) -> list[str]:
    """A gin statement for each binding, in order; gin reads back exactly the values that were given.

    Args:
      bindings: by names such as `train.batch_size`, or a macro's.

    Raises:
      TypeError, ValueError: for a value that gin has no text for, such as an array or an infinite number.

    >>> statements({"train.batch_size": Call("staged"), "staged.sizes": [2, 4], "staged.cap": Macro("CAP")})
    ['train.batch_size = @staged()', 'staged.sizes = [2, 4]', 'staged.cap = %CAP']
    """
    return [f"{name} = {_text(value)}" for name, value in bindings.items()]


def _text(value: Value) -> str:
    match value:
        case Call(name):
            return f"@{name}()"
        case Reference(name):
            return f"@{name}"
        case Macro(name):
            return f"%{name}"
        case bool() | int() | str() | None if type(value) in (bool, int, str, type(None)):
            return repr(value)
        case float() if type(value) is float:
            if not math.isfinite(value):
                raise ValueError(f"{value} has no gin text: give a finite number")
            return repr(value)
        case list():
            return f"[{', '.join(map(_text, value))}]"
        case tuple():
            return f"({''.join(f'{_text(item)}, ' for item in value)})"
        case dict():
            return f"{{{', '.join(f'{_text(key)}: {_text(item)}' for key, item in value.items())}}}"
    raise TypeError(f"{value!r} is {type(value).__name__}, which has no gin text: give Python's own numbers and text")


def check_not_set(command: str, own: Mapping[str, str | None], bindings: Sequence[str]) -> None:
    """That a user's statements bind nothing that the command binds itself, of which one would be ignored.

    Args:
      command: as it is typed.
      own: what the command binds, each with the option that sets it. One with a word behind it, such as `--seeds N`,
        doesn't take the binding's value. None: there is no such option.
      bindings: the user's gin statements.

    Raises:
      UserError: names the binding and what to give instead.

    >>> check_not_set("refine_schedule", {"LEARNING_RATE": "--learning-rate"}, ["LEARNING_RATE = 8e-3"])
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: refine_schedule sets LEARNING_RATE itself: ...
    """
    options = {_last_two(name): option for name, option in own.items()}
    for statement in bindings:
        for name in configurables.names_bound(statement):
            if _last_two(name) not in options:
                continue
            option = options[_last_two(name)]
            value = statement.partition("=")[2].strip()
            if option is None:
                instead = f"leave out --set {statement.strip()!r}"
            elif " " not in option and re.fullmatch(r"[\d.e+-]+", value):
                instead = f"give {option} {value} instead of --set"
            else:
                instead = f"give {option} instead of --set"
            raise UserError(f"{command} sets {name} itself: {instead}")


def _last_two(name: str) -> tuple[str, ...]:
    """How gin's names are compared: `experiments.train.seed` is `train.seed`, whatever the scope."""
    return tuple(name.rpartition("/")[2].split(".")[-2:])
