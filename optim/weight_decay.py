"""Decoupled weight decay whose strength parameter groups can set, parameter by parameter."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crescendo.optim.masks import LayerAxis, Mask, as_mask
from crescendo.optim.states import spread


class WeightDecayState(NamedTuple):
    """State of `add_decayed_weights`: no arrays, but the mark that `decay_multipliers` are read."""

    @property
    def reads_decay_multipliers(self) -> bool:
        """See `groups.scale_groups`."""
        return True


def add_decayed_weights(
    weight_decay: jax.typing.ArrayLike, mask: Mask = None, layer_axis: LayerAxis = None
) -> optax.GradientTransformationExtraArgs:
    """u + lambda m w, where `mask` says so: `optax.add_decayed_weights` with our masks and a multiplier m.

    m is the extra argument `decay_multipliers`, a tree of floats or a prefix of one; 1 without it.

    Args:
      weight_decay: lambda.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.

    Raises:
      ValueError: at `init`, a mask that matches nothing; at `update`, no params.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}
    >>> transform = add_decayed_weights(0.5)
    >>> zeros, state = jax.tree.map(jnp.zeros_like, params), transform.init(params)
    >>> updates, _ = transform.update(zeros, state, params, decay_multipliers={"a": 1.0, "b": 0.1})
    >>> print(updates["a"], updates["b"])
    [[0.5]] [[0.05]]
    """

    def init(params: optax.Params) -> WeightDecayState:
        del params
        return WeightDecayState()

    def update(
        updates: optax.Updates,
        state: WeightDecayState,
        params: optax.Params | None = None,
        *,
        decay_multipliers: Any = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, WeightDecayState]:
        del extra_args
        if params is None:
            raise ValueError("weight decay needs the parameters: call update(updates, state, params)")
        if decay_multipliers is None:
            return jax.tree.map(lambda u, w: u + weight_decay * w, updates, params), state
        strengths = jax.tree.map(lambda m: weight_decay * m, spread(decay_multipliers, updates))
        return jax.tree.map(lambda u, w, s: (u + s * w).astype(jnp.result_type(u)), updates, params, strengths), state

    return optax.masked(optax.GradientTransformationExtraArgs(init, update), as_mask(mask, layer_axis))
