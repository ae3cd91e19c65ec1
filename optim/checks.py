"""The ranges of rates and constants: one that is out of its range is refused by name before it trains NaN."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crescendo.optim.masks import leaves_with_paths


class Range(NamedTuple):
    """Values from `low` to `high`, each end in or out, and one to try."""

    low: float
    high: float
    low_in: bool
    high_in: bool
    usual: float

    def __contains__(self, value: object) -> bool:
        x = float(value)  # type: ignore[arg-type]
        return (self.low < x or (self.low_in and x == self.low)) and (
            x < self.high or (self.high_in and x == self.high)
        )

    def __str__(self) -> str:
        low = f"{'at least' if self.low_in else 'above'} {self.low:g}"
        if self.high == math.inf:
            return low if self.high_in else f"{low} and finite"
        return f"{low} and {'at most' if self.high_in else 'below'} {self.high:g}"


def decay(usual: float) -> Range:
    """Of a moving average: from 0 to below 1."""
    return Range(0.0, 1.0, True, False, usual)


def positive(usual: float) -> Range:
    """Above 0 and finite."""
    return Range(0.0, math.inf, False, False, usual)


def not_negative(usual: float) -> Range:
    """At least 0 and finite."""
    return Range(0.0, math.inf, True, False, usual)


def at_least_one(usual: int) -> Range:
    """Of a count."""
    return Range(1.0, math.inf, True, False, usual)


RANGES: dict[str, Range] = {
    "b1": decay(0.9),
    "b2": decay(0.95),
    "adam_b1": decay(0.9),
    "adam_b2": decay(0.95),
    "momentum": decay(0.9),
    "decay": decay(0.99),
    "decay_rate": decay(0.8),
    "eps": not_negative(1e-8),
    "weight_decay": not_negative(0.1),
    "weight_power": not_negative(2.0),
    "initial_accumulator": not_negative(0.1),
    "gamma": positive(0.01),
    "rms": positive(0.2),
    "initial_rate": positive(1e-6),
    "rate_coefficient": positive(1.0),
    "trust_coefficient": positive(0.001),
    "clip_threshold": positive(1.0),
    "clipping_threshold": positive(1.0),
    "newton_schulz_steps": at_least_one(5),
    "update_interval": at_least_one(10),
    "min_dim_size_to_factor": at_least_one(128),
    "examples": positive(100_000),
}
"""The range of every constant by its name, the same in all optimizers and transforms.

A module with a constant of a new name puts its range here: `RANGES["lookahead"] = at_least_one(5)`.
"""


def check_constants(**constants: Any) -> None:
    """Raises ValueError for a constant outside its range in `RANGES`, or NaN.

    None is left out, and so is what is traced: `optax.inject_hyperparams` under jit passes such.

    >>> check_constants(b1=0.9, eps=0.0, momentum=None)
    >>> check_constants(b2=1.0)
    Traceback (most recent call last):
      ...
    ValueError: b2 = 1.0 must be at least 0 and below 1: try 0.95
    """
    for name, value in constants.items():
        if value is None or isinstance(value, jax.core.Tracer):
            continue
        allowed = RANGES[name]
        if value not in allowed:
            raise ValueError(f"{name} = {value} must be {allowed}: try {allowed.usual:g}")


def check_learning_rate(rate: object, name: str = "learning_rate") -> None:
    """Raises ValueError for a concrete rate that is negative, NaN or infinite; traced ones can't be looked at."""
    if not isinstance(rate, jax.core.Tracer) and not 0 <= float(rate) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be at least 0 and finite, got {rate}")


def check_real(params: Any, name: str) -> None:
    """Raises ValueError for parameters that are complex, which `name` can't train.

    >>> check_real({"w": jnp.ones(2, jnp.complex64)}, "sophia")
    Traceback (most recent call last):
      ...
    ValueError: sophia takes real parameters and w is complex64: train its real and imaginary parts
    """
    for path, leaf in leaves_with_paths(params):
        if jnp.iscomplexobj(leaf):
            which = f"{'/'.join(path) or 'one'} is {jnp.result_type(leaf)}"
            raise ValueError(f"{name} takes real parameters and {which}: train its real and imaginary parts")


def check_moment_dtype(dtype: jax.typing.DTypeLike | None) -> None:
    """Raises ValueError for a dtype that isn't floating, or too narrow for moments that have no scales of their own.

    >>> check_moment_dtype("float8_e4m3fn")
    Traceback (most recent call last):
      ...
    ValueError: moment_dtype = float8_e4m3fn has too few bits for moments without scales: use float32 or bfloat16
    """
    if dtype is None:
        return
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"moment_dtype must be a floating dtype, such as float32 or bfloat16, got {dtype}")
    if jnp.finfo(dtype).bits <= 8:
        raise ValueError(
            f"moment_dtype = {jnp.dtype(dtype)} has too few bits for moments without scales: use float32 or bfloat16"
        )
