"""Learning-rate schedules: `name(peak, total, *, warmup=0, ...) -> optax.Schedule`.

Every schedule is a function of one count, in whatever unit the caller counts (examples, steps or tokens); all durations
(`total`, `warmup`, `decay`, `boundaries`) are in that unit and `total` includes the warmup. Between counts 0 and
`warmup` the rate rises linearly from 0 to what the schedule says at `warmup`; from `total` on it stays at its final
value. Fractions (`end_fraction`, ...) are of `peak`, so a sweep over `peak` scales the curve. Schedules are
jittable, work element by element on arrays of counts, return the default float dtype (float32; float64 under x64), and
are exact at both ends.

Left out, `total` is the run's length: the factory then returns a `run_length.OfRun`, of which an optimizer makes a
schedule when the loop tells it the length (`total_examples`). Only `constant` and `infinite` go on for ever without.

>>> import jax.numpy as jnp
>>> print(linear(0.5, 100, warmup=20)(jnp.array([0, 10, 20, 60, 100, 120])))
[0.   0.25 0.5  0.25 0.   0.  ]
>>> print(linear(0.5, warmup=20).of(100)(10))
0.25
"""

import math
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from annotated_types import Gt, Le

from crescendo.optim.registry import SCHEDULES
from crescendo.optim.run_length import LengthError, ends_with_the_run, with_total
from crescendo.optim.schedule_parts import (
    Shape,
    between,
    check_length,
    decay_weight,
    half_cosine,
    progress,
    with_warmup,
)
from crescendo.ranges import Decay, Fraction, NotNegative, Positive


@SCHEDULES
def constant(peak: NotNegative, total: Positive | None = None, *, warmup: NotNegative = 0) -> optax.Schedule:
    """`peak` after the warmup, for ever; `total` is only checked.

    Raises:
      ValueError: as `linear`.

    >>> float(constant(0.5)(7))
    0.5
    """
    check_length(math.inf if total is None else total, warmup)
    return with_warmup(lambda t: peak * jnp.ones_like(t), warmup)


@SCHEDULES
@ends_with_the_run
def linear(
    peak: NotNegative, total: Positive, *, warmup: NotNegative = 0, end_fraction: Fraction = 0.0
) -> optax.Schedule:
    """Linear decay: eta(t) = peak * ((1 - u) + end_fraction * u), u = (t - warmup) / (total - warmup).

    Decay to 0 is the baseline that any other schedule must beat.

    Args:
      peak: the highest rate.
      total: the count at which the decay ends; None: the run's end.
      warmup: the count at which the linear rise from 0 ends.
      end_fraction: the final rate, as a fraction of `peak`.

    Raises:
      ValueError: a rate or fraction that is negative, NaN or out of range.
      LengthError: parts that don't fit `total`; without one they are compared with the run's length when it is known.

    References:
      Defazio et al., 2023, `Optimal Linear Decay Learning Rate Schedules <https://arxiv.org/abs/2310.07831>`_

    >>> float(linear(1.0, 10, end_fraction=0.5)(5))
    0.75
    """
    check_length(total, warmup)
    return with_warmup(lambda t: peak * between(1.0, end_fraction, progress(t, warmup, total)), warmup)


@SCHEDULES
@ends_with_the_run
def cosine(
    peak: NotNegative, total: Positive, *, warmup: NotNegative = 0, end_fraction: Fraction = 0.0
) -> optax.Schedule:
    """Half a cosine: eta(t) = peak * (end_fraction + (1 - end_fraction) * (1 + cos(pi u)) / 2), u as in `linear`.

    Args and Raises: as `linear`.

    References:
      Loshchilov and Hutter, 2017, `SGDR <https://arxiv.org/abs/1608.03983>`_

    >>> print(f"{cosine(1.0, 4)(1):.4f}")
    0.8536
    """
    check_length(total, warmup)
    return with_warmup(lambda t: peak * between(1.0, end_fraction, half_cosine(progress(t, warmup, total))), warmup)


