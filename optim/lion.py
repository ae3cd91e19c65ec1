"""Lion: the sign of an interpolated momentum; one state array per parameter."""

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
def lion(
    learning_rate: Rate,
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.99,
    weight_decay: NotNegative = 1.0,
    mask: Mask = None,
    layer_axis: LayerAxis = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion: `optax.lion`'s rule with masks per layer and the clock of examples.

    .. math::

      c = \beta_1 m + (1-\beta_1) g, \qquad w \leftarrow w - \eta_t (\mathrm{sign}\, c + \lambda w), \qquad
      m \leftarrow \beta_2 m + (1-\beta_2) g

    Take a learning rate 3 to 10 times smaller than AdamW's, and a decay as many times larger.

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      b1: weight of the momentum in the direction.
      b2: decay of the momentum.
      weight_decay: lambda; the default is ten times that of `adamw`.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      layer_axis: where layers are stacked; see `masks.layer_axes`.
      moment_dtype: dtype in which the momentum is stored; None: the parameters'.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range; at `init`, a mask that matches nothing.

    References:
      Chen et al., 2023, `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_

    >>> import jax.numpy as jnp
    >>> optimizer = lion(0.5)
    >>> params = jnp.array([1.0, -2.0])
    >>> print(optimizer.update(params, optimizer.init(params), params)[0])
    [-0.5  0.5]
    """
    return in_float32(
        optax.chain(
            optax.scale_by_lion(b1=b1, b2=b2),
            add_decayed_weights(weight_decay, mask, layer_axis),
            scale_by_learning_rate(learning_rate),
        ),
        moment_dtype=moment_dtype,
    )
