"""What schedules are made of: the warmup, progress between two counts, shapes of a decay, and their checks."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from crescendo.optim.run_length import LengthError
from crescendo.ranges import NotNegative, checked

Shape = Literal["linear", "sqrt", "exponential"]
"""Of a decay."""


@checked
def with_warmup(schedule: optax.Schedule, warmup: NotNegative) -> optax.Schedule:
    """`schedule` from count `warmup` on; before it, a straight line from 0 to schedule(warmup).

    Raises:
      ValueError: a negative or infinite warmup.

    >>> rising = with_warmup(lambda count: 1.0 - count / 100, 20)
    >>> print(f"{rising(0):.2f} {rising(10):.2f} {rising(20):.2f} {rising(50):.2f}")
    0.00 0.40 0.80 0.50
    """

    def warmed(count: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count, float)
        end = jnp.asarray(warmup, t.dtype)
        risen = jnp.where(t < end, t / jnp.where(end > 0, end, 1), 1.0)
        return jnp.asarray(schedule(jnp.maximum(t, end)), t.dtype) * risen

    return warmed


def progress(t: jax.Array, start: float, end: float) -> jax.Array:
    """From 0 at `start` to 1 at `end`, exactly: both ends are rounded to the count's dtype before they are used."""
    a, b = jnp.asarray(start, t.dtype), jnp.asarray(end, t.dtype)
    return jnp.where(t >= b, 1.0, jnp.clip((t - a) / jnp.where(b > a, b - a, 1.0), 0.0, 1.0)).astype(t.dtype)


def between(start: float, end: float, weight: jax.Array) -> jax.Array:
    """start * (1 - weight) + end * weight: exact at weights 0 and 1, which start + weight * (end - start) isn't."""
    return start * (1 - weight) + end * weight


def half_cosine(u: jax.Array) -> jax.Array:
    """(1 - cos(pi u)) / 2 as sin^2(pi u / 2), which doesn't cancel near 0."""
    return jnp.sin(math.pi / 2 * u) ** 2


def decay_weight(shape: Shape, half_lives: float = 5.0) -> Callable[[jax.Array], jax.Array]:
    """The decay from 1 of a stable-then-decay schedule, as a function of its progress."""
    weights: dict[str, Callable[[jax.Array], jax.Array]] = {
        "linear": lambda u: 1 - u,
        "sqrt": lambda u: 1 - jnp.sqrt(u),
        "exponential": lambda u: 2.0 ** (-half_lives * u),
    }
    return weights[shape]


def check_length(total: float, warmup: float, **parts: float) -> None:
    """Raises LengthError for parts of a schedule that don't fit its length, all in counts."""
    durations = {"warmup": warmup, **parts}
    length = sum(durations.values())
    if length > total or (length == total and "decay" not in parts):  # something must be left to decay over
        written = " + ".join(f"{name} {value}" for name, value in durations.items())
        raise LengthError(f"{written} don't fit total {total}: shorten them or lengthen total")
