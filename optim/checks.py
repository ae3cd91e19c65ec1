"""What ranges at parameters don't say: of a schedule's rates, of the parameters' and the moments' dtypes."""

import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge

from crescendo.optim.masks import leaves_with_paths
from crescendo.ranges import shown

Rate = Annotated[optax.ScalarOrSchedule, Ge(0)]
"""A learning rate, or a schedule of it."""


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
    try:
        floating = jnp.issubdtype(dtype, jnp.floating)
    except (TypeError, ValueError, SyntaxError):  # a text that numpy reads as several dtypes
        floating = False
    if not floating:
        raise ValueError(f"moment_dtype must be a floating dtype, such as float32 or bfloat16, got {shown(dtype)}")
    if jnp.finfo(dtype).bits <= 8:
        raise ValueError(
            f"moment_dtype = {jnp.dtype(dtype)} has too few bits for moments without scales: use float32 or bfloat16"
        )
