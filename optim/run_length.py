"""Schedules whose length is that of the run, known only when a loop says it."""

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from crescendo.ranges import readable_signature


class LengthError(ValueError):
    """The parts of a schedule don't fit its length."""


class LengthWarning(UserWarning):
    """A schedule ends elsewhere than the run that it is used in."""


_heard = contextvars.ContextVar[list[str] | None]("heard", default=None)


@contextlib.contextmanager
def length_warnings() -> Iterator[list[str]]:
    """Collects what is warned of lengths within, each text once; of this thread alone, unlike `warnings`.

    >>> with length_warnings() as heard:
    ...     warn_of_length("too short"); warn_of_length("too short")
    >>> heard
    ['too short']
    """
    heard: list[str] = []
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


def warn_of_length(message: str) -> None:
    """Warns the caller's caller with a `LengthWarning`, or tells who listens (`length_warnings`)."""
    heard = _heard.get()
    if heard is None:
        warnings.warn(message, LengthWarning, stacklevel=3)
    elif message not in heard:
        heard.append(message)


class OfRun:
    """A schedule as long as the run, whose length isn't known yet.

    It stands where a schedule stands, but can't be called: `of` makes the schedule.

    Args:
      factory: from a length to the schedule.

    >>> from crescendo.optim.schedules import cosine
    >>> cosine(1.0).of(4)(2)
    Array(0.5, dtype=float32)
    """

    def __init__(self, factory: Callable[[float], optax.Schedule]):
        self._factory = factory

    def of(self, total_examples: float) -> optax.Schedule:
        """The schedule over a run of `total_examples`, in the caller's count.

        Raises:
          LengthError: parts that don't fit it.
        """
        return self._factory(total_examples)

    def __call__(self, count: jax.typing.ArrayLike) -> jax.Array:
        """Raises LengthError: without a length there is no rate."""
        raise LengthError(
            "the schedule's length isn't known: give it a total, or pass the extra argument total_examples to update()"
        )


class _LengthOfRun(float):
    """A length beyond every other, by which a schedule is checked before the run's is known."""

    def __str__(self) -> str:
        return "(the run's length)"


def ends_with_the_run(factory: Callable[..., optax.Schedule]) -> Callable[..., Any]:
    """`factory` with a `total` that may be left out or None: it then returns an `OfRun`.

    What doesn't depend on the length is checked at once. A schedule that is given a length keeps it as its `total`.
    """
    signature = readable_signature(factory)

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        bound = signature_of_run.bind(*args, **kwargs)

        def of(total: float) -> optax.Schedule:
            bound.arguments["total"] = total
            return with_total(factory(*bound.args, **bound.kwargs), total)

        total = bound.arguments.get("total")
        if total is not None:
            return of(total)
        of(_LengthOfRun(1e300))
        return OfRun(of)

    parameters = dict(signature.parameters)
    total = parameters["total"]
    ranged = total.annotation if not isinstance(total.annotation, str) else float
    parameters["total"] = total.replace(default=None, annotation=ranged | None)
    signature_of_run = signature.replace(parameters=list(parameters.values()), return_annotation=optax.Schedule | OfRun)
    make.__signature__ = signature_of_run  # type: ignore[attr-defined]
    return make


def with_total(schedule: optax.Schedule, total: float) -> optax.Schedule:
    """`schedule`, which keeps its length as the attribute `total`, for a run to compare with its own."""
    schedule.total = total
    return schedule
