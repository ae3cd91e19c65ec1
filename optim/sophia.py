"""Sophia: momentum over an estimate of the Hessian's diagonal, clipped entry by entry."""

import jax
import optax
from optax import contrib

from crescendo.optim.checks import Rate
from crescendo.optim.masks import LayerAxis, Mask, as_mask
from crescendo.optim.precision import in_float32
from crescendo.optim.registry import OPTIMIZERS
from crescendo.optim.scaling import with_learning_rate
from crescendo.ranges import Count, Decay, NotNegative, Positive, Seed


@OPTIMIZERS
def sophia(
    learning_rate: Rate,
    *,
    b1: Decay = 0.965,
    b2: Decay = 0.99,
    eps: NotNegative = 1e-8,
    gamma: Positive = 0.01,
    clip_threshold: Positive = 1.0,
    update_interval: Count = 10,
    weight_decay: NotNegative = 0.1,
    seed: Seed = 0,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.sophia` with Hutchinson's estimate of the Hessian's diagonal.

    `update` needs the extra argument `obj_fn`, the batch's loss as a function of the parameters alone.

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      b1: decay of the momentum.
      b2: decay of the Hessian's estimate.
      eps: the least denominator.
      gamma: multiplies the Hessian in the denominator.
      clip_threshold: the largest entry of an update, before the rate.
      update_interval: updates between two estimates of the Hessian.
      weight_decay: multiplied by the learning rate.
      seed: of the estimate's random vectors.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.
      moment_dtype: dtype in which the moments are stored; None: the parameters'.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, a mask that matches nothing,
        or complex parameters.

    References:
      Liu et al., 2023, `Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training
      <https://arxiv.org/abs/2305.14342>`_

    >>> import jax.numpy as jnp
    >>> params = jnp.ones(2)
    >>> print(sophia(0.5).update(params, sophia(0.5).init(params), params, obj_fn=lambda w: w @ w / 2)[0])
    [-0.5 -0.5]
    """
    return in_float32(
        with_learning_rate(
            lambda rate: contrib.sophia(
                rate,
                b1=b1,
                b2=b2,
                eps=eps,
                weight_decay=weight_decay,
                weight_decay_mask=as_mask(mask, layer_axis),
                gamma=gamma,
                clip_threshold=clip_threshold,
                update_interval=update_interval,
                hessian_diagonal_fn=contrib.hutchinson_estimator_diag_hessian(jax.random.PRNGKey(seed)),
            ),
            learning_rate,
        ),
        moment_dtype=moment_dtype,
        real="sophia",  # entries are clipped, and complex numbers have no order
    )
