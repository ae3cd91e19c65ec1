"""Batch-size policies that grow the batch: by plan, by a measured curve, or by what the gradients say.

Each names the coupling of the learning rate that belongs to it, to be given to `adaptive_batch_size`. All sizes are
rungs of a ladder that starts at the initial size and doubles, so whatever divides the first divides all of them.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from crescendo.optim import measured
from crescendo.optim.batch_size import BatchSizePolicy, BatchStats, by_threshold, by_tokens
from crescendo.optim.noise_scale import Averages, add_microbatches, add_norm_layers, excess, no_averages, read_averages
from crescendo.optim.registry import POLICIES
from crescendo.ranges import INT32, Count, Decay, NotNegative, Positive, Start, checked


@checked
def doubling_ladder(start: Count, cap: Count) -> tuple[int, ...]:
    """start, 2 start, 4 start, ..., up to `cap`, in examples.

    Raises:
      ValueError: a start below 1, or a cap under it.

    >>> doubling_ladder(6, 30)
    (6, 12, 24)
    """
    if cap < start:
        raise ValueError(f"cap = {cap} is under start = {start}: raise the cap or lower the start")
    return tuple(start * 2**i for i in range((cap // start).bit_length()))


@POLICIES
def geometric_warmup(start: Count, end: Count, *, warmup_examples: Start) -> BatchSizePolicy:
    r"""B = start (end / start)^(t / warmup), rounded down to the ladder: the batch doubles at even intervals.

    With t the examples seen: `end` is reached at `warmup_examples`. Coupling: "sqrt" for Adam and its kin, "linear" for
    SGD; both hold while the batch is below the critical batch size.

    Args:
      start: the initial batch size, in examples.
      end: the final one, `start` times a power of 2.
      warmup_examples: when it is reached, on the clock.

    Raises:
      ValueError: an end under the start or between two rungs, or a warmup shorter than one example a doubling.

    References:
      Smith et al., 2018, `Don't Decay the Learning Rate, Increase the Batch Size <https://arxiv.org/abs/1711.00489>`_

    >>> policy = geometric_warmup(2, 16, warmup_examples=300)
    >>> [int(policy.update((), BatchStats(jnp.int32(t), jnp.int32(0), *[None] * 4))[0]) for t in (0, 99, 100, 300)]
    [2, 2, 4, 16]
    """
    sizes = doubling_ladder(start, end)
    if sizes[-1] != end:
        raise ValueError(f"end = {end} is not start = {start} times a power of 2: use {sizes[-1]} or {2 * sizes[-1]}")
    doublings = len(sizes) - 1
    if warmup_examples < doublings:
        raise ValueError(f"warmup_examples = {warmup_examples} is too short for {doublings} doublings: lengthen it")
    starts = [-(-warmup_examples * i // doublings) if i else 0 for i in range(len(sizes))]
    return by_threshold(sizes, starts, "geometric warmup")


@POLICIES
def critical_batch_following(
    curve: str | Path | Mapping[str, Any],
    start: Count,
    cap: Count,
    *,
    sequence_length: Count | None = None,
    fingerprint: str | None = None,
    lower_bound: bool = False,
) -> BatchSizePolicy:
    """Doubles B when the measured critical batch size exceeds 2 B (Merrill et al.'s batch-size warmup).

    Between its points the curve is taken as linear in tokens; up to the first nothing is known and nothing doubles, and
    after the last it stays. The batch never shrinks, also where the curve falls, and `sizes` are those that it reaches.
    Coupling: "sqrt" (each doubling multiplies the learning rate by sqrt 2, under a schedule over tokens).

    Args:
      curve: a JSON file, or its content (`measured.CriticalBatchCurve`): `tokens`, increasing, `critical_batch_size` in
        examples at each, and, for `lower_bound`, `interval`, a pair [low, high] at each; `fingerprint`, of the model
        and data it was measured on.
      start: the initial batch size, in examples.
      cap: the batch never grows past it.
      sequence_length: tokens in an example; None: those of the data, which the training loop knows.
      fingerprint: the curve must carry it; None: any curve will do. The training loop compares the curve's with its own
        in any case (`BatchSizePolicy.measured_on`).
      lower_bound: read the lower ends of the intervals instead of the curve, to be careful.

    Raises:
      ValueError: a cap under the start; a curve that can't be read, is empty, doesn't increase in tokens, has values
        that are negative or not finite, fields that aren't a curve's, or another fingerprint.

    References:
      Merrill et al., 2025, `Critical Batch Size Revisited <https://arxiv.org/abs/2505.23971>`_

    >>> curve = {"tokens": [0, 1000], "critical_batch_size": [0.0, 40.0]}
    >>> policy = critical_batch_following(curve, 4, 64, sequence_length=10)  # passes 8 at 20 examples, 16 at 40
    >>> policy.sizes
    (4, 8, 16, 32)
    >>> [int(policy.update((), BatchStats(jnp.int32(t), jnp.int32(0), *[None] * 4))[0]) for t in (0, 20, 21, 41, 81)]
    [4, 4, 8, 16, 32]
    """
    sizes = doubling_ladder(start, cap)
    tokens, critical, measured_on = _read_curve(curve, fingerprint, lower_bound)
    doublings: list[float] = []
    for size in sizes[:-1]:
        passed_at = _first_above(tokens, critical, 2 * size)
        if passed_at is None:
            break
        doublings.append(passed_at)

    def of_rows(row_tokens: int) -> BatchSizePolicy:
        starts = itertools.accumulate([0, *(math.floor(at / row_tokens) + 1 for at in doublings)], max)
        reason = "critical batch size above twice the batch size"
        return by_threshold(sizes[: len(doublings) + 1], list(starts), reason)._replace(measured_on=measured_on)

    policy = by_tokens("critical_batch_following", of_rows, sequence_length)
    if doublings:
        return policy
    largest = f"the curve's largest value is {critical.max():.3g}, not above 2 start = {2 * start}"
    return _staying(policy, _too_near(start, cap) if len(sizes) == 1 else f"{largest}: lower the start")


def _first_above(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    """Where the line through the points first passes the level."""
    above = y > level
    if not above.any():
        return None
    i = int(np.argmax(above))
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (level - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def _read_curve(
    curve: str | Path | Mapping[str, Any], fingerprint: str | None, lower_bound: bool
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Tokens and critical batch sizes, checked, and the curve's fingerprint."""
    name = "the curve" if isinstance(curve, Mapping) else str(curve)
    content = measured.read(curve, measured.CriticalBatchCurve, "curve", "a curve of critical batch sizes: measure one")
    values: Sequence[float] = content.critical_batch_size
    if lower_bound:
        if content.interval is None:
            raise ValueError(f"{name} has no interval, of which lower_bound = True reads the lower ends: measure one")
        values = [low for low, _ in content.interval]
    if fingerprint is not None and content.fingerprint != fingerprint:
        raise ValueError(
            f"{name} was measured on another model or data (fingerprint {content.fingerprint}, not {fingerprint}): "
            f"measure it on this"
        )
    return np.array(content.tokens), np.array(values), content.fingerprint


def _too_near(start: int, cap: int) -> str:
    """Why a ladder has one rung only."""
    return f"cap = {cap} is below 2 start = {2 * start}: raise the cap or lower the start"


def _staying(policy: BatchSizePolicy, why: str) -> BatchSizePolicy:
    """The policy, and what comes of it for a loop's rows, with why it never changes the size."""
    of_rows = policy.for_rows
    if of_rows is None:
        return policy._replace(stays=why)
    return policy._replace(stays=why, for_rows=lambda tokens: of_rows(tokens)._replace(stays=why))


class NoiseScaleFollowingState(NamedTuple):
    """State of `noise_scale_following`: averages and the size decided last, in examples."""

    averages: Averages
    batch_size: jax.Array

    def report(self) -> dict[str, jax.Array]:
        """The noise scale that is followed and its standard error, in examples."""
        scale = read_averages(self.averages)
        return {"noise_scale": scale.value, "noise_scale_error": scale.standard_error}


class NormLayersFollowingState(NoiseScaleFollowingState):
    """The same from the normalisation layers."""

    def report(self) -> dict[str, jax.Array]:
        """Under the name of that noise scale."""
        return {f"norm_layers_{name}": value for name, value in super().report().items()}


@POLICIES
def noise_scale_following(
    start: Count,
    cap: Count,
    *,
    ratio: Positive = 1.0,
    hysteresis: NotNegative = 0.1,
    decay: Annotated[float, Gt(0), Lt(1)] = 0.99,
    confidence: NotNegative = 2.0,
    min_updates: Annotated[int, Ge(2), INT32] = 20,
    shrink: bool = False,
    source: Literal["gradient", "norm_layers"] = "gradient",
) -> BatchSizePolicy:
    """Keeps B near `ratio` times the gradient noise scale: doubles at ratio B_noise >= 2 B (1 + hysteresis).

    With `shrink` it also halves, at ratio B_noise <= B / (1 + hysteresis); between the two it stays. It moves one rung
    at a time, and only past doubt: B_noise >= c is tested as tr(Sigma) - c ||G||^2 >= `confidence` standard errors,
    which needs no ratio and so also sees noise in which the gradient drowns. At B = B_noise a step makes half the
    progress of one with an endless batch, and an example half of what it could. Coupling: "sqrt" for Adam and its kin,
    "linear" for SGD.

    Args:
      start: the initial batch size, in examples; at least 2 from "gradient", which compares a batch with its
        microbatches: a single one tells nothing, so the planner gives every batch two or more
        (`BatchSizePolicy.min_microbatches`).
      cap: the batch never grows past it.
      ratio: of the batch size to the noise scale.
      hysteresis: how far past a boundary the noise scale must be, so that noise doesn't move the size to and fro.
      decay: of the averages, per step.
      confidence: how many standard errors past a boundary the averages must be.
      min_updates: the first steps decide nothing, because the error itself isn't known yet.
      shrink: whether the batch may shrink.
      source: "gradient", or "norm_layers" for the normalisation layers' noise scale, known with one microbatch too.

    Raises:
      ValueError: a cap under the start, or an argument outside its range; at `update`, statistics that the loop doesn't
        measure.

    References:
      McCandlish et al., 2018, `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, eq. 2.7

    >>> policy = noise_scale_following(8, 64)
    >>> policy.sizes, policy.statistics, policy.min_microbatches
    ((8, 16, 32, 64), (), 2)
    """
    sizes = doubling_ladder(start, cap)
    add = add_microbatches if source == "gradient" else add_norm_layers
    state_of = NoiseScaleFollowingState if source == "gradient" else NormLayersFollowingState
    table, last = np.array(sizes, np.int32), len(sizes) - 1

    def past_doubt(value: jax.Array, error: jax.Array) -> jax.Array:
        certain = jnp.isfinite(error)
        return certain & (value >= confidence * jnp.where(certain, error, 0))

    def init() -> NoiseScaleFollowingState:
        return state_of(no_averages(), jnp.int32(start))

    def update(state: NoiseScaleFollowingState, stats: BatchStats) -> tuple[jax.Array, NoiseScaleFollowingState]:
        averages = add(state.averages, stats, decay)
        rung = _rung(table, state.batch_size)
        size = jnp.asarray(table)[rung].astype(jnp.float32)
        above, above_error = excess(averages, 2 * size * (1 + hysteresis) / ratio)
        below, below_error = excess(averages, size / (1 + hysteresis) / ratio)
        known = averages.updates >= min_updates
        grow = known & past_doubt(above, above_error)
        fall = known & past_doubt(-below, below_error) & shrink
        decided = jnp.asarray(table)[jnp.clip(rung + grow - fall, 0, last)]
        return decided, state_of(averages, decided)

    policy = BatchSizePolicy(init, update, sizes, "gradient noise scale", first_change_examples=min_updates * start)
    if not last:
        policy = _staying(policy, _too_near(start, cap))
    if source == "norm_layers":
        return policy._replace(statistics=("norm_layers",))
    return policy._replace(min_microbatches=2)


def _rung(sizes: np.ndarray, batch_size: jax.Array) -> jax.Array:
    """The number of a size on the ladder; of one between two, as another ladder's state may hold, that of the lower."""
    return jnp.maximum(jnp.sum(jnp.asarray(sizes) <= batch_size, dtype=jnp.int32) - 1, 0)


class NormTestState(NamedTuple):
    """State of `norm_test`: averages of the numerator and the denominator, and the size decided last, in examples."""

    numerator: jax.Array
    denominator: jax.Array
    batch_size: jax.Array


# By variant: what it reads beyond the microbatches' squared norms, and the reason in the log.
_NORM_TESTS: dict[str, tuple[tuple[str, ...], str]] = {
    "norm": ((), "norm test"),
    "inner_product": (("dot_products",), "inner-product test"),
    "coordinate": (("coordinates",), "coordinate-wise test"),
}


@POLICIES
def norm_test(
    start: Count,
    cap: Count,
    *,
    eta: Annotated[float, Gt(0), Le(1)] = 0.25,
    variant: Literal["norm", "inner_product", "coordinate"] = "norm",
    decay: Decay = 0.0,
) -> BatchSizePolicy:
    r"""AdAdaGrad's adaptive sampling: the batch grows until the gradient's variance is a given share of its norm.

    With g the mean gradient of the batch, g_i that of microbatch i of b examples, and an example's variance estimated
    without bias as b times the variance over the k microbatches, B becomes the first rung at or above

    - "norm": :math:`\mathrm{tr} \Sigma / (\eta^2 ||g||^2)`. Squared norms are enough, since
      sum_i ||g_i - g||^2 = sum_i ||g_i||^2 - k ||g||^2;
    - "inner_product": :math:`\mathrm{Var} \langle g_i, g \rangle / (\eta^2 ||g||^4)`: only noise along the gradient
      counts, so it asks for less. Needs the dot products, which a second pass over the batch computes;
    - "coordinate": :math:`\max_c \mathrm{Var}_c / (\eta^2 g_c^2)`: every entry of the gradient must pass. Needs a
      second pass too, and soon asks for the cap, because some entry of a large model's gradient is near 0.

    The batch never shrinks. A step with one microbatch decides nothing, so the planner gives every batch two or more
    (`BatchSizePolicy.min_microbatches`). ||g||^2 is ||G||^2 + tr(Sigma) / B in the mean, so near a minimum, where noise
    is all there is, one decision grows the batch by about 1 / eta^2. Coupling: "none" with `adagrad` and
    `adagrad_norm`, whose rate adapts (the paper's pairing); "sqrt" with Adam and its kin.

    Args:
      start: the initial batch size, in examples.
      cap: the batch never grows past it.
      eta: the share, above 0 and at most 1; the paper's are 0.1 to 0.5, and smaller ones ask for larger batches.
      variant: "norm", "inner_product" or "coordinate".
      decay: of averages of numerator and denominator over steps; 0, the paper's, trusts each step alone.

    Raises:
      ValueError: a cap under the start, an argument outside its range, an unknown variant; at `update`, statistics that
        the loop doesn't measure.

    References:
      Lau et al., 2024, `AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods
      <https://arxiv.org/abs/2402.11215>`_; Bollapragada et al., 2018, `Adaptive Sampling Strategies for Stochastic
      Optimization <https://arxiv.org/abs/1710.11258>`_

    >>> policy = norm_test(8, 64, eta=0.5)
    >>> # Two microbatches of 4 examples with tr(Sigma) = 12 and ||g||^2 = 3.5: 12 / (0.25 * 3.5) = 13.7
    >>> stats = BatchStats(
    ...     jnp.int32(0), jnp.int32(8), jnp.float32(1), jnp.float32(3.5), jnp.array([4.0, 6.0]), jnp.int32(2)
    ... )
    >>> print(policy.update(policy.init(), stats)[0])
    16
    """
    sizes = doubling_ladder(start, cap)
    statistics, reason = _NORM_TESTS[variant]
    table = np.array(sizes, np.int32)

    def terms(stats: BatchStats) -> tuple[jax.Array, jax.Array]:
        """Numerator and denominator of what B must reach times eta^2."""
        k = stats.microbatches
        examples, others = stats.batch_size / k, jnp.maximum(k - 1, 1)  # a single microbatch decides nothing
        if variant == "norm":
            deviations = jnp.sum(stats.microbatch_squared_norms) - k * stats.squared_norm
            return examples * deviations / others, stats.squared_norm
        if variant == "inner_product":
            dots = _required(stats.microbatch_dot_products, statistics)
            used = jnp.arange(dots.shape[0]) < k
            deviations = jnp.sum(jnp.where(used, jnp.square(dots - stats.squared_norm), 0))
            return examples * deviations / others, jnp.square(stats.squared_norm)
        # Infinite where an entry is 0: a number beyond every cap keeps the averages finite.
        return jnp.minimum(_required(stats.coordinate_variance_ratio, statistics), 1e30), jnp.float32(1)

    def init() -> NormTestState:
        return NormTestState(jnp.float32(0), jnp.float32(0), jnp.int32(start))

    def update(state: NormTestState, stats: BatchStats) -> tuple[jax.Array, NormTestState]:
        numerator, denominator = terms(stats)
        usable = (stats.microbatches > 1) & jnp.isfinite(numerator) & jnp.isfinite(denominator)

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(usable, decay * old + (1 - decay) * jnp.maximum(new, 0), old)

        # Both averages start from 0, which cancels in their ratio.
        averages = average(state.numerator, numerator), average(state.denominator, denominator)
        # No gradient and no noise ask for nothing, noise alone for the last rung, as what no rung is high enough for.
        denominator = jnp.where(averages[0] > 0, eta**2 * averages[1], 1)
        required = averages[0] / denominator
        wanted = jnp.sum(jnp.asarray(table)[:-1] < jnp.where(usable, required, 0), dtype=jnp.int32)
        decided = jnp.asarray(table)[jnp.maximum(_rung(table, state.batch_size), wanted)]
        return decided, NormTestState(*averages, decided)

    policy = BatchSizePolicy(init, update, sizes, reason, statistics, min_microbatches=2)
    return policy if len(sizes) > 1 else _staying(policy, _too_near(start, cap))


def _required(value: jax.Array | None, statistics: tuple[str, ...]) -> jax.Array:
    """The statistic, which the loop must have measured."""
    if value is None:
        raise ValueError(f"this norm test needs the statistic {statistics[0]!r}: have the loop measure it")
    return value
