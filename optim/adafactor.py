"""Adafactor: Adam whose second moment is stored as a row and a column of every matrix."""

import jax
import optax

from crescendo.optim.checks import Rate
from crescendo.optim.masks import LayerAxis, Mask, as_mask
from crescendo.optim.precision import in_float32
from crescendo.optim.registry import OPTIMIZERS
from crescendo.optim.scaling import with_learning_rate
from crescendo.ranges import Count, Decay, NotNegative, Positive


@OPTIMIZERS
def adafactor(
    learning_rate: Rate,
    *,
    decay_rate: Decay = 0.8,
    clipping_threshold: Positive = 1.0,
    multiply_by_parameter_scale: bool = True,
    momentum: Decay | None = None,
    weight_decay: NotNegative = 0.0,
    min_dim_size_to_factor: Count = 128,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adafactor`: Adam with a factored second moment, clipped updates and, by default, steps relative to w.

    Clipping and parameter scale see a stack of layers as one block.

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      decay_rate: c of the second moment's decay at step t, 1 - t^-c.
      clipping_threshold: the largest root mean square that an update may have, before the rate.
      multiply_by_parameter_scale: the rate is relative to the root mean square of each parameter.
      momentum: of the updates; None: none.
      weight_decay: not multiplied by the learning rate.
      min_dim_size_to_factor: a parameter is factored if its two largest dimensions are at least so large.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.
      moment_dtype: dtype in which the moments are stored; None: the parameters'.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, a mask that matches nothing.

    References:
      Shazeer and Stern, 2018, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
      <https://arxiv.org/abs/1804.04235>`_

    >>> import jax.numpy as jnp
    >>> updates, _ = adafactor(0.5).update(jnp.ones(1), adafactor(0.5).init(jnp.ones(1)), jnp.ones(1))
    >>> print(updates)
    [-0.5]
    """
    return in_float32(
        with_learning_rate(
            lambda rate: optax.adafactor(
                rate,
                min_dim_size_to_factor=min_dim_size_to_factor,
                decay_rate=decay_rate,
                multiply_by_parameter_scale=multiply_by_parameter_scale,
                clipping_threshold=clipping_threshold,
                momentum=momentum,
                weight_decay_rate=weight_decay,
                weight_decay_mask=as_mask(mask, layer_axis),
            ),
            learning_rate,
        ),
        moment_dtype=moment_dtype,
    )
