"""SGD with momentum, plain or Nesterov's."""

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
def sgd(
    learning_rate: Rate,
    *,
    momentum: Decay = 0.9,
    nesterov: bool = False,
    weight_decay: NotNegative = 0.0,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD: v <- momentum v + g + weight_decay w; w <- w - eta v (with Nesterov: g + weight_decay w + momentum v).

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      momentum: of v; 0: plain SGD.
      nesterov: step by what v will be after the same gradient once more.
      weight_decay: multiplied by the learning rate.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.
      moment_dtype: dtype in which v is stored; None: the parameters'.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, a mask that matches nothing.

    >>> import jax.numpy as jnp
    >>> print(sgd(0.5).update(jnp.ones(1), sgd(0.5).init(jnp.ones(1)), jnp.ones(1))[0])
    [-0.5]
    """
    return in_float32(
        optax.chain(
            add_decayed_weights(weight_decay, mask, layer_axis),
            optax.trace(decay=momentum, nesterov=nesterov),
            scale_by_learning_rate(learning_rate),
        ),
        moment_dtype=moment_dtype,
    )
