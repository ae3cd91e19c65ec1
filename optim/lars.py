"""LARS: SGD with momentum, at a step proportional to each layer's norm."""

from typing import Any

import jax
import optax

from crescendo.optim.checks import Rate
from crescendo.optim.masks import LayerAxis, Mask
from crescendo.optim.precision import in_float32
from crescendo.optim.registry import OPTIMIZERS, TRANSFORMS
from crescendo.optim.scaling import scale_by_learning_rate
from crescendo.optim.trust_ratio import TrustRatioState, layer_norm, layerwise, safe_ratio
from crescendo.ranges import Decay, NotNegative, Positive


class ScaleByLarsState(TrustRatioState):
    """State of `scale_by_lars`: the trust ratios, and the mark that `decay_multipliers` are read."""

    @property
    def reads_decay_multipliers(self) -> bool:
        """See `groups.scale_groups`."""
        return True


@TRANSFORMS
def scale_by_lars(
    *,
    weight_decay: NotNegative = 0.0,
    trust_coefficient: Positive = 0.001,
    mask: Mask = None,
    trust_mask: Mask = None,
    layer_axis: LayerAxis = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Decay and scale every layer's gradient: c * ||w|| / (||g|| + lambda ||w||) * (g + lambda w).

    The ratio is 1 where either norm is 0 and where `trust_mask` excludes; lambda is 0 where `mask` excludes. The norms
    are those of g and w, as in the paper; chaining `optax.add_decayed_weights` and `optax.scale_by_trust_ratio`
    takes the norm of g + lambda w.

    Args and Raises: as `lars`.

    >>> import jax.numpy as jnp
    >>> transform = scale_by_lars(weight_decay=0.5, trust_coefficient=1.0)
    >>> params = jnp.array([[2.0]])
    >>> print(transform.update(jnp.array([[1.0]]), transform.init(params), params)[0])
    [[2.]]
    """

    def rule(grad: jax.Array, param: jax.Array, axis: int | None, decay: Any) -> tuple[jax.Array, jax.Array]:
        strength = 0.0 if decay is None else weight_decay * decay
        w, g = layer_norm(param, axis), layer_norm(grad, axis)
        ratio = safe_ratio(w, g, trust_coefficient * w, g + strength * w)
        return grad if decay is None else grad + strength * param, ratio

    return layerwise(rule, trust_mask=trust_mask, decay_mask=mask, layer_axis=layer_axis, state_type=ScaleByLarsState)


@OPTIMIZERS
def lars(
    learning_rate: Rate,
    *,
    momentum: Decay = 0.9,
    nesterov: bool = False,
    weight_decay: NotNegative = 1e-4,
    trust_coefficient: Positive = 0.001,
    mask: Mask = None,
    trust_mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LARS, with the momentum after the scaling and the learning rate inside the momentum, as in the paper.

    .. math::

      v \leftarrow \mu v + \eta_t\, c \frac{\lVert w \rVert}{\lVert g \rVert + \lambda \lVert w \rVert} (g + \lambda w),
      \qquad w \leftarrow w - v

    per layer. Biases and norm scales are neither decayed nor scaled, i.e. they move by SGD at rate eta.

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      momentum: mu.
      nesterov: step by mu v + (what was added to v) instead of v.
      weight_decay: lambda.
      trust_coefficient: c.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      trust_mask: what is scaled by a trust ratio; likewise.
      layer_axis: where layers are stacked; see `masks.layer_axes`.
      moment_dtype: dtype in which the momentum is stored; None: the parameters'.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, a mask that matches
        nothing; at `update`, no params.

    References:
      You et al., 2017, `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_

    >>> import jax.numpy as jnp
    >>> optimizer = lars(1.0, weight_decay=0.0, trust_coefficient=0.5)
    >>> params = jnp.array([[3.0, -4.0]])
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> print(updates)
    [[-1.5  2. ]]
    """
    return in_float32(
        optax.chain(
            scale_by_lars(
                weight_decay=weight_decay,
                trust_coefficient=trust_coefficient,
                mask=mask,
                trust_mask=trust_mask,
                layer_axis=layer_axis,
            ),
            scale_by_learning_rate(learning_rate),
            optax.trace(decay=momentum, nesterov=nesterov),
        ),
        moment_dtype=moment_dtype,
    )