@SCHEDULES
@ends_with_the_run
def wsd(
    peak: NotNegative,
    total: Positive,
    *,
    warmup: NotNegative = 0,
    decay: NotNegative | None = None,
    shape: Shape = "linear",
    end_fraction: Fraction = 0.0,
    half_lives: NotNegative = 5.0,
) -> optax.Schedule:
    """Warmup, stable, decay: constant at `peak`, then eta = peak * (f + (1 - f) * w(u)) over the last `decay` counts.

    With u from 0 to 1 over the decay and f = `end_fraction`, w is, by `shape`:

    - `linear`: 1 - u,
    - `sqrt`: 1 - sqrt(u),
    - `exponential`: 2^(-half_lives * u), which does *not* reach 0.

    Args:
      peak: the stable rate.
      total: the count at which the decay ends; None: the run's end.
      warmup: the count at which the linear rise from 0 ends.
      decay: length of the decay; None: a tenth of `total`.
      shape: `linear`, `sqrt` or `exponential`.
      end_fraction: the rate that the decay tends to, as a fraction of `peak`.
      half_lives: how many times the exponential decay halves the rate.

    Raises:
      ValueError: as `linear`, and an unknown shape.

    References:
      Hu et al., 2024, `MiniCPM <https://arxiv.org/abs/2404.06395>`_;
      Hägele et al., 2024, `Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations
      <https://arxiv.org/abs/2405.18392>`_ (1 - sqrt)

    >>> schedule = wsd(1.0, 100, decay=20, shape="sqrt")
    >>> float(schedule(80)), float(schedule(85)), float(schedule(100))
    (1.0, 0.5, 0.0)
    """
    decay = total / 10 if decay is None else decay
    check_length(total, warmup, decay=decay)
    weight = decay_weight(shape, half_lives)
    return with_warmup(
        lambda t: peak * between(end_fraction, 1.0, weight(progress(t, total - decay, total))),
        warmup,
    )


@SCHEDULES
@ends_with_the_run
def rex(
    peak: NotNegative, total: Positive, *, warmup: NotNegative = 0, curvature: Decay = 0.5, end_fraction: Fraction = 0.0
) -> optax.Schedule:
    """Reflected exponential: w = z / ((1 - d) + d z), z = 1 - u, u as in `linear`, d = `curvature`.

    d = 0 is linear decay; the nearer d is to 1, the longer the rate stays high.

    Args:
      peak, total, warmup, end_fraction: as of `linear`.
      curvature: d, at least 0 and below 1.

    Raises: as `linear`, and for another `curvature`.

    References:
      Chen et al., 2022, `REX <https://arxiv.org/abs/2107.04197>`_

    >>> print(f"{rex(1.0, 4)(2):.4f}")
    0.6667
    """
    check_length(total, warmup)

    def schedule(t: jax.Array) -> jax.Array:
        z = 1 - progress(t, warmup, total)
        return peak * between(end_fraction, 1.0, z / ((1 - curvature) + curvature * z))

    return with_warmup(schedule, warmup)


