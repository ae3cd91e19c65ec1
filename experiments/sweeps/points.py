"""The points of a sweep: grids, zips and chains of gin bindings, and the spaces that a search draws from."""

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import optuna

from crescendo.experiments.runtime.errors import UserError

_BRACKETS = {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}


class Point(NamedTuple):
    """One run of a sweep: the folder's name, and the values (gin text) by the binding's name."""

    name: str
    values: dict[str, str]

    @property
    def bindings(self) -> list[str]:
        """As gin statements."""
        return [f"{name} = {value}" for name, value in self.values.items()]


def split(text: str, separator: str = ",") -> list[str]:
    """The parts of gin text between separators that stand outside brackets and quotes.

    >>> split("1e-3, [1, 2], 'a,b'")
    ['1e-3', '[1, 2]', "'a,b'"]
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == separator and depth == 0:
            parts.append("")
            continue
        depth += 0 if quote else _BRACKETS.get(character, 0)
        parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def axis(text: str) -> list[dict[str, str]]:
    """The bindings of `NAME = [VALUE, ...]`, one dictionary for each value.

    >>> axis("lamb.learning_rate = [1e-3, 3e-3]")
    [{'lamb.learning_rate': '1e-3'}, {'lamb.learning_rate': '3e-3'}]

    Raises:
      UserError: for anything else.
    """
    name, _, values = (part.strip() for part in text.partition("="))
    choices = split(values[1:-1]) if values.startswith("[") and values.endswith("]") else []
    if not name or not choices:
        raise UserError(f"{text!r}: write NAME = [VALUE, ...] with at least one value")
    return [{name: value} for value in choices]


def zipped(text: str) -> list[dict[str, str]]:
    """Axes that move together, separated by semicolons.

    >>> zipped("a.x = [1, 2]; b.y = [3, 4]")
    [{'a.x': '1', 'b.y': '3'}, {'a.x': '2', 'b.y': '4'}]

    Raises:
      UserError: for axes of different lengths.
    """
    axes = [axis(part) for part in split(text, ";")]
    lengths = [len(each) for each in axes]
    if len(set(lengths)) != 1:
        raise UserError(f"--zip {text!r}: the axes have {lengths} values; give all the same number")
    return [{name: value for each in row for name, value in each.items()} for row in zip(*axes, strict=True)]


def enumerate_points(links: Sequence[Sequence[list[dict[str, str]]]]) -> list[Point]:
    """The points of each link of a chain, one link after the other: the product of the link's axes.

    Args:
      links: each a list of axes as `axis` and `zipped` make them. A point that occurs twice is kept once.

    >>> [point.values for point in enumerate_points([[axis("a.x = [1, 2]")], [axis("a.x = [2, 3]")]])]
    [{'a.x': '1'}, {'a.x': '2'}, {'a.x': '3'}]
    """
    points: dict[str, Point] = {}
    for axes in links:
        names = [name for each in axes for name in each[0]]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{name} is swept by two axes at once: put them in one, or separate them with --chain")
        for row in itertools.product(*axes):
            values = {name: value for each in row for name, value in each.items()}
            points.setdefault(repr(sorted(values.items())), Point(_name(values), values))
    return list(points.values())


def _name(values: dict[str, str]) -> str:
    """A folder's name that a person can read and no other point has."""
    readable = "-".join(f"{name.split('.')[-1]}={value}" for name, value in values.items())
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:6]
    return f"{re.sub(r'[^\w.=+-]+', '_', readable)[:80]}-{digest}"


def spaces(texts: Sequence[str]) -> dict[str, optuna.distributions.BaseDistribution]:
    """What a search draws from: `NAME = log(LOW, HIGH)`, `uniform(LOW, HIGH)`, `int(LOW, HIGH)`, `choice(VALUE, ...)`.

    >>> spaces(["train.peak = log(1e-4, 1e-2)"])
    {'train.peak': FloatDistribution(high=0.01, log=True, low=0.0001, step=None)}

    Raises:
      UserError: for anything else.
    """
    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for text in texts:
        match = re.fullmatch(r"\s*([\w./]+)\s*=\s*(log|uniform|int|choice)\((.*)\)\s*", text)
        try:
            if match is None:
                raise ValueError("no such space")
            name, kind, inside = match.groups()
            if name in distributions:
                raise ValueError("the name has a space already")
            if kind == "choice":
                distributions[name] = optuna.distributions.CategoricalDistribution(split(inside))
                continue
            low, high = (float(part) for part in split(inside))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError("the bounds must be finite")
            if kind == "int":
                if not (low.is_integer() and high.is_integer()):
                    raise ValueError("the bounds must be whole numbers")
                distributions[name] = optuna.distributions.IntDistribution(int(low), int(high))
            else:
                distributions[name] = optuna.distributions.FloatDistribution(low, high, log=kind == "log")
        except ValueError as error:
            raise UserError(
                f"--search {text!r}: {error}; write NAME = log(LOW, HIGH), uniform(LOW, HIGH), int(LOW, HIGH) or "
                "choice(VALUE, ...)"
            ) from None
    return distributions


def samples(distributions: Mapping[str, optuna.distributions.BaseDistribution]) -> list[Point]:
    """Points of a search, in which every choice occurs.

    >>> [point.values for point in samples(spaces(["a.x = choice(@f(), @g())", "a.y = log(1, 2)"]))]
    [{'a.x': '@f()', 'a.y': '1.0'}, {'a.x': '@g()', 'a.y': '1.0'}]
    """

    def some(space: optuna.distributions.BaseDistribution) -> list[str]:
        match space:
            case optuna.distributions.CategoricalDistribution(choices=choices):
                return list(map(str, choices))
            case optuna.distributions.IntDistribution(low=low) | optuna.distributions.FloatDistribution(low=low):
                return [str(low)]
        raise TypeError(f"{space} is no space of a sweep")

    values = {name: some(space) for name, space in distributions.items()}
    first = {name: choices[0] for name, choices in values.items()}
    every = [first, *({**first, name: choice} for name, choices in values.items() for choice in choices[1:])]
    return [Point(_name(each), each) for each in every]


def space_text(space: optuna.distributions.BaseDistribution) -> str:
    """A space as it is written.

    >>> space_text(spaces(["train.peak = log(1e-4, 1e-2)"])["train.peak"])
    'log(0.0001, 0.01)'
    """
    match space:
        case optuna.distributions.CategoricalDistribution(choices=choices):
            return f"choice({', '.join(map(str, choices))})"
        case optuna.distributions.IntDistribution(low=low, high=high):
            return f"int({low}, {high})"
        case optuna.distributions.FloatDistribution(low=low, high=high, log=log):
            return f"{'log' if log else 'uniform'}({low}, {high})"
    return str(space)
