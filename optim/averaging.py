"""The parameters to evaluate, where they aren't those that are trained: averages over the run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from crescendo.optim.precision import widen
from crescendo.optim.registry import COMBINATORS
from crescendo.optim.scaling import update_with_factor
from crescendo.optim.states import find_states
from crescendo.ranges import Positive


class AverageWeightsState(NamedTuple):
    """State of `average_weights`."""

    inner_state: optax.OptState
    weighted_sum: optax.Params
    """The average before its correction, at least float32; 0 before the first update."""
    weight: jax.Array
    """The sum of the weights in it, float32[]."""

    @property
    def takes_learning_rate_factor(self) -> bool:
        """See `scaling.update_with_factor`."""
        return True

    @property
    def takes_rate_multipliers(self) -> bool:
        """See `scaling.update_with_factor`."""
        return True


@COMBINATORS
def average_weights(
    optimizer: optax.GradientTransformation, examples: Positive
) -> optax.GradientTransformationExtraArgs:
    r"""`optimizer`, with an exponential average of the parameters after each update, for evaluation.

    .. math::

      d_t = e^{-B_t / \mathrm{examples}}, \qquad s \leftarrow d_t s + (1 - d_t) w, \qquad
      W \leftarrow d_t W + (1 - d_t), \qquad \bar w = s / W

    with B_t the batch, so the average reaches equally far back whatever the batch size does. `evaluation_params` reads
    it. Wrap what makes the complete update: the parameters are taken as `optax.apply_updates` will leave them.

    Args:
      optimizer: any optimizer; the updates pass unchanged.
      examples: the time constant, in examples; in updates, where the caller doesn't pass `batch_stats`.

    Raises:
      ValueError: a time constant that isn't above 0 and finite; at `update`, no params.

    References:
      Polyak and Juditsky, 1992, `Acceleration of Stochastic Approximation by Averaging
      <https://epubs.siam.org/doi/10.1137/0330046>`_

    >>> optimizer = average_weights(optax.sgd(1.0), 0.5)
    >>> params = jnp.array([4.0])
    >>> state = optimizer.init(params)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(jnp.ones(1), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(params, evaluation_params(state, params))  # (3 e^-2 + 2) / (e^-2 + 1)
    [2.] [2.1192029]
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> AverageWeightsState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)
        return AverageWeightsState(inner.init(params), zeros, jnp.zeros((), jnp.float32))

    def update(
        updates: optax.Updates,
        state: AverageWeightsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageWeightsState]:
        if params is None:
            raise ValueError("an average of the weights needs the parameters: call update(updates, state, params)")
        updates, inner_state = update_with_factor(inner, updates, state.inner_state, params, **extra_args)
        stats = extra_args.get("batch_stats")
        share = (1 if stats is None else stats.batch_size) / jnp.asarray(examples, jnp.float32)
        decay, gain = jnp.exp(-share), -jnp.expm1(-share)

        def averaged(s: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
            w = jnp.where(jnp.isfinite(u), p + u, p)  # one update that isn't finite must not end the average
            return decay.astype(s.dtype) * s + gain.astype(s.dtype) * w.astype(s.dtype)

        weighted_sum = jax.tree.map(averaged, state.weighted_sum, params, updates)
        return updates, AverageWeightsState(inner_state, weighted_sum, decay * state.weight + gain)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluation_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """The parameters to evaluate: the average that `schedule_free` or `average_weights` keeps, else `params`.

    Computed in float32 or better and rounded once, to the parameters' dtype. Under `optax.masked` and
    `optax.partition` each state speaks for its own parameters; of nested ones the outer counts. Before the first update
    they are `params`.

    Args:
      opt_state: any optimizer's state.
      params: the parameters, as they are trained.

    >>> from crescendo.optim.schedule_free import schedule_free
    >>> optimizer = schedule_free(0.5)
    >>> print(evaluation_params(optimizer.init(jnp.ones(2)), jnp.ones(2)))
    [1. 1.]
    """
    result = params
    for state in reversed(_averages(opt_state)):

        def point(average: Any, param: jax.Array, before: jax.Array, state: Any = state) -> jax.Array:
            if isinstance(average, optax.MaskedNode):
                return before
            own = jnp.result_type(param)
            dtype = jnp.promote_types(own, jnp.float32)
            if isinstance(state, AverageWeightsState):
                started = state.weight > 0
                corrected = average / jnp.where(started, state.weight, 1).astype(average.dtype)
                return jnp.where(started, corrected, before).astype(own)
            b1 = jnp.asarray(state.b1, dtype)
            return ((jnp.asarray(param, dtype) - (1 - b1) * average.astype(dtype)) / b1).astype(own)

        averages = state.weighted_sum if isinstance(state, AverageWeightsState) else state.z
        result = jax.tree.map(point, averages, params, result, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return result


def has_evaluation_params(opt_state: optax.OptState) -> bool:
    """Whether the parameters to evaluate are others than those that are trained.

    >>> has_evaluation_params(optax.sgd(0.1).init(jnp.ones(2)))
    False
    """
    return bool(_averages(opt_state))


def _averages(opt_state: optax.OptState) -> list[Any]:
    """The states that keep an average, the outermost first."""
    return find_states(opt_state, AverageWeightsState, contrib.ScheduleFreeState)
