"""AdaGrad and AdaGradNorm: rates that fall with the gradients seen so far, as AdAdaGrad pairs them with its batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from crescendo.optim.checks import Rate
from crescendo.optim.masks import LayerAxis, Mask
from crescendo.optim.precision import in_float32, widen
from crescendo.optim.registry import OPTIMIZERS, TRANSFORMS
from crescendo.optim.scaling import scale_by_learning_rate
from crescendo.optim.weight_decay import add_decayed_weights
from crescendo.ranges import NotNegative


class ScaleByAdagradNormState(NamedTuple):
    """State of `scale_by_adagrad_norm`."""

    sum_of_squares: jax.Array
    """b_0^2 and the squared norms of all gradients so far, float32[]."""


@TRANSFORMS
def scale_by_adagrad_norm(initial_accumulator: NotNegative = 0.1) -> optax.GradientTransformationExtraArgs:
    r"""Divide the gradient by the root of all squared gradient norms so far, over all parameters: one rate for all.

    .. math::

      b_t^2 = b_{t-1}^2 + ||g_t||^2, \qquad u = g_t / b_t

    Args:
      initial_accumulator: b_0^2, at least 0; an update of 0 gradients only is 0.

    Raises:
      ValueError: a negative or NaN accumulator.

    References:
      Ward et al., 2019, `AdaGrad Stepsizes: Sharp Convergence over Nonconvex Landscapes
      <https://arxiv.org/abs/1806.01811>`_

    >>> transform = scale_by_adagrad_norm(0.0)
    >>> updates, state = transform.update(jnp.array([3.0, 4.0]), transform.init(jnp.ones(2)))
    >>> print(updates, state.sum_of_squares)
    [0.6 0.8] 25.0
    """

    def init(params: optax.Params) -> ScaleByAdagradNormState:
        del params
        return ScaleByAdagradNormState(jnp.asarray(initial_accumulator, jnp.float32))

    def update(
        updates: optax.Updates,
        state: ScaleByAdagradNormState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, ScaleByAdagradNormState]:
        del params, extra_args
        wide = jax.tree.map(widen, updates)
        total = (state.sum_of_squares + optax.tree.norm(wide, squared=True)).astype(jnp.float32)
        scale = jnp.where(total > 0, jax.lax.rsqrt(jnp.where(total > 0, total, 1)), 0)
        return jax.tree.map(
            lambda w, g: (scale * w).astype(jnp.result_type(g)), wide, updates
        ), ScaleByAdagradNormState(total)

    return optax.GradientTransformationExtraArgs(init, update)


@OPTIMIZERS
def adagrad_norm(
    learning_rate: Rate,
    *,
    initial_accumulator: NotNegative = 0.1,
    weight_decay: NotNegative = 0.0,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaGradNorm: w <- w - eta (g / b + weight_decay w); see `scale_by_adagrad_norm`.

    With `policies.norm_test` it is AdAdaGradNorm (Lau et al., 2024, https://arxiv.org/abs/2402.11215): leave the rate
    alone as the batch grows (coupling "none"), since b grows slower where gradients are less noisy.

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      initial_accumulator: b_0^2.
      weight_decay: multiplied by the learning rate.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, a mask that matches nothing.

    >>> optimizer = adagrad_norm(0.5, initial_accumulator=0.0)
    >>> print(optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(jnp.ones(2)), jnp.ones(2))[0])
    [-0.3 -0.4]
    """
    return in_float32(
        optax.chain(
            scale_by_adagrad_norm(initial_accumulator),
            add_decayed_weights(weight_decay, mask, layer_axis),
            scale_by_learning_rate(learning_rate),
        )
    )


@OPTIMIZERS
def adagrad(
    learning_rate: Rate,
    *,
    initial_accumulator: NotNegative = 0.1,
    eps: NotNegative = 1e-7,
    weight_decay: NotNegative = 0.0,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaGrad: v <- v + g^2, w <- w - eta (g / sqrt(v + eps) + weight_decay w), entry by entry: `optax.adagrad`'s rule.

    With `policies.norm_test` it is AdAdaGrad; see `adagrad_norm`.

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      initial_accumulator: v_0.
      eps: added under the root.
      weight_decay: multiplied by the learning rate.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.
      moment_dtype: dtype in which v is stored; None: the parameters'. A sum sticks once it outgrows its rounding: 256
        steps of bfloat16.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, a mask that matches nothing.

    References:
      Duchi et al., 2011, `Adaptive Subgradient Methods <https://jmlr.org/papers/v12/duchi11a.html>`_

    >>> optimizer = adagrad(0.5, initial_accumulator=0.0, eps=0.0)
    >>> print(optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(jnp.ones(2)), jnp.ones(2))[0])
    [-0.5 -0.5]
    """
    return in_float32(
        optax.chain(
            optax.scale_by_rss(initial_accumulator, eps),
            add_decayed_weights(weight_decay, mask, layer_axis),
            scale_by_learning_rate(learning_rate),
        ),
        moment_dtype=moment_dtype,
    )
