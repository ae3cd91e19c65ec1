"""Guards: which batches an optimizer leaves out, by a stated rule, and the wrapper that leaves them out.

A guard is pure, as a batch-size policy is: it is tested without a model, lives on the device, and decides the same
again when a run is resumed. What a training loop does where it keeps saying no (`Guard.patience`) is the loop's.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge

from crescendo.optim.batch_size import BatchStats
from crescendo.optim.registry import GUARDS
from crescendo.optim.states import find_states
from crescendo.ranges import INT32, Count, Positive

MAD_TO_DEVIATION = 1.4826
"""A normal variable's standard deviation in medians of its absolute deviations."""


class Guard(NamedTuple):
    """Which batches to leave out.

    Attributes:
      init: `() -> state`, a tree of arrays.
      update: `(state, stats: BatchStats) -> (passed, state)`, jittable; `passed` is a bool scalar. Where loss or norm
        isn't finite a training step leaves the state as it was.
      patience: after so many steps in a row that changed nothing, a training loop goes back to the last healthy
        checkpoint's parameters and optimizer, and on past the examples.
      max_rollbacks: how often it does so before it gives up, until the run has been healthy again.
    """

    init: Callable[[], Any]
    update: Callable[[Any, BatchStats], tuple[jax.Array, Any]]
    patience: int
    max_rollbacks: int


class GuardedState(NamedTuple):
    """State of `guarded`: the optimizer's own, the guard's own, and whether the latest batch passed (bool[])."""

    inner_state: optax.OptState
    guard_state: Any
    passed: jax.Array


