r"""The gradient noise scale: how noisy an example's gradient is, in examples.

With G the true gradient and Sigma the covariance of an example's gradient, the mean gradient of b examples has
E ||g_b||^2 = ||G||^2 + tr(Sigma) / b. Two batch sizes give two equations, so the squared norms of a batch and of its
parts estimate both unknowns without bias, at any sizes:

.. math::

  \mathcal{G} = \frac{B ||g_B||^2 - b ||g_b||^2}{B - b}, \qquad
  \mathcal{S} = \frac{||g_b||^2 - ||g_B||^2}{1/b - 1/B}, \qquad
  B_{simple} = \frac{\mathrm{EMA}(\mathcal{S})}{\mathrm{EMA}(\mathcal{G})}

An estimate is unbiased but the ratio of two isn't, so each is averaged first and divided then. Examples are rows of
about equal weight in the loss (packed rows are).

References:
  McCandlish et al., 2018, `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_;
  Gray et al., 2024, `Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in
  Transformers <https://arxiv.org/abs/2411.00999>`_
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crescendo.optim.batch_size import BatchStats
from crescendo.optim.masks import LayerAxis, Path, layer_axes, leaves_with_paths
from crescendo.optim.precision import squares
from crescendo.optim.registry import TRANSFORMS
from crescendo.ranges import Decay

Number = jax.Array | float


class NoiseScale(NamedTuple):
    """An estimate of the noise scale; float32 scalars. Before the first estimate the averages are 0, the rest infinite.

    Attributes:
      value: tr(Sigma) / ||G||^2, in examples; infinite while the average of ||G||^2 isn't positive.
      standard_error: of `value`, in examples; infinite while there are too few estimates to tell.
      squared_gradient: the average of the estimates of ||G||^2; may be negative.
      trace: that of tr(Sigma).
    """

    value: jax.Array
    standard_error: jax.Array
    squared_gradient: jax.Array
    trace: jax.Array


class Averages(NamedTuple):
    """Exponential moving averages from 0 of (tr(Sigma), ||G||^2) estimates and of their products, not yet corrected.

    Few arrays rather than many scalars: on a GPU each array of a state costs a kernel.

    Attributes:
      updates: int32, how many estimates there were.
      weights: float32 `[2]`, the sums of their weights and of the squares of these.
      moments: float32 `[5, ...]`, the averages of s, g, s^2, s g and g^2, with s for tr(Sigma) and g for ||G||^2.
    """

    updates: jax.Array
    weights: jax.Array
    moments: jax.Array


def no_averages(shape: tuple[int, ...] = ()) -> Averages:
    """Averages of nothing yet, one for each entry of `shape`."""
    return Averages(jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.float32), jnp.zeros((5, *shape), jnp.float32))


def estimate(
    large: jax.Array, small: jax.Array, large_examples: Number, small_examples: Number
) -> tuple[jax.Array, jax.Array]:
    """The unbiased estimates (||G||^2, tr(Sigma)) from squared norms at two sizes; 0 where the sizes are equal.

    Args:
      large: ||g_B||^2, float32[...].
      small: ||g_b||^2, averaged over parts of the batch, float32[...].
      large_examples: B.
      small_examples: b.

    >>> squared_gradient, trace = estimate(jnp.float32(3.5), jnp.float32(5.0), 8.0, 4.0)  # 2 + 12 / 8 and 2 + 12 / 4
    >>> print(squared_gradient, trace)
    2.0 12.0
    """
    differ = jnp.asarray(large_examples != small_examples)
    gradient = (large_examples * large - small_examples * small) / jnp.where(differ, large_examples - small_examples, 1)
    trace = (small - large) / jnp.where(differ, 1 / small_examples - 1 / large_examples, 1)
    return jnp.where(differ, gradient, 0), jnp.where(differ, trace, 0)


def add_estimate(
    averages: Averages,
    large: jax.Array,
    small: jax.Array,
    large_examples: Number,
    small_examples: Number,
    decay: Number,
) -> Averages:
    """`averages` with one more estimate (see `estimate`); unchanged where b >= B or a squared norm isn't finite."""
    g, s = estimate(large, small, large_examples, small_examples)
    usable = (small_examples < large_examples) & jnp.all(jnp.isfinite(large) & jnp.isfinite(small))
    moments = decay * averages.moments + (1 - decay) * jnp.stack([s, g, s * s, s * g, g * g])
    rates = jnp.stack([jnp.asarray(decay, jnp.float32), jnp.square(jnp.asarray(decay, jnp.float32))])
    gained = jnp.stack([jnp.asarray(1 - decay, jnp.float32), jnp.square(jnp.asarray(1 - decay, jnp.float32))])
    return Averages(
        averages.updates + usable.astype(jnp.int32),
        jnp.where(usable, rates * averages.weights + gained, averages.weights),
        jnp.where(usable, moments, averages.moments),
    )


