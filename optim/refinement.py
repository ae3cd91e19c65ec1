"""Schedules that a run's own gradient norms suggest: record them, refine, run again.

Theory bounds the loss of the last iterate by the norms of the gradients on the way; the schedule that minimises the
bound, given the norms of an earlier run, is eta_t = w_t * sum_{p > t} w_p with w = ||g||_2^-2 for SGD and ||g||_1^-1
for Adam. Constant norms give linear decay to 0; what a refined schedule adds to it is a warmup and an anneal where the
norms call for them.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, MultipleOf

from crescendo.optim import measured
from crescendo.optim.precision import widen
from crescendo.optim.registry import SCHEDULES, TRANSFORMS
from crescendo.optim.run_length import OfRun, ends_with_the_run
from crescendo.optim.schedule_parts import check_length, with_warmup
from crescendo.ranges import INT32, NotNegative, Positive, checked


class RecordGradientNormsState(NamedTuple):
    """State of `record_gradient_norms`: sums over slots of `stride` steps each, float32[slots] but for the counts."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as optax's states do
    """Updates seen, int32[]."""
    stride: jax.Array
    """Updates a slot, int32[], a power of 2."""
    recorded: jax.Array
    """Updates with finite norms in each slot, float32[slots]."""
    clock: jax.Array
    l1: jax.Array
    l2: jax.Array