def guarded(optimizer: optax.GradientTransformation, guard: Guard) -> optax.GradientTransformationExtraArgs:
    """`optimizer` without the batches that `guard` doesn't let pass: their update is 0, and its state stays.

    Args:
      optimizer: with all that is wrapped around it.
      guard: the rule.

    Raises:
      ValueError: (at `update`) no extra argument `batch_stats`.

    >>> optimizer = guarded(optax.sgd(0.5), guard(window=4))
    >>> state = optimizer.init(jnp.ones(1))
    >>> for loss in (3.0, 3.1, 3.0, 3.1, 9.0):
    ...     stats = BatchStats(jnp.int32(0), jnp.int32(8), jnp.float32(loss), jnp.float32(1), jnp.ones(1), jnp.int32(1))
    ...     update, state = optimizer.update(jnp.ones(1), state, batch_stats=stats)
    ...     print(update, state.passed)
    [-0.5] True
    [-0.5] True
    [-0.5] True
    [-0.5] True
    [0.] False
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> GuardedState:
        return GuardedState(inner.init(params), guard.init(), jnp.bool_(True))

    def update(
        updates: optax.Updates,
        state: GuardedState,
        params: optax.Params | None = None,
        *,
        batch_stats: BatchStats | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GuardedState]:
        if batch_stats is None:
            raise ValueError("a guard needs the extra argument batch_stats (BatchStats) in update()")
        passed, guard_state = guard.update(state.guard_state, batch_stats)
        updates, inner_state = inner.update(updates, state.inner_state, params, batch_stats=batch_stats, **extra_args)
        updates = jax.tree.map(lambda u: jnp.where(passed, u, 0).astype(u.dtype), updates)
        inner_state = jax.tree.map(lambda new, old: jnp.where(passed, new, old), inner_state, state.inner_state)
        return updates, GuardedState(inner_state, guard_state, passed)

    return optax.GradientTransformationExtraArgs(init, update)


def passed(opt_state: optax.OptState) -> jax.Array:
    """Whether the guard of a state let the latest batch pass, bool[]; True where there is none.

    >>> print(passed(optax.sgd(0.5).init(jnp.ones(1))))
    True
    """
    states = find_states(opt_state, GuardedState)
    return jnp.all(jnp.stack([state.passed for state in states])) if states else jnp.bool_(True)


class SpikeState(NamedTuple):
    """State of `guard`.

    Attributes:
      window: float32 `[2, window]`, the losses and the logarithms of the gradient norms that passed last, in a ring.
      count: int32, how many passed since the batch size changed.
      batch_size: int32, of the latest batch; 0 before the first.
      z: float32 `[2]`, how far the latest loss and norm lay above the median; 0 where that isn't known.
    """

    window: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as optax's states do
    batch_size: jax.Array
    z: jax.Array

    def report(self) -> dict[str, jax.Array]:
        """How far the latest loss and gradient norm lay above the median, in robust standard deviations."""
        return {"loss_z": self.z[0], "gradient_norm_z": self.z[1]}


@GUARDS
def guard(
    window: Annotated[int, Ge(4), INT32] = 128,
    *,
    z: Positive = 8.0,
    patience: Count = 5,
    max_rollbacks: Annotated[int, Ge(0), INT32] = 3,
) -> Guard:
    r"""Leaves a batch out whose loss or gradient norm is an outlier among the last `window` batches that passed.

    With x the loss, or the logarithm of the gradient norm (before clipping), and the medians over the window

    .. math::

      m = \mathrm{median}(x), \quad s = \max(1.4826 \, \mathrm{median} |x - m|, s_0), \quad
      z = \frac{x - m}{s}

    a batch is left out where either z is above the threshold; it doesn't enter the window, so that outliers don't widen
    it. The floor s_0 is 2% of \|m\| for the loss and 0.1 for the logarithm: a curve that hardly scatters is no reason
    to call a small step up an outlier. Nothing is left out before a quarter of the window is full, and the window
    begins anew where the batch size changes, since the scatter of both goes with it.

    This is OLMo's optimizer that skips steps (window of 128, mean and standard deviation of loss and norm) with medians
    in their place, and with the logarithm, as norms spread over factors. ZClip has the z-score of the norm too, and
    clips. Going back after `patience` batches in a row, and on past the examples, is PaLM's remedy.

    Args:
      window: how many batches are remembered.
      z: the threshold.
      patience: after so many steps in a row that changed nothing, a training loop goes back; see `Guard`.
      max_rollbacks: how often, before it gives up; 0: it never goes back.

    Raises:
      ValueError: an argument outside its range.

    References:
      `OLMo-core, SkipStepOptimizer <https://github.com/allenai/OLMo-core>`_; Kumar et al., 2025, `ZClip: Adaptive Spike
      Mitigation for LLM Pre-Training <https://arxiv.org/abs/2504.02507>`_; Chowdhery et al., 2022, `PaLM: Scaling
      Language Modeling with Pathways <https://arxiv.org/abs/2204.02311>`_, section 5.1

    >>> rule = guard(window=4)
    >>> state = rule.init()
    >>> for loss in (3.0, 3.1, 2.9, 7.0):
    ...     stats = BatchStats(jnp.int32(0), jnp.int32(8), jnp.float32(loss), jnp.float32(1), jnp.ones(1), jnp.int32(1))
    ...     passed, state = rule.update(state, stats)
    ...     print(passed, state.count)
    True 1
    True 2
    True 3
    False 3
    """

    def init() -> SpikeState:
        zeros = jnp.zeros((2, window), jnp.float32)
        return SpikeState(zeros, jnp.int32(0), jnp.int32(0), jnp.zeros(2, jnp.float32))

    def update(state: SpikeState, stats: BatchStats) -> tuple[jax.Array, SpikeState]:
        tiny = jnp.finfo(jnp.float32).tiny
        x = jnp.stack([stats.loss, 0.5 * jnp.log(jnp.maximum(stats.squared_norm, tiny))]).astype(jnp.float32)
        batch_size = jnp.asarray(stats.batch_size, jnp.int32)
        count = jnp.where(batch_size == state.batch_size, state.count, 0)
        filled = jnp.minimum(count, window)
        middle = median(state.window, filled)
        spread = MAD_TO_DEVIATION * median(jnp.abs(state.window - middle[:, None]), filled)
        least = jnp.stack([0.02 * jnp.abs(middle[0]), jnp.float32(0.1)])
        known = filled >= window // 4
        scores = jnp.where(known, (x - middle) / jnp.maximum(jnp.maximum(spread, least), tiny), 0)
        passed = jnp.all(scores <= z)
        entered = state.window.at[:, count % window].set(x)
        return passed, SpikeState(
            jnp.where(passed, entered, state.window), count + passed.astype(jnp.int32), batch_size, scores
        )

    return Guard(init, update, patience, max_rollbacks)


def median(values: jax.Array, count: jax.Array) -> jax.Array:
    """The (lower) medians of the first `count` values of each row, float32 `[rows]`; 0 of none.

    >>> print(median(jnp.array([[3.0, 1.0, 2.0, 9.0]]), jnp.int32(3)))
    [2.]
    """
    used = jnp.arange(values.shape[1]) < count
    middle = jnp.sort(jnp.where(used, values, jnp.inf), axis=1)[:, jnp.maximum(count - 1, 0) // 2]
    return jnp.where(count > 0, middle, 0)
