"""What runs measured, as files of JSON: curves of critical batch sizes and refined schedules.

Each format is a schema, by which its files are written and read.
"""

import codecs
import itertools
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic

MOST_BYTES = 1 << 26
MOST_TOKENS = 2.0**53
"""Above these floats skip whole numbers."""

_AtLeast0 = Annotated[float, pydantic.Field(ge=0)]
_Share = Annotated[float, pydantic.Field(ge=0, le=1)]
# What code passes may be a tuple or an array.
_Lax = pydantic.Strict(False)


class _Measured(pydantic.BaseModel):
    """No field beside those declared, no type made of another one, no number that isn't finite."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class CriticalBatchCurve(_Measured):
    """Critical batch sizes along a run, as `critical_batch.json` has them.

    Attributes:
      tokens: where they were measured; they increase.
      critical_batch_size: at each, in examples.
      interval: at each what it lies between, in examples; None for a high end that isn't known.
      fingerprint: of the model and data.
      settings, points: how it was measured; for people.
    """

    tokens: Annotated[list[Annotated[float, pydantic.Field(ge=0, le=MOST_TOKENS)]], _Lax]
    critical_batch_size: Annotated[list[_AtLeast0], _Lax]
    interval: Annotated[list[Annotated[tuple[_AtLeast0, _AtLeast0 | None], _Lax]], _Lax] | None = None
    fingerprint: str | None = None
    settings: dict[str, Any] | None = None
    points: list[Any] | None = None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.tokens:
            raise ValueError("is empty: measure at least one point")
        for name in ("critical_batch_size", "interval"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(f"has {len(self.tokens)} tokens and {len(values)} of {name}: give one for each")
        for before, after in itertools.pairwise(self.tokens):
            if not before < after:
                raise ValueError(f"does not increase in tokens: {after:g} follows {before:g}; sort it, each point once")
        for at, value, (low, high) in zip(self.tokens, self.critical_batch_size, self.interval or (), strict=False):
            slack = 1e-6 * value  # of a mean of logarithms
            if not low - slack <= value <= (value if high is None else high + slack):
                raise ValueError(f"says {value:g} examples at {at:g} tokens, outside of its interval [{low:g}, {high}]")
        return self


class RefinedSchedule(_Measured):
    """A schedule refined from gradient norms, as `save_refined` writes it.

    Attributes:
      fractions: of the run, increasing from 0 to 1.
      multipliers: of the peak, at each; the largest is 1.
      norm, smoothing: with which it was refined.
    """

    fractions: Annotated[list[_Share], _Lax]
    multipliers: Annotated[list[_Share], _Lax]
    norm: Literal["l1", "l2"] | None = None
    smoothing: _Share | None = None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        why = ""
        if len(self.fractions) != len(self.multipliers):
            why = f"{len(self.fractions)} fractions and {len(self.multipliers)} multipliers"
        elif self.fractions[:1] != [0] or self.fractions[-1] != 1:
            why = "fractions don't go from 0 to 1"
        elif any(not before < after for before, after in itertools.pairwise(self.fractions)):
            why = "fractions don't increase"
        elif max(self.multipliers) != 1:
            why = f"the largest multiplier is {max(self.multipliers):g} and not 1: the peak would not be reached"
        if why:
            raise ValueError(f"is not a refined schedule: write it with save_refined ({why})")
        return self


def read[T: pydantic.BaseModel](source: str | Path | Mapping[str, Any], schema: type[T], name: str, what: str) -> T:
    """The content of a file of JSON, or content that is at hand, checked.

    Args:
      source: the file, or the content.
      schema: its format.
      name: of the kind, for messages: "curve".
      what: what it should be, and how to come by one, for messages.

    Raises:
      ValueError: names the file and the first value that is wrong.

    >>> read({"fractions": [0, 1], "multipliers": [1, -2]}, RefinedSchedule, "schedule", "a schedule: save one")
    Traceback (most recent call last):
    ...
    ValueError: the schedule is not a schedule: save one (multipliers.1: input should be greater than or equal to 0)
    """
    name = f"the {name}" if isinstance(source, Mapping) else str(source)
    try:
        if isinstance(source, Mapping):
            return schema.model_validate(dict(source))
        return schema.model_validate_json(_content(source).removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}; give the file that was written") from None
    except pydantic.ValidationError as error:
        raise ValueError(f"{name} {_told(error, what)}") from None


def _told(error: pydantic.ValidationError, what: str) -> str:
    """The first of pydantic's complaints, in a line of ours."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = repr(".".join(map(str, first["loc"])))[1:-1][:100]
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"is not {what} (it has no {place!r})"
    if first["type"] == "extra_forbidden":
        return f"is not {what} ({place} isn't understood)"
    return f"is not {what} ({f'{place}: ' if place else ''}{first['msg'][:1].lower()}{first['msg'][1:]})"


def _content(path: str | Path) -> bytes:
    """Of a regular file of bounded size; a pipe isn't waited for."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no file that can be read to its end: give a regular file")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"{path} has {status.st_size:,} bytes, above the {MOST_BYTES:,} that it may have")
        return file.read(status.st_size)
