"""The learning rate applied to an update, and the rules that say how large it should be.

`scale_by_learning_rate` is the last link of every optimizer here. The functions below it carry a rate from one batch
size to another, or predict it from the model and the data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crescendo.optim.checks import Rate, check_learning_rate
from crescendo.optim.registry import TRANSFORMS
from crescendo.optim.run_length import OfRun, warn_of_length
from crescendo.optim.states import nodes, spread


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as optax's states do
    """Updates made, int32[]."""
    learning_rate: jax.Array
    """The rate of the last update (before the first: of count 0, or 0 if not known), float32[]; float64[] under x64."""

    @property
    def takes_learning_rate_factor(self) -> bool:
        """See `update_with_factor`."""
        return True

    def report(self) -> dict[str, jax.Array]:
        """The rate."""
        return {"learning_rate": self.learning_rate}


@TRANSFORMS
def scale_by_learning_rate(learning_rate: Rate) -> optax.GradientTransformationExtraArgs:
    r"""Multiply the update by -f eta(t), where t is the extra argument `examples_seen` if the caller passes it.

    Without `examples_seen` t is the number of updates made, as in `optax.scale_by_learning_rate`, so that what is
    chained with this is a drop-in optax optimizer. f, 1 by default, is the extra argument `learning_rate_factor`, by
    which `adaptive_batch_size` lets the rate follow the batch; a schedule that follows it by itself (`power`) is read
    at the batch of the extra argument `batch_stats`, and f is left out. The rate used, f eta(t), stands in the state:
    `optim.reported(opt_state)["learning_rate"]` reads it for the log. The product is rounded once, to the update's
    dtype.

    Args:
      learning_rate: a rate or a schedule over the caller's clock; one without a total ends with the run, whose length
        is the extra argument `total_examples`, a Python number.

    Raises:
      ValueError: a rate (for a schedule: its value at 0) that is negative, NaN or infinite; at `update`, a schedule
        whose length isn't known.
      LengthError: at `update`, a schedule whose parts don't fit the run.

    Warns:
      LengthWarning: (when traced) a schedule that ends elsewhere than the run.

    >>> from crescendo.optim.schedules import linear
    >>> transform = scale_by_learning_rate(linear(1.0, 100))
    >>> state = transform.init(jnp.ones(2))
    >>> update, state = transform.update(jnp.ones(2), state, examples_seen=75)
    >>> print(update, state.learning_rate, state.count)
    [-0.25 -0.25] 0.25 1
    """
    rate_at = RateAt(learning_rate)

    def init(params: optax.Params) -> ScaleByLearningRateState:
        del params
        return ScaleByLearningRateState(jnp.zeros((), jnp.int32), rate_at.at_start())

    def update(
        updates: optax.Updates,
        state: ScaleByLearningRateState,
        params: optax.Params | None = None,
        *,
        examples_seen: jax.typing.ArrayLike | None = None,
        total_examples: float | None = None,
        batch_stats: Any = None,
        learning_rate_factor: jax.typing.ArrayLike = 1,
        **extra_args: object,
    ) -> tuple[optax.Updates, ScaleByLearningRateState]:
        del params, extra_args
        rate = rate_at(
            state.count if examples_seen is None else examples_seen,
            total_examples=total_examples,
            batch_size=None if batch_stats is None else batch_stats.batch_size,
            factor=learning_rate_factor,
        )
        updates = jax.tree.map(lambda u: (-rate * u).astype(jnp.result_type(u)), updates)
        return updates, ScaleByLearningRateState(optax.safe_increment(state.count), rate)

    return optax.GradientTransformationExtraArgs(init, update)


class WithLearningRateState(NamedTuple):
    """State of `with_learning_rate`."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as optax's states do
    """Updates made, int32[]."""
    learning_rate: jax.Array
    """The rate of the last update (before the first: of count 0, or 0 if not known), float32[]; float64[] under x64."""
    inner_state: optax.OptState

    @property
    def takes_learning_rate_factor(self) -> bool:
        """See `update_with_factor`."""
        return True

    def report(self) -> dict[str, jax.Array]:
        """The rate."""
        return {"learning_rate": self.learning_rate}