@SCHEDULES
@ends_with_the_run
def power(
    peak: NotNegative,
    total: Positive,
    *,
    batch_size: Positive | None = None,
    tokens_per_count: Positive = 1,
    amplitude: Positive = 4.6,
    exponent: Annotated[float, Le(0)] = -0.51,
    warmup: NotNegative = 0,
    decay: NotNegative | None = None,
    shape: Shape = "linear",
    end_fraction: Fraction = 0.0,
) -> optax.Schedule:
    """A power law in the tokens seen: eta(n) = min(peak, batch_size * amplitude * n^exponent), then a decay.

    n = t * `tokens_per_count`. Over the last `decay` counts the rate goes from its value there to `end_fraction` of
    that value, as in `wsd`. Meant for models parametrised by muP. The rule itself says how the rate follows the batch,
    so no coupling is applied to it: told the present batch, an optimizer reads `schedule.at_batch_size(batch)`.

    Args:
      peak: the cap (the paper's is 0.02).
      total: the count at which the decay ends; None: the run's end.
      batch_size: the batch in sequences, for callers that don't tell the present one (a training loop does); None: the
        schedule can only be read by `at_batch_size`.
      tokens_per_count: tokens in one count: 1 if the caller counts tokens, the sequence length if examples.
      amplitude: the paper's a, 4 to 4.6.
      exponent: the paper's b; at most 0.
      warmup: the count at which the linear rise from 0 ends.
      decay: length of the decay; None: a tenth of `total`.
      shape: `linear`, `sqrt` or `exponential`.
      end_fraction: the final rate, as a fraction of the rate at which the decay starts.

    Raises:
      ValueError: as `wsd`, and a batch size, tokens or amplitude that isn't positive, or an exponent above 0.

    References:
      Shen et al., 2024, `Power Scheduler <https://arxiv.org/abs/2408.13359>`_

    >>> schedule = power(0.02, 10_000_000_000, batch_size=128)
    >>> print(f"{schedule(1_000):.4f} {schedule(1_000_000_000):.4f}")
    0.0200 0.0151
    """
    decay = total / 10 if decay is None else decay
    check_length(total, warmup, decay=decay)
    weight = decay_weight(shape)

    def at_batch_size(batch_size: jax.typing.ArrayLike) -> optax.Schedule:
        """The schedule of a batch, which may be traced."""

        def schedule(t: jax.Array) -> jax.Array:
            tokens = jnp.minimum(t, jnp.asarray(total - decay, t.dtype)) * tokens_per_count
            stable = jnp.minimum(peak, batch_size * amplitude * jnp.maximum(tokens, 1.0) ** exponent)
            return stable * between(end_fraction, 1.0, weight(progress(t, total - decay, total)))

        return with_warmup(schedule, warmup)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        if batch_size is None:
            raise ValueError(
                "the power schedule needs the batch: give it batch_size, or pass the extra argument batch_stats to "
                "update()"
            )
        return at_batch_size(batch_size)(count)

    schedule.at_batch_size = at_batch_size  # type: ignore[attr-defined]
    return schedule


@SCHEDULES
def infinite(
    peak: NotNegative,
    total: Positive | None = None,
    *,
    cooldown: Positive,
    warmup: NotNegative = 0,
    decay: NotNegative | None = None,
    constant_fraction: Fraction = 0.55,
    end_fraction: Annotated[float, Gt(0), Le(1)] = 0.1,
) -> optax.Schedule:
    """Warmup, half a cosine over `cooldown` counts to a constant rate, and an exponential anneal on demand.

    Without `total` the rate stays at c = constant_fraction * peak for ever. To anneal, go on from any checkpoint of the
    constant phase with `total` set: over the last `decay` counts eta = c * (end_fraction / constant_fraction)^u.

    Args:
      peak: the highest rate.
      total: the count at which the anneal ends; None: no anneal.
      cooldown: length of the cosine from `peak` to the constant rate; above 0.
      warmup: the count at which the linear rise from 0 ends.
      decay: length of the anneal; None: a tenth of `total`.
      constant_fraction: the constant rate, as a fraction of `peak`; the paper's is 0.55.
      end_fraction: the final rate, as a fraction of `peak`; above 0, which an exponential never reaches.

    Raises:
      ValueError: as `linear`, and a cooldown or an `end_fraction` of 0.

    References:
      Ibrahim et al., 2024, `Simple and Scalable Strategies to Continually Pre-train Large Language Models
      <https://arxiv.org/abs/2403.08763>`_

    >>> schedule = infinite(1.0, warmup=10, cooldown=10, constant_fraction=0.5)
    >>> float(schedule(10)), float(schedule(20)), float(schedule(10**9))
    (1.0, 0.5, 0.5)
    """
    horizon = math.inf if total is None else total
    decay = 0 if total is None else total / 10 if decay is None else decay
    check_length(horizon, warmup, cooldown=cooldown, decay=decay)
    if end_fraction > constant_fraction:
        raise ValueError(f"end_fraction must be at most constant_fraction {constant_fraction}, got {end_fraction}")

    def schedule(t: jax.Array) -> jax.Array:
        rate = peak * between(1.0, constant_fraction, half_cosine(progress(t, warmup, warmup + cooldown)))
        if total is None:
            return rate
        return rate * (end_fraction / constant_fraction) ** progress(t, total - decay, total)

    warmed = with_warmup(schedule, warmup)
    return warmed if total is None else with_total(warmed, total)


