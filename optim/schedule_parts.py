"""What schedules are made of: the warmup, progress between two counts, shapes of a decay, and their checks."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from crescendo.optim.checks import check_learning_rate
from crescendo.optim.run_length import LengthError


def with_warmup(schedule: optax.Schedule, warmup: float) -> optax.Schedule:
    """`schedule` from count `warmup` on; before it, a straight line from 0 to schedule(warmup).

    Raises:
      ValueError: a negative or infinite warmup.

    >>> rising = with_warmup(lambda count: 1.0 - count / 100, 20)
    >>> print(f"{rising(0):.2f} {rising(10):.2f} {rising(20):.2f} {rising(50):.2f}")
    0.00 0.40 0.80 0.50
    """
    if not 0 <= warmup < math.inf:
        raise ValueError(f"warmup must be at least 0 and finite, got {warmup}")

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


def decay_weight(shape: str, half_lives: float = 5.0) -> Callable[[jax.Array], jax.Array]:
    """The decay from 1 of a stable-then-decay schedule, as a function of its progress."""
    if not 0 <= half_lives < math.inf:
        raise ValueError(f"half_lives must be at least 0 and finite, got {half_lives}")
    weights: dict[str, Callable[[jax.Array], jax.Array]] = {
        "linear": lambda u: 1 - u,
        "sqrt": lambda u: 1 - jnp.sqrt(u),
        "exponential": lambda u: 2.0 ** (-half_lives * u),
    }
    if shape not in weights:
        raise ValueError(f"unknown decay shape {shape!r}: use one of {', '.join(weights)}")
    return weights[shape]


def check(peak: float, total: float, warmup: float, **parts: float) -> None:
    """Rates and fractions in range, and the parts of a schedule (all in counts) within its length."""
    check_learning_rate(peak, "peak")
    if not total > 0:
        raise ValueError(f"total must be above 0, got {total}")
    fractions = {name: value for name, value in parts.items() if name.endswith("fraction")}
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")
    durations = {"warmup": warmup} | {name: value for name, value in parts.items() if name not in fractions}
    for name, value in durations.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    length = sum(durations.values())
    if length > total or (length == total and "decay" not in parts):  # something must be left to decay over
        written = " + ".join(f"{name} {value}" for name, value in durations.items())
        raise LengthError(f"{written} don't fit total {total}: shorten them or lengthen total")
