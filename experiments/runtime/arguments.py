"""The arguments of what people call, by configs or in Python: checked against annotations, and refused in one line."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typeguard

from crescendo.experiments.runtime.errors import UserError
from crescendo.ranges import fit_arguments


def checked[F: Callable[..., Any]](function: F, called: str = "") -> F:
    """`function`, whose arguments are checked against the ranges of their annotations.

    Args:
      function: of keyword parameters, or a method.
      called: its name in messages; its own where it's empty.

    Raises:
      UserError: (when called) names the first that is out of its range.

    >>> from crescendo.ranges import Count
    >>> def bake(loaves: Count) -> int: return loaves
    >>> checked(bake)(0)
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: bake.loaves = 0 must be at least 1 and below 2^31
    """
    signature, name = inspect.signature(function), called or function.__name__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # which Python says better
            return function(*args, **kwargs)
        fit(bound.arguments, signature.parameters, name, types=False)
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def fit(
    arguments: dict[str, Any], parameters: Mapping[str, inspect.Parameter], called: str, *, types: bool = True
) -> None:
    """Checks arguments against annotations, in place: an int past 2^31 where a float is meant becomes one.

    Args:
      arguments: by name.
      parameters: of the function.
      called: its name, for messages.
      types: check them too, as of what a config gives.

    Raises:
      UserError: names the first that isn't what its annotation says.

    >>> def boil(minutes: float): ...
    >>> fit({"minutes": True}, inspect.signature(boil).parameters, "boil")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: boil.minutes = True must be float
    """
    try:
        fit_arguments(arguments, parameters, called, is_a if types else None)
    except ValueError as error:
        raise UserError(str(error)) from None


def is_a(value: Any, annotation: Any) -> bool:
    """Whether a value is of a type: a class, a protocol, a function."""
    try:
        typeguard.check_type(value, annotation, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        return False
    return True


def with_options_of(options: Callable, *, without: Sequence[str]) -> Callable[[Callable], Callable]:
    """Gives a function with `**options` the keyword parameters of another one, so that a default stands once.

    Their documentation stays there: the function's attribute `options_of` says where.
    """

    def decorate(function: Callable) -> Callable:
        own = inspect.signature(function)
        theirs = [
            p
            for p in inspect.signature(options).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in without
        ]
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        # Those without a default first, as Python wants them.
        merged = sorted([*named, *theirs], key=lambda p: p.default is not p.empty)
        function.__signature__ = own.replace(parameters=merged)  # type: ignore[attr-defined]
        function.options_of = options  # type: ignore[attr-defined]
        return function

    return decorate