@TRANSFORMS
def record_gradient_norms(
    slots: Annotated[int, Ge(2), INT32, MultipleOf(2)] = 512,
) -> optax.GradientTransformationExtraArgs:
    """Keep the history of the gradient's l1 and l2 norms over all parameters; the updates pass unchanged.

    Chain it first, so that it sees the gradients. The state has a fixed size: when all slots are full, neighbours are
    merged and from then on each slot takes twice as many steps. Steps whose norms aren't finite are left out. Read the
    history with `recorded_norms`.

    Args:
      slots: an even number of at least 2; after n steps from slots / 2 + 1 to `slots` of them are in use (n, if fewer).

    Raises:
      ValueError: a number of slots that isn't even or below 2.

    >>> transform = record_gradient_norms()
    >>> state = transform.init(jnp.ones(2))
    >>> for step in range(3):
    ...     _, state = transform.update(jnp.array([3.0, -4.0]), state, examples_seen=32 * step)
    >>> print(recorded_norms(state))
    GradientNorms(clock=array([ 0., 32., 64.]), l1=array([7., 7., 7.]), l2=array([5., 5., 5.]))
    """

    def init(params: optax.Params) -> RecordGradientNormsState:
        del params
        zeros = jnp.zeros(slots, jnp.float32)
        return RecordGradientNormsState(jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32), zeros, zeros, zeros, zeros)

    def update(
        updates: optax.Updates,
        state: RecordGradientNormsState,
        params: optax.Params | None = None,
        *,
        examples_seen: jax.typing.ArrayLike | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, RecordGradientNormsState]:
        del params, extra_args
        wide = jax.tree.map(widen, updates)
        l1, l2 = optax.tree.norm(wide, ord=1), optax.tree.norm(wide)
        finite = jnp.isfinite(l1) & jnp.isfinite(l2)
        clock = state.count if examples_seen is None else examples_seen
        full = state.count >= slots * state.stride
        stride = jnp.where(full, 2 * state.stride, state.stride)
        slot = state.count // stride

        def add(history: jax.Array, value: jax.typing.ArrayLike) -> jax.Array:
            halved = jnp.zeros_like(history).at[: slots // 2].set(history.reshape(-1, 2).sum(axis=1))
            value = jnp.where(finite, jnp.asarray(value, history.dtype), 0)
            return jnp.where(full, halved, history).at[slot].add(value)

        return updates, RecordGradientNormsState(
            optax.safe_increment(state.count),
            stride,
            add(state.recorded, 1),
            add(state.clock, clock),
            add(state.l1, l1),
            add(state.l2, l2),
        )

    return optax.GradientTransformationExtraArgs(init, update)


class GradientNorms(NamedTuple):
    """A run's history of gradient norms, oldest first; float64[T] each."""

    clock: np.ndarray
    """`examples_seen` (or the step) as the update was told it; the mean over a slot's steps."""
    l1: np.ndarray
    l2: np.ndarray


Norms = GradientNorms | Sequence[float] | np.ndarray


def recorded_norms(opt_state: optax.OptState) -> GradientNorms:
    """The history that `record_gradient_norms` has recorded in an optimizer's state, without what wasn't finite.

    The newest slot is left out while it isn't full, because a step of it would weigh more than one of the others.

    Raises:
      ValueError: a state with no history, or with one of fewer than two finite norms.

    >>> optimizer = optax.chain(record_gradient_norms(), optax.sgd(0.1))
    >>> state = optimizer.init(jnp.ones(4))
    >>> for step in range(2):
    ...     _, state = optimizer.update(jnp.ones(4), state)
    >>> recorded_norms(state).l2
    array([2., 2.])
    """
    state = optax.tree_utils.tree_get(opt_state, "RecordGradientNormsState")
    if state is None:
        raise ValueError("the optimizer state holds no gradient norms: chain record_gradient_norms() first")
    state = jax.device_get(state)
    used = np.asarray(state.recorded[: int(state.count // state.stride)], np.float64)
    if np.count_nonzero(used) < 2:
        raise ValueError(f"only {np.count_nonzero(used)} finite gradient norms were recorded: at least 2 are needed")
    clock, l1, l2 = (np.asarray(x[: used.size], np.float64)[used > 0] for x in (state.clock, state.l1, state.l2))
    steps = used[used > 0]
    return GradientNorms(clock / steps, l1 / steps, l2 / steps)


def refine(norms: Norms, *, norm: str = "l1", smoothing: float = 0.1) -> np.ndarray:
    """The schedule's multipliers, eta_t ~ w_t * sum_{p > t} w_p, with maximum 1 and last value 0.

    w = ||g||_1^-1 for `l1` (Adam and its kin) and ||g||_2^-2 for `l2` (SGD), after a median filter over the norms.

    Args:
      norms: T gradient norms of an earlier run, of the kind that `norm` says, evenly spaced; or a `GradientNorms`.
      norm: `l1` or `l2`.
      smoothing: tau; the filter is 2 * floor(tau * T / 2) + 1 wide. 0: no filter.

    Returns:
      float64[T].

    Raises:
      ValueError: fewer than two norms, one that isn't positive and finite, norms that differ by so many orders of
        magnitude that the multipliers vanish, an unknown norm, or a smoothing outside [0, 1].

    References:
      Defazio et al., 2023, `Optimal Linear Decay Learning Rate Schedules and Further Refinements
      <https://arxiv.org/abs/2310.07831>`_, algorithm 1

    >>> print(refine([2.0, 2.0, 2.0, 2.0, 2.0]))
    [1.   0.75 0.5  0.25 0.  ]
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"unknown norm {norm!r}: use l1 (for Adam) or l2 (for SGD)")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be from 0 to 1, got {smoothing}: the paper's is 0.1")
    history = np.asarray(getattr(norms, norm) if isinstance(norms, GradientNorms) else norms, np.float64)
    if history.ndim != 1 or history.size < 2:
        raise ValueError(f"norms must be a sequence of at least 2, got shape {history.shape}: record a longer run")
    bad = ~(np.isfinite(history) & (history > 0))
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(f"norms must be positive and finite, got {history[at]} at {at}: leave such steps out")
    smooth = _median_filter(history, 2 * math.floor(smoothing * history.size / 2) + 1)
    weights = (smooth.min() / smooth) ** (1 if norm == "l1" else 2)
    multipliers = weights * np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    if not multipliers.max() > 0:
        raise ValueError(f"norms from {smooth.min()} to {smooth.max()} are too far apart to refine: smooth them more")
    return multipliers / multipliers.max()


@checked
def refined_schedule(
    peak: NotNegative,
    norms: Norms,
    total: Positive | None = None,
    *,
    warmup: NotNegative = 0,
    norm: str = "l1",
    smoothing: float = 0.1,
) -> optax.Schedule | OfRun:
    """peak * refine(norms), stretched over [0, total] and interpolated linearly; `peak` is to be tuned anew.

    Args:
      peak: the highest rate.
      norms: see `refine`; a `GradientNorms` is placed by its clock, anything else evenly.
      total: the count at which the rate is 0; None: the run's end, however long the recorded one was.
      warmup: an added linear rise from 0, if the refined schedule's own isn't enough.
      norm: `l1` or `l2`.
      smoothing: see `refine`.

    Raises:
      ValueError: as `refine` and `schedules.linear`.

    >>> float(refined_schedule(0.5, [1.0, 1.0, 1.0], 100)(50))
    0.25
    """
    fractions, multipliers = _curve(norms, norm, smoothing)
    return _interpolated(peak, total, warmup=warmup, fractions=fractions, multipliers=multipliers)


def save_refined(path: str | Path, norms: Norms, *, norm: str = "l1", smoothing: float = 0.1) -> None:
    """Write the curve of `refined_schedule` as a small JSON file, for `refined`.

    Raises:
      ValueError: as `refine`.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     save_refined(file.name, [2.0, 2.0, 2.0])
    ...     print(Path(file.name).read_text(), end="")
    {"fractions": [0.0, 0.5, 1.0], "multipliers": [1.0, 0.5, 0.0], "norm": "l1", "smoothing": 0.1}
    """
    fractions, multipliers = _curve(norms, norm, smoothing)
    content = {
        "fractions": fractions.tolist(),
        "multipliers": multipliers.tolist(),
        "norm": norm,
        "smoothing": smoothing,
    }
    written = measured.RefinedSchedule.model_validate(content).model_dump()
    Path(path).write_text(json.dumps(written) + "\n", encoding="utf-8")


@SCHEDULES
def refined(
    peak: NotNegative, total: Positive | None = None, *, path: str | Path, warmup: NotNegative = 0
) -> optax.Schedule | OfRun:
    """The refined schedule that `save_refined` wrote to `path`, with a peak and a length of its own.

    The curve is stretched over [0, total], whatever the length of the run that it was recorded in.

    Args:
      peak: the highest rate.
      total: where the rate is 0, in examples; None: the run's end.
      path: of the file.
      warmup: examples over which the rate rises.

    Raises:
      ValueError: a file that can't be read or isn't one, and as `schedules.linear`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_refined(f"{folder}/norms.json", [2.0, 2.0, 2.0])
    ...     schedule = refined(0.5, 100, path=f"{folder}/norms.json")
    >>> float(schedule(25))
    0.375
    """
    curve = measured.read(path, measured.RefinedSchedule, "schedule", "a refined schedule: write it with save_refined")
    fractions, multipliers = np.array(curve.fractions), np.array(curve.multipliers)
    return _interpolated(peak, total, warmup=warmup, fractions=fractions, multipliers=multipliers)


def _curve(norms: Norms, norm: str, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """Fractions of the run, from 0 to 1, and the multipliers there."""
    multipliers = refine(norms, norm=norm, smoothing=smoothing)
    if not isinstance(norms, GradientNorms):
        return np.linspace(0, 1, multipliers.size), multipliers
    clock = norms.clock - norms.clock[0]
    if not (np.diff(clock) > 0).all():
        raise ValueError("the clock of the norms doesn't rise: pass the norms of one run")
    return clock / clock[-1], multipliers


@ends_with_the_run
def _interpolated(
    peak: float, total: float, *, warmup: float, fractions: np.ndarray, multipliers: np.ndarray
) -> optax.Schedule:
    """The schedule through the given points, linear in between."""
    check_length(total, warmup)

    def schedule(t: jax.Array) -> jax.Array:
        x, y = jnp.asarray(fractions, t.dtype), jnp.asarray(multipliers, t.dtype)
        return peak * jnp.interp(t / jnp.asarray(total, t.dtype), x, y)

    return with_warmup(schedule, warmup)


def _median_filter(x: np.ndarray, width: int) -> np.ndarray:
    """A running median: the right end is reflected, so that a trend goes on to the end, and the left end repeated."""
    import scipy.ndimage  # takes a third of a second to import

    padded = np.pad(x, (0, 2 * width), mode="reflect")
    return scipy.ndimage.median_filter(padded, size=width, mode="nearest")[: x.size]
