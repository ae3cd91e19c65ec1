"""Schedule-Free AdamW: an average of the iterates in place of a decay of the rate."""

from typing import Annotated, Any

import jax
import optax
from annotated_types import Gt, Lt
from optax import contrib

from crescendo.optim.checks import Rate
from crescendo.optim.masks import LayerAxis, Mask
from crescendo.optim.precision import in_float32
from crescendo.optim.registry import OPTIMIZERS
from crescendo.optim.scaling import scale_by_parameter, with_learning_rate
from crescendo.optim.weight_decay import add_decayed_weights
from crescendo.ranges import Decay, NotNegative


@OPTIMIZERS
def schedule_free(
    learning_rate: Rate,
    *,
    b1: Annotated[float, Gt(0), Lt(1)] = 0.9,
    b2: Decay = 0.95,
    eps: NotNegative = 1e-8,
    weight_decay: NotNegative = 0.1,
    weight_power: NotNegative = 2.0,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.schedule_free_adamw` with a mask; evaluate at `evaluation_params`, not at the parameters.

    Meant for a constant rate after a warmup (`schedules.constant`).

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      b1: the average's share in the point at which gradients are taken; above 0.
      b2: decay of the second moment.
      eps: added to the denominator.
      weight_decay: multiplied by the learning rate.
      weight_power: an iterate weighs in the average as the largest rate so far to this power.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.
      moment_dtype: dtype in which the moments are stored; None: the parameters'.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, a mask that matches nothing.

    References:
      Defazio et al., 2024, `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_

    >>> import jax.numpy as jnp
    >>> update, _ = schedule_free(0.5).update(jnp.ones(()), schedule_free(0.5).init(jnp.ones(())), jnp.ones(()))
    >>> print(f"{update:.4f}")
    -0.5000
    """

    def make(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
        adam_without_momentum = optax.chain(
            optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
            add_decayed_weights(weight_decay, mask, layer_axis),
            scale_by_parameter(-rate),
        )
        rule = contrib.schedule_free(adam_without_momentum, rate, b1=b1, weight_lr_power=weight_power)

        def update(*args: Any, **extra_args: Any) -> tuple[optax.Updates, optax.OptState]:
            with jax.debug_nans(False):  # optax selects among two values of which one is NaN
                return rule.update(*args, **extra_args)

        return optax.GradientTransformationExtraArgs(rule.init, update)

    return in_float32(with_learning_rate(make, learning_rate), moment_dtype=moment_dtype)