@SCHEDULES
@ends_with_the_run
def rewarm(
    peak: NotNegative,
    total: Positive,
    *,
    start: NotNegative = 0,
    warmup: NotNegative | None = None,
    start_fraction: Fraction = 0.0,
    end_fraction: Fraction = 0.1,
) -> optax.Schedule:
    """Warm up again and decay by half a cosine, for going on with a trained model on new data.

    Linear from start_fraction * peak at count `start` to `peak` over `warmup` counts, then half a cosine to
    end_fraction * peak at `total`.

    Args:
      peak: the highest rate.
      total: the count at which the decay ends (of the same clock as `start`); None: the run's end.
      start: the count at which the earlier training ended.
      warmup: length of the rise; None: a hundredth of total - start.
      start_fraction: the rate at `start`, as a fraction of `peak`.
      end_fraction: the final rate, as a fraction of `peak`.

    Raises:
      ValueError: as `linear`.

    References:
      Gupta et al., 2023, `Continual Pre-Training of Large Language Models: How to (re)warm your model?
      <https://arxiv.org/abs/2308.04014>`_

    >>> schedule = rewarm(1.0, 300, start=100, warmup=50)
    >>> float(schedule(100)), float(schedule(125)), float(schedule(150)), round(float(schedule(300)), 6)
    (0.0, 0.5, 1.0, 0.1)
    """
    warmup = (total - start) / 100 if warmup is None else warmup
    check_length(total, warmup, start=start)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count, float)
        rise = between(start_fraction, 1.0, progress(t, start, start + warmup))
        fall = between(1.0, end_fraction, half_cosine(progress(t, start + warmup, total)))
        return peak * jnp.where(t < jnp.asarray(start + warmup, t.dtype), rise, fall)

    return schedule


@SCHEDULES
@ends_with_the_run
def step(
    peak: NotNegative,
    total: Positive,
    *,
    boundaries: Sequence[NotNegative] | None = None,
    factor: Fraction = 0.1,
    warmup: NotNegative = 0,
) -> optax.Schedule:
    """A staircase: the rate is multiplied by `factor` at every boundary.

    Args:
      peak: the rate before the first boundary.
      total: the length of the run; the boundaries lie within it. None: what the loop says.
      boundaries: rising counts; None: 1/2 and 3/4 of `total`, as for ResNets on CIFAR-10.
      factor: from 0 to 1.
      warmup: the count at which the linear rise from 0 ends; at most the first boundary.

    Raises:
      ValueError: as `linear`, and boundaries that don't rise or lie outside (warmup, total).

    References:
      He et al., 2016, `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_

    >>> import jax.numpy as jnp
    >>> print(step(1.0, 100, factor=0.5)(jnp.array([49, 50, 75])))
    [1.   0.5  0.25]
    """
    edges = [total / 2, 3 * total / 4] if boundaries is None else list(boundaries)
    check_length(total, warmup)
    if edges != sorted(set(edges)) or any(not warmup <= edge < total for edge in edges):
        raise LengthError(f"boundaries must rise strictly from warmup {warmup} to below total {total}, got {edges}")

    def schedule(t: jax.Array) -> jax.Array:
        passed = sum((jnp.asarray(t >= jnp.asarray(edge, t.dtype), t.dtype) for edge in edges), jnp.zeros_like(t))
        return peak * jnp.asarray(factor, t.dtype) ** passed

    return with_warmup(schedule, warmup)
