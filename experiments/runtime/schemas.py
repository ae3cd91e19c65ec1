"""JSON that others wrote, checked against a schema: what isn't understood is refused by name.

A format is a class, `class Curve(Schema)`, whose annotations say what its fields may be; pydantic checks them.
"""

import collections
import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic

from crescendo.experiments.runtime.encoding import decoded
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import read_file


class Schema(pydantic.BaseModel):
    """An object of JSON: no field beside those declared, no type made of another one, no number that isn't finite.

    >>> class Point(Schema):
    ...     x: float
    ...     label: str | None = None
    >>> parse(b'{"x": 0.5}', Point, "here")
    Point(x=0.5, label=None)
    >>> parse(b'{"x": "0.5"}', Point, "here")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: here: x = '0.5': input should be a valid number
    """

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class OpenSchema(Schema):
    """An object that may have other fields too, of no consequence here."""

    model_config = pydantic.ConfigDict(extra="ignore")


STRICT, OPEN = Schema.model_config, OpenSchema.model_config | pydantic.ConfigDict(extra="allow")
"""The same of a `TypedDict` (`pydantic.with_config`), for code that takes the content as a mapping; with the
second what else is there stays."""


def read[T](path: Path, schema: type[T], *, way_on: str = "", limit_bytes: int = 1 << 28) -> T:
    """The content of a file, as the schema has it.

    Args:
      path: of a file of JSON.
      schema: a `Schema`, or any type that pydantic checks, such as `dict[str, int]`.
      way_on: what to do about a file that doesn't hold it; the message's end.
      limit_bytes: of the file.

    Raises:
      UserError: see `parse`; and for a file that can't be read.
    """
    return parse(read_file(path, limit_bytes=limit_bytes), schema, str(path), way_on=way_on)


def parse[T](content: bytes, schema: type[T], where: str, *, way_on: str = "") -> T:
    """JSON, as the schema has it.

    Args:
      content: UTF-8.
      schema: see `read`.
      where: names it in messages.
      way_on: what to do about it.

    Raises:
      UserError: for what is no JSON, nests too deeply, says something twice, or isn't what the schema says: names the
        first such field, with its value.
    """
    text = decoded(content, where)
    with _said(where, way_on):
        found = _adapter(schema).validate_json(text, strict=True)
    json.loads(text, object_pairs_hook=functools.partial(_check_once, where, way_on))
    return found


def checked[T](content: object, schema: type[T], where: str, *, way_on: str = "") -> T:
    """What was read already, as the schema has it.

    Raises:
      UserError: see `parse`.

    >>> checked({"steps": 3}, dict[str, int], "here")
    {'steps': 3}
    """
    with _said(where, way_on):
        return _adapter(schema).validate_python(content, strict=True)


# Making one takes longer than using it.
_adapter: Callable[[Any], pydantic.TypeAdapter[Any]] = functools.cache(pydantic.TypeAdapter)


@contextlib.contextmanager
def _said(where: str, way_on: str) -> Iterator[None]:
    try:
        yield
    except pydantic.ValidationError as error:
        raise UserError(told(error, where) + (f"; {way_on}" if way_on else "")) from None


def _check_once(where: str, way_on: str, pairs: Sequence[tuple[str, Any]]) -> None:
    """That no name of an object is there twice: which one is meant, readers disagree on."""
    if len(dict(pairs)) < len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common()
        raise UserError(f"{where} has {_shown(twice)} twice in one object" + (f"; {way_on}" if way_on else ""))


def told(error: pydantic.ValidationError, where: str) -> str:
    """The first of pydantic's complaints, in a line of ours."""
    errors = error.errors(include_url=False, include_context=False)
    first = errors[0]
    says = first["msg"][:1].lower() + first["msg"][1:]
    place = repr(".".join(str(part)[:60] for part in first["loc"]))[1:-1]
    if first["type"] == "json_invalid":
        return f"{where} is damaged ({says})"
    if first["type"] == "missing":
        return f"{where} has no {place}"
    if first["type"] == "extra_forbidden":
        return f"{where}: {place} isn't understood"
    if first["type"] == "value_error":
        return f"{where}: {f'{place}: ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
    return f"{where}: {f'{place} = ' if place else ''}{_shown(first['input'])}: {says}"


def _shown(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