def excess(averages: Averages, scale: Number) -> tuple[jax.Array, jax.Array]:
    """tr(Sigma) - scale ||G||^2, above 0 where the noise scale is above `scale`, and its standard error.

    The variance of one step's value comes from the averaged products. That of a weighted mean is q times it, with
    q = sum w_i^2 / (sum w_i)^2, and q / (1 - q) because the mean is estimated too. Steps count as independent; a drift
    from step to step widens the error. Of nothing the first is 0; of nothing and of a single estimate the error is
    infinite.
    """
    trace, gradient, tt, tg, gg = _means(averages)
    mean = trace - scale * gradient
    variance = jnp.maximum(tt - 2 * scale * tg + scale**2 * gg - mean**2, 0)
    q = averages.weights[1] / _weight(averages) ** 2
    # Of one estimate alone q is 1, but for rounding.
    several = (averages.weights[0] > 0) & (q <= 1 - 1e-5)
    return mean, jnp.where(several, jnp.sqrt(variance * q / jnp.where(several, 1 - q, 1)), jnp.inf)


def read_averages(averages: Averages) -> NoiseScale:
    """The noise scale r = S / G, and its standard error by the delta method: that of s - r g, over G."""
    trace, gradient = _means(averages)[:2]
    bounded = gradient > 0
    divisor = jnp.where(bounded, gradient, 1)
    ratio = jnp.maximum(trace, 0) / divisor
    _, error = excess(averages, ratio)
    return NoiseScale(jnp.where(bounded, ratio, jnp.inf), jnp.where(bounded, error / divisor, jnp.inf), gradient, trace)


def _weight(averages: Averages) -> jax.Array:
    """What the moments are divided by to get means; 1 where there are none."""
    return jnp.where(averages.weights[0] > 0, averages.weights[0], 1)


def _means(averages: Averages) -> jax.Array:
    """The moments, corrected for the zeros before the first estimate; 0 of nothing."""
    return averages.moments / _weight(averages)


Groups = Literal["layer", "parameter"] | Callable[[Path], str] | None
"""How parameters are grouped: "layer", "parameter", or a function from a path (a tuple of names) to a group's name."""


def layer_squared_norms(tree: optax.Updates, layer_axis: LayerAxis = None) -> jax.Array:
    """Squared norms by parameter and, where it stacks layers, by layer, in the order of the leaves; float32[n].

    >>> tree = {"blocks": {"kernel": jnp.ones((2, 3))}, "head": 2 * jnp.ones(3)}
    >>> print(layer_squared_norms(tree))
    [ 3.  3. 12.]
    """
    norms = [jnp.zeros(0, jnp.float32)]
    for leaf, axis in zip(jax.tree.leaves(tree), layer_axes(tree, layer_axis), strict=True):
        norm = jnp.sum(squares(leaf), axis=tuple(i for i in range(jnp.ndim(leaf)) if i != axis))
        norms.append(norm.reshape(-1).astype(jnp.float32))
    return jnp.concatenate(norms)


def group_indices(tree: Any, groups: Groups, layer_axis: LayerAxis = None) -> dict[str, list[int]]:
    """The entries of `layer_squared_norms(tree)` in each group, by the group's name.

    "layer" makes a group of every layer of a stack (`blocks/0`, `blocks/1`, ...) and of every other top-level name;
    "parameter" one of every parameter, all its layers together.

    Raises:
      ValueError: an unknown way to group.

    >>> tree = {"blocks": {"bias": jnp.ones((2, 3)), "kernel": jnp.ones((2, 3))}, "head": jnp.ones(3)}
    >>> group_indices(tree, "layer")
    {'blocks/0': [0, 2], 'blocks/1': [1, 3], 'head': [4]}
    >>> group_indices(tree, lambda path: "vectors" if path[-1] == "bias" else "matrices")
    {'vectors': [0, 1], 'matrices': [2, 3, 4]}
    """
    if not callable(groups) and groups not in ("layer", "parameter"):
        raise ValueError(f"groups = {groups!r} must be 'layer', 'parameter' or a function from a path to a name")
    indices: dict[str, list[int]] = {}
    entry = 0
    for (path, leaf), axis in zip(leaves_with_paths(tree), layer_axes(tree, layer_axis), strict=True):
        for layer in range(1 if axis is None else np.shape(leaf)[axis]):
            if callable(groups):
                name = groups(path)
            elif groups == "parameter":
                name = "/".join(path)
            else:
                name = path[0] if axis is None else f"{path[0]}/{layer}"
            indices.setdefault(name, []).append(entry)
            entry += 1
    return indices