def with_learning_rate(
    make: Callable[[jax.Array], optax.GradientTransformation], learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that takes its rate at construction, driven by `examples_seen` as `scale_by_learning_rate` is.

    For optimizers whose rate isn't a last factor (Adafactor, Prodigy, Schedule-Free). Like `optax.inject_hyperparams`
    it makes the optimizer anew in every update, but for the rate alone and on the caller's clock; the rate includes the
    `learning_rate_factor`, so that whatever the optimizer derives from its rate follows the batch.

    Args:
      make: from a rate (a traced scalar) to the optimizer; its state must not depend on the rate's value.
      learning_rate: a rate or a schedule.

    Raises and warns: as `scale_by_learning_rate`.

    >>> from crescendo.optim.schedules import linear
    >>> transform = with_learning_rate(optax.sgd, linear(1.0, 100))
    >>> update, state = transform.update(jnp.ones(2), transform.init(jnp.ones(2)), examples_seen=75)
    >>> print(update, state.learning_rate)
    [-0.25 -0.25] 0.25
    """
    rate_at = RateAt(learning_rate)

    def init(params: optax.Params) -> WithLearningRateState:
        # Copied, so that a state which keeps the first parameters can be donated together with the parameters.
        rate = rate_at.at_start()
        inner_state = make(rate).init(jax.tree.map(jnp.copy, params))
        return WithLearningRateState(jnp.zeros((), jnp.int32), rate, inner_state)

    def update(
        updates: optax.Updates,
        state: WithLearningRateState,
        params: optax.Params | None = None,
        *,
        examples_seen: jax.typing.ArrayLike | None = None,
        total_examples: float | None = None,
        batch_stats: Any = None,
        learning_rate_factor: jax.typing.ArrayLike = 1,
        **extra_args: object,
    ) -> tuple[optax.Updates, WithLearningRateState]:
        rate = rate_at(
            state.count if examples_seen is None else examples_seen,
            total_examples=total_examples,
            batch_size=None if batch_stats is None else batch_stats.batch_size,
            factor=learning_rate_factor,
        )
        inner = optax.with_extra_args_support(make(rate))
        updates, inner_state = inner.update(updates, state.inner_state, params, batch_stats=batch_stats, **extra_args)
        return updates, WithLearningRateState(optax.safe_increment(state.count), rate, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def update_with_factor(
    optimizer: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    *,
    learning_rate_factor: jax.typing.ArrayLike | None = None,
    rate_multipliers: Any = None,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState]:
    """`optimizer.update` at its learning rate times a factor, whoever's it is, and times a multiplier by parameter.

    Each goes to the optimizer as an extra argument if its state holds something that takes it: a true attribute
    `takes_learning_rate_factor`, as `scale_by_learning_rate` and `with_learning_rate` have, or
    `takes_rate_multipliers`, as what averages the parameters has. Where nothing does, as in optax's own, the updates
    are scaled instead.

    >>> for optimizer in (optax.chain(scale_by_learning_rate(0.5)), optax.sgd(0.5)):
    ...     optimizer = optax.with_extra_args_support(optimizer)
    ...     state = optimizer.init(jnp.ones(1))
    ...     print(update_with_factor(optimizer, jnp.ones(1), state, None, learning_rate_factor=2.0)[0])
    [-1.]
    [-1.]
    """
    given = dict(learning_rate_factor=learning_rate_factor, rate_multipliers=rate_multipliers)
    left = {name: value for name, value in given.items() if value is not None}
    for name in tuple(left):
        if any(getattr(node, f"takes_{name}", False) is True for node in nodes(state)):
            extra_args[name] = left.pop(name)
    updates, state = optimizer.update(updates, state, params, **extra_args)
    if "learning_rate_factor" in left:
        updates = jax.tree.map(lambda u: (u * learning_rate_factor).astype(jnp.result_type(u)), updates)
    if "rate_multipliers" in left:
        updates = _multiplied(updates, rate_multipliers)
    return updates, state


class ScaleByParameterState(NamedTuple):
    """State of `scale_by_parameter`: no arrays."""

    @property
    def takes_rate_multipliers(self) -> bool:
        """See `update_with_factor`."""
        return True


def scale_by_parameter(scale: jax.typing.ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Multiply the update by `scale` and by the extra argument `rate_multipliers`, a tree of floats, if it is passed.

    >>> transform = scale_by_parameter(-3.0)
    >>> print(transform.update(jnp.ones(1), transform.init(jnp.ones(1)), rate_multipliers=0.5)[0])
    [-1.5]
    """

    def update(
        updates: optax.Updates,
        state: ScaleByParameterState,
        params: optax.Params | None = None,
        *,
        rate_multipliers: Any = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, ScaleByParameterState]:
        del params, extra_args
        updates = jax.tree.map(lambda u: scale * u, updates)
        if rate_multipliers is not None:
            updates = _multiplied(updates, rate_multipliers)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: ScaleByParameterState(), update)


