"""AdamW and NAdamW whose learning rate follows the examples seen."""

import jax
import optax

from crescendo.optim.checks import Rate
from crescendo.optim.masks import LayerAxis, Mask
from crescendo.optim.precision import in_float32
from crescendo.optim.registry import OPTIMIZERS
from crescendo.optim.scaling import scale_by_learning_rate
from crescendo.optim.weight_decay import add_decayed_weights
from crescendo.ranges import Decay, NotNegative


@OPTIMIZERS
def adamw(
    learning_rate: Rate,
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.95,
    eps: NotNegative = 1e-8,
    weight_decay: NotNegative = 0.1,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW: `optax.adamw`'s rule with a language model's defaults, masks per layer and the clock of examples.

    .. math::

      m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2, \qquad
      w \leftarrow w - \eta_t \Big( \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda w \Big)

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      b1: decay of the first moment.
      b2: decay of the second moment; optax's default of 0.999 is slow for language models.
      eps: added to the denominator.
      weight_decay: lambda, multiplied by the learning rate.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything. In optax None is everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.
      moment_dtype: dtype in which both moments are stored; None: the parameters'.
      nesterov: look ahead in the first moment, as `nadamw`.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, a mask that matches nothing.

    References:
      Loshchilov and Hutter, 2019, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_

    >>> import jax.numpy as jnp
    >>> optimizer = adamw(0.5)
    >>> params = jnp.array([1.0, -1.0])
    >>> updates, state = optimizer.update(2 * params, optimizer.init(params), params)
    >>> print(optax.apply_updates(params, updates))
    [ 0.5 -0.5]
    """
    return in_float32(
        optax.chain(
            optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=nesterov),
            add_decayed_weights(weight_decay, mask, layer_axis),
            scale_by_learning_rate(learning_rate),
        ),
        moment_dtype=moment_dtype,
    )


@OPTIMIZERS
def nadamw(
    learning_rate: Rate,
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.95,
    eps: NotNegative = 1e-8,
    weight_decay: NotNegative = 0.1,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`adamw` with Nesterov's momentum: m-hat = b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t).

    Args and Raises: as `adamw`.

    References:
      Dozat, 2016, `Incorporating Nesterov Momentum into Adam <https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ>`_

    >>> import jax.numpy as jnp
    >>> update, _ = nadamw(0.5).update(jnp.ones(()), nadamw(0.5).init(jnp.ones(())), jnp.ones(()))
    >>> print(f"{update:.4f}")
    -0.7368
    """
    return adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        layer_axis=layer_axis,
        moment_dtype=moment_dtype,
        nesterov=True,
    )