def _group_matrix(tree: Any, groups: Groups, layer_axis: LayerAxis) -> np.ndarray:
    """float32[n, groups], 1 where an entry of `layer_squared_norms` is in a group."""
    indices = group_indices(tree, groups, layer_axis)
    matrix = np.zeros((sum(map(len, indices.values())), len(indices)), np.float32)
    for column, rows in enumerate(indices.values()):
        matrix[rows, column] = 1
    return matrix


class GradientNoiseScaleState(NamedTuple):
    """State of `gradient_noise_scale`: averages over everything, by group, and over the normalisation layers."""

    total: Averages
    groups: Averages | None
    norm_layers: Averages | None

    def report(self) -> dict[str, jax.Array]:
        """The noise scales over all parameters and their standard errors, in examples."""
        scales = {"noise_scale": self.total, "norm_layers_noise_scale": self.norm_layers}
        estimates = {name: read_averages(averages) for name, averages in scales.items() if averages is not None}
        values = {name: scale.value for name, scale in estimates.items()}
        return values | {f"{name}_error": scale.standard_error for name, scale in estimates.items()}


@TRANSFORMS
def gradient_noise_scale(
    decay: Decay = 0.99, *, groups: Groups = None, norm_layers: bool = False, layer_axis: LayerAxis = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps the gradient noise scale in its state, fed by the extra argument `batch_stats`; updates pass unchanged.

    Each step's estimates compare the batch with its microbatches, and are unbiased at that step's own sizes, so the
    batch size may change. A step that tells nothing leaves the state as it was: one microbatch, a norm that isn't
    finite, or no `batch_stats`. Read it with `noise_scale` and `group_noise_scales`.

    Args:
      decay: of the averages, per step; about 1 / (1 - decay) steps are averaged.
      groups: keep one for each group of parameters too; see `group_indices`. The loop must measure "layers".
      norm_layers: keep one of the normalisation layers' scales too, from their gradients per example: it follows the
        full one closely, up to a factor near 1, and is known with a single microbatch. The loop must measure
        "norm_layers".
      layer_axis: where layers are stacked; see `masks.layer_axes`.

    Raises:
      ValueError: a decay outside [0, 1), an unknown way to group; at `update`, statistics that the loop doesn't
        measure.

    >>> transform = gradient_noise_scale(decay=0.5)
    >>> state = transform.init(jnp.ones(2))
    >>> # Two microbatches of 4 examples, ||G||^2 = 2 and tr(Sigma) = 12.
    >>> stats = BatchStats(
    ...     jnp.int32(0), jnp.int32(8), jnp.float32(1), jnp.float32(3.5), jnp.array([4.0, 6.0]), jnp.int32(2)
    ... )
    >>> _, state = transform.update(jnp.ones(2), state, batch_stats=stats)
    >>> print(noise_scale(state).value)
    6.0
    """
    if groups is not None:
        group_indices({}, groups)

    def init(params: optax.Params) -> GradientNoiseScaleState:
        by_group = None if groups is None else no_averages((len(group_indices(params, groups, layer_axis)),))
        return GradientNoiseScaleState(no_averages(), by_group, no_averages() if norm_layers else None)

    def update(
        updates: optax.Updates,
        state: GradientNoiseScaleState,
        params: optax.Params | None = None,
        *,
        batch_stats: BatchStats | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, GradientNoiseScaleState]:
        del params, extra_args
        if batch_stats is None:
            return updates, state
        total = add_microbatches(state.total, batch_stats, decay)
        by_group, of_norms = state.groups, state.norm_layers
        if by_group is not None:
            large, small = batch_stats.layer_squared_norms, batch_stats.microbatch_layer_squared_norms
            if large is None or small is None:
                raise ValueError("groups need the squared norms by layer: have the loop measure the statistic 'layers'")
            matrix = _group_matrix(updates, groups, layer_axis)
            by_group = add_estimate(
                by_group,
                large @ matrix,
                jnp.sum(small, axis=0) @ matrix / batch_stats.microbatches,
                batch_stats.batch_size,
                batch_stats.batch_size / batch_stats.microbatches,
                decay,
            )
        if of_norms is not None:
            of_norms = add_norm_layers(of_norms, batch_stats, decay)
        return updates, GradientNoiseScaleState(total, by_group, of_norms)

    return optax.GradientTransformationExtraArgs(init, update)


def add_microbatches(averages: Averages, stats: BatchStats, decay: Number) -> Averages:
    """`averages` with the estimate from a batch and its microbatches."""
    small = jnp.sum(stats.microbatch_squared_norms) / stats.microbatches
    return add_estimate(
        averages, stats.squared_norm, small, stats.batch_size, stats.batch_size / stats.microbatches, decay
    )


def add_norm_layers(averages: Averages, stats: BatchStats, decay: Number) -> Averages:
    """`averages` with the estimate from a batch and its examples, over the normalisation layers' scales alone.

    Raises:
      ValueError: statistics without them.
    """
    large, small = stats.norm_squared_norm, stats.norm_example_squared_norm
    if large is None or small is None:
        raise ValueError(
            "the normalisation layers' noise scale needs their gradients per example: have the loop measure the "
            "statistic 'norm_layers'"
        )
    return add_estimate(averages, large, small, stats.batch_size, 1, decay)


def noise_scale(opt_state: optax.OptState, source: str = "gradient") -> NoiseScale:
    """What `gradient_noise_scale` has estimated so far, from the state of a chain with it.

    Args:
      opt_state: the state.
      source: "gradient", from the microbatches, or "norm_layers".

    Raises:
      ValueError: an unknown source, or a state that doesn't keep it.

    >>> print(noise_scale(gradient_noise_scale().init(jnp.ones(2))).value)
    inf
    """
    if source not in ("gradient", "norm_layers"):
        raise ValueError(f"source = {source!r} must be 'gradient' or 'norm_layers'")
    state = _state(opt_state)
    if source == "norm_layers":
        if state.norm_layers is None:
            raise ValueError(
                "the state keeps no noise scale of norm layers: use gradient_noise_scale(norm_layers=True)"
            )
        return read_averages(state.norm_layers)
    return read_averages(state.total)


def group_noise_scales(
    opt_state: optax.OptState, params: optax.Params, groups: Groups, *, layer_axis: LayerAxis = None
) -> dict[str, NoiseScale]:
    """The noise scale of each group of parameters, by its name.

    Args:
      opt_state: a state with `gradient_noise_scale(groups=groups)`.
      params: the parameters or their shapes.
      groups: as given to the transform.
      layer_axis: as given to the transform.

    Raises:
      ValueError: a state that keeps no groups, or others.

    >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    >>> list(group_noise_scales(gradient_noise_scale(groups="layer").init(params), params, "layer"))
    ['a', 'b']
    """
    averages, names = _state(opt_state).groups, list(group_indices(params, groups, layer_axis))
    if averages is None:
        raise ValueError("the state has no groups: use gradient_noise_scale(groups=...)")
    if averages.moments.shape[1:] != (len(names),):
        raise ValueError(
            f"the state keeps {averages.moments[0].size} groups, these are {len(names)}: pass what the transform had"
        )
    read = read_averages(averages)
    return {name: NoiseScale(*(x[i] for x in read)) for i, name in enumerate(names)}


def required_statistics(opt_state: optax.OptState) -> set[str]:
    """The members of `batch_size.STATISTICS` that the transforms of a state, or of its shapes, will ask the loop for.

    >>> required_statistics(gradient_noise_scale(norm_layers=True).init(jnp.ones(2)))
    {'norm_layers'}
    """
    required = set()
    for state in _states(opt_state):
        required |= {"layers"} if state.groups is not None else set()
        required |= {"norm_layers"} if state.norm_layers is not None else set()
    return required


def _states(opt_state: optax.OptState) -> list[GradientNoiseScaleState]:
    def is_ours(x: object) -> bool:
        return isinstance(x, GradientNoiseScaleState)

    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)]


def _state(opt_state: optax.OptState) -> GradientNoiseScaleState:
    states = _states(opt_state)
    if len(states) != 1:
        raise ValueError(f"the optimizer state holds {len(states)} noise scales: chain gradient_noise_scale() once")
    return states[0]
