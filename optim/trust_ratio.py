"""Layer-wise step sizes: an update scaled by the norm of the layer that it moves (the idea of LARS and LAMB)."""

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Le

from crescendo.optim.masks import LayerAxis, Mask, as_mask, layer_axes, leaves_with_paths
from crescendo.optim.precision import squares
from crescendo.optim.registry import TRANSFORMS
from crescendo.optim.states import spread
from crescendo.ranges import NotNegative

PhiClip = tuple[NotNegative, Annotated[float, Ge(0), Le(math.inf)]] | None


class TrustRatioState(NamedTuple):
    """State of the transforms with a trust ratio; `trust_ratios` gives it back by name."""

    trust_ratio: jax.Array
    """The last ratios, one per layer and parameter in the order of the leaves, 1 where excluded; float32[ratios]."""

    def report(self) -> dict[str, jax.Array]:
        """The least, the median and the largest ratio, without those of exactly 1 (excluded, or of a layer still 0).

        Where all are 1, so are these.
        """
        moved = self.trust_ratio != 1
        count = jnp.sum(moved)
        ordered = jnp.sort(jnp.append(jnp.where(moved, self.trust_ratio, jnp.inf), jnp.inf))  # of no layers too
        last = jnp.maximum(count - 1, 0)
        values = {
            "min": ordered[0],
            "median": (ordered[last // 2] + ordered[(last + 1) // 2]) / 2,
            "max": ordered[last],
        }
        return {f"trust_ratio_{name}": jnp.where(count > 0, value, 1) for name, value in values.items()}


@TRANSFORMS
def scale_by_layer_trust_ratio(
    *, phi_clip: PhiClip = None, trust_mask: Mask = None, layer_axis: LayerAxis = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scale every layer's update u to the norm of the layer: u * phi(||w||) / ||u||, phi(x) = min(max(x, lo), hi).

    Unlike `optax.scale_by_trust_ratio` it has a mask and phi, takes one ratio per layer where layers are stacked, and
    computes norms in float32 or better. A norm is that of the full layer however it is sharded, because under jit
    arrays are global. The ratio is 1 where either norm is 0.

    Args:
      phi_clip: (lo, hi) of phi; None: phi(x) = x.
      trust_mask: what is scaled; None: matrices (see `masks.is_matrix`), True: everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.

    Raises:
      ValueError: a clip that isn't 0 <= lo <= hi; at `init`, a mask that matches nothing; at `update`, no params.

    References:
      You et al., 2020, `Large Batch Optimization for Deep Learning <https://arxiv.org/abs/1904.00962>`_

    >>> transform = scale_by_layer_trust_ratio()
    >>> params = {"blocks": {"kernel": jnp.ones((2, 2, 2)) * jnp.array([1.0, 3.0])[:, None, None]}}
    >>> updates, state = transform.update(jax.tree.map(jnp.ones_like, params), transform.init(params), params)
    >>> print(state.trust_ratio, updates["blocks"]["kernel"][:, 0, 0])
    [1. 3.] [1. 3.]
    """
    check_phi_clip(phi_clip)

    def rule(update: jax.Array, param: jax.Array, axis: int | None, decay: Any) -> tuple[jax.Array, jax.Array]:
        del decay
        w, u = layer_norm(param, axis), layer_norm(update, axis)
        phi = w if phi_clip is None else jnp.clip(w, *phi_clip)
        return update, safe_ratio(w, u, phi, u)

    return layerwise(rule, trust_mask=trust_mask, decay_mask=True, layer_axis=layer_axis)


Rule = Callable[[jax.Array, jax.Array, int | None, Any], tuple[jax.Array, jax.Array]]


def layerwise(
    rule: Rule,
    *,
    trust_mask: Mask,
    decay_mask: Mask,
    layer_axis: LayerAxis,
    state_type: type[TrustRatioState] = TrustRatioState,
) -> optax.GradientTransformationExtraArgs:
    """The transform of a rule: (update, param, layer axis, decay) -> (update, ratio, whose other axes have size 1).

    The decay is None where `decay_mask` excludes, else the parameter's multiplier: 1 or what `decay_multipliers` says.
    """
    trusted, decayed = as_mask(trust_mask, layer_axis, name="trust_mask"), as_mask(decay_mask, layer_axis)

    def init(params: optax.Params) -> TrustRatioState:
        for mask in (trusted, decayed):
            mask(params)  # one that matches nothing raises
        leaves, axes = jax.tree.leaves(params), layer_axes(params, layer_axis)
        sizes = [1 if axis is None else jnp.shape(leaf)[axis] for leaf, axis in zip(leaves, axes, strict=True)]
        return state_type(jnp.ones(sum(sizes)))

    def update(
        updates: optax.Updates,
        state: TrustRatioState,
        params: optax.Params | None = None,
        *,
        decay_multipliers: Any = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, TrustRatioState]:
        del extra_args
        if params is None:
            raise ValueError("a trust ratio needs the parameters: call update(updates, state, params)")
        scaled, ratios = [], [jnp.ones(0)]
        leaves, treedef = jax.tree.flatten(updates)
        multipliers = spread(1.0 if decay_multipliers is None else decay_multipliers, updates)
        for g, w, axis, trust, decays, multiplier in zip(
            leaves,
            jax.tree.leaves(params),
            layer_axes(params, layer_axis),
            jax.tree.leaves(trusted(params)),
            jax.tree.leaves(decayed(params)),
            jax.tree.leaves(multipliers),
            strict=True,
        ):
            u, ratio = rule(g, w, axis, multiplier if decays else None)
            ratio = ratio if trust else jnp.ones_like(ratio)
            scaled.append((u * ratio).astype(jnp.result_type(g)))
            ratios.append(ratio.reshape(-1))
        state = state_type(jnp.concatenate(ratios).astype(state.trust_ratio.dtype))
        return jax.tree.unflatten(treedef, scaled), state

    return optax.GradientTransformationExtraArgs(init, update)


def trust_ratios(
    opt_state: optax.OptState, params: optax.Params, *, layer_axis: LayerAxis = None
) -> dict[str, jax.Array]:
    """The last trust ratios of an optimizer as metrics: path -> float32[layers], or float32[] where not stacked.

    Args:
      opt_state: a state which holds one `TrustRatioState`.
      params: the parameters (or their shapes).
      layer_axis: as given to the optimizer.

    Raises:
      ValueError: a state with no trust ratio, or of other parameters.

    >>> params = {"head": jnp.ones((2, 2))}
    >>> trust_ratios(scale_by_layer_trust_ratio().init(params), params)
    {'head': Array(1., dtype=float32)}
    """
    vector = optax.tree_utils.tree_get(opt_state, "trust_ratio")
    if vector is None:
        raise ValueError("the optimizer state holds no trust ratio: use lamb, lars or scale_by_layer_trust_ratio")
    ratios, start = {}, 0
    for (path, leaf), axis in zip(leaves_with_paths(params), layer_axes(params, layer_axis), strict=True):
        shape = () if axis is None else (np.shape(leaf)[axis],)
        stop = start + math.prod(shape)
        ratios["/".join(path)] = vector[start:stop].reshape(shape)
        start = stop
    if start != vector.size:
        raise ValueError(f"the state holds {vector.size} trust ratios but the parameters have {start} layers")
    return ratios


def layer_norm(x: jax.Array, axis: int | None) -> jax.Array:
    """The l2 norm over all axes but `axis`, which stay as axes of size 1; at least float32."""
    total = jnp.sum(squares(x), axis=tuple(i for i in range(jnp.ndim(x)) if i != axis), keepdims=True)
    # The root has no derivative at 0: there the norm counts as constant.
    return jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total)))


def safe_ratio(w: jax.Array, g: jax.Array, numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, and 1 where the norm w or g is 0."""
    usable = (w > 0) & (g > 0)
    return jnp.where(usable, numerator / jnp.where(usable, denominator, 1.0), 1.0)


def check_phi_clip(phi_clip: PhiClip) -> None:
    """Raises ValueError unless lo <= hi."""
    if phi_clip is not None and not phi_clip[0] <= phi_clip[1]:
        raise ValueError(f"phi_clip must be (lo, hi) with 0 <= lo <= hi, got {phi_clip}")
