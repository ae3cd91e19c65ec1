"""Tables of what configs can name here: optimizers, transforms, combinators, schedules, policies and guards.

A function enters one where it is defined, as a decoration. `crescendo.optim` imports every module of its folder, so a
new file with a decorated function is all that a new one takes: configs, the common tests and the documentation read
these tables. Ranges stand in the function's annotations, `b1: Decay = 0.9`, and a value beyond them is a ValueError.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optax

from crescendo.optim.run_length import OfRun
from crescendo.ranges import checked

if TYPE_CHECKING:
    from crescendo.optim.batch_size import BatchSizePolicy  # which registers policies of its own
    from crescendo.optim.guard import Guard


class Registry[T](dict[str, Callable[..., T]]):
    """Functions that return a T, by their names, in order of definition; a decorator, under which they are `checked`.

    Raises:
      ValueError: (as a decorator) a name that a function of another module has.

    >>> SHAPES: Registry[float] = Registry()
    >>> @SHAPES
    ... def square(side: float) -> float:
    ...     return side**2
    >>> SHAPES["square"](3.0), square(3.0)
    (9.0, 9.0)
    """

    def __call__[F: Callable[..., Any]](self, function: F) -> F:
        other = self.get(function.__name__, function)
        if other.__module__ != function.__module__:  # a module that is reloaded defines its own again
            raise ValueError(
                f"{function.__module__} defines {function.__name__!r}, which {other.__module__} has: take another name"
            )
        self[function.__name__] = checked(function)
        return self[function.__name__]  # type: ignore[return-value]


OPTIMIZERS: Registry[optax.GradientTransformationExtraArgs] = Registry()
"""Optimizers `name(learning_rate, **options)`, of a rate or a schedule; every option has a default."""

TRANSFORMS: Registry[optax.GradientTransformationExtraArgs] = Registry()
"""Pieces to chain, `name(**options)`."""

COMBINATORS: Registry[optax.GradientTransformationExtraArgs] = Registry()
"""What makes an optimizer of others, `name(optimizer, **options)` or `name(transforms)`."""

SCHEDULES: Registry[optax.Schedule | OfRun] = Registry()
"""Schedules `name(peak, total=None, *, warmup=0, **options)`; without a total they end with the run."""

POLICIES: "Registry[BatchSizePolicy]" = Registry()
"""Batch-size policies `name(**options)`, their sizes in examples."""

GUARDS: "Registry[Guard]" = Registry()
"""Guards `name(**options)`: which batches to leave out."""