def _multiplied(updates: optax.Updates, multipliers: Any) -> optax.Updates:
    """Each update times its multiplier; multipliers may stand where a mask left nothing."""
    return jax.tree.map(lambda u, m: (u * m).astype(jnp.result_type(u)), updates, spread(multipliers, updates))


class RateAt:
    """A rate or a schedule as a function of all that it may depend on, in the default float dtype.

    Raises and warns: as `scale_by_learning_rate`.

    >>> from crescendo.optim.schedules import linear
    >>> rate_at = RateAt(linear(1.0))
    >>> print(rate_at(50, total_examples=100), rate_at(50, total_examples=100, factor=2.0), rate_at.at_start())
    0.5 1.0 0.0
    """

    def __init__(self, learning_rate: optax.ScalarOrSchedule | OfRun):
        self._rate: Any = learning_rate
        if not callable(learning_rate):
            check_learning_rate(learning_rate)
        elif not isinstance(learning_rate, OfRun):
            check_learning_rate(self._of_batch(learning_rate, 1)(0), "learning_rate at count 0")

    def __call__(
        self,
        count: jax.typing.ArrayLike,
        *,
        total_examples: float | None = None,
        batch_size: jax.typing.ArrayLike | None = None,
        factor: jax.typing.ArrayLike = 1,
    ) -> jax.Array:
        """The rate at a count of a run of a given length, at a batch size, times the coupling's factor."""
        if not callable(self._rate):
            return jnp.asarray(self._rate, float) * factor
        schedule = self._of_run(total_examples)
        follows_batch = batch_size is not None and hasattr(schedule, "at_batch_size")
        rate = jnp.asarray(self._of_batch(schedule, batch_size)(count), float)
        return rate if follows_batch else rate * factor

    def at_start(self) -> jax.Array:
        """The rate at count 0, as far as it is known without a run: 0 if it isn't."""
        known = not isinstance(self._rate, OfRun) and not hasattr(self._rate, "at_batch_size")
        return self(0) if known else jnp.zeros((), float)

    def _of_run(self, total_examples: float | None) -> optax.Schedule:
        """The schedule of a run so long."""
        if total_examples is None:
            return self._rate
        if isinstance(self._rate, OfRun):
            return self._rate.of(total_examples)
        own = getattr(self._rate, "total", total_examples)
        if own != total_examples:
            warn_of_length(
                f"the learning rate's schedule ends at {own} and the run at {total_examples}: leave out the "
                f"schedule's total to end it with the run"
            )
        return self._rate

    @staticmethod
    def _of_batch(schedule: Any, batch_size: jax.typing.ArrayLike | None) -> optax.Schedule:
        """The schedule at a batch, where it depends on it."""
        if batch_size is None or not hasattr(schedule, "at_batch_size"):
            return schedule
        return schedule.at_batch_size(batch_size)


def learning_rate_factor(
    rule: str,
    batch_size: jax.typing.ArrayLike,
    base_batch_size: jax.typing.ArrayLike,
    *,
    exponent: float = 0.5,
) -> jax.Array:
    """What to multiply a learning rate by when the batch goes from `base_batch_size` to `batch_size`.

    `linear`: r = B / B0, for SGD; `sqrt`: r^0.5, for Adam and its kin; `power`: r^exponent; `none`: 1. Valid below the
    critical batch size only.

    Args:
      rule: `linear`, `sqrt`, `power` or `none`.
      batch_size: the new batch, in examples; may be traced.
      base_batch_size: the batch that the rate was meant for, in examples; may be traced.
      exponent: of the rule `power`.

    Returns:
      The factor, in the default float dtype.

    Raises:
      ValueError: an unknown rule, or a concrete batch size that isn't positive.

    References:
      Goyal et al., 2017, `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_;
      Malladi et al., 2022, `On the SDEs and Scaling Rules for Adaptive Gradient Algorithms
      <https://arxiv.org/abs/2205.10287>`_

    >>> [float(learning_rate_factor(rule, 1024, 256)) for rule in ("linear", "sqrt", "none")]
    [4.0, 2.0, 1.0]
    """
    for name, value in dict(batch_size=batch_size, base_batch_size=base_batch_size).items():
        if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
            raise ValueError(f"{name} must be above 0, got {value}")
    ratio = jnp.asarray(batch_size, float) / jnp.asarray(base_batch_size, float)
    match rule:
        case "linear":
            return ratio
        case "sqrt":
            return jnp.sqrt(ratio)
        case "power":
            return ratio**exponent
        case "none":
            return jnp.ones_like(ratio)
    raise ValueError(f"unknown learning-rate rule {rule!r}: use linear, sqrt, power or none")
