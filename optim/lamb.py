"""LAMB: Adam's direction, at a length proportional to each layer's norm."""

import jax
import optax

from crescendo.optim.checks import Rate
from crescendo.optim.masks import LayerAxis, Mask
from crescendo.optim.precision import in_float32
from crescendo.optim.registry import OPTIMIZERS
from crescendo.optim.scaling import scale_by_learning_rate
from crescendo.optim.trust_ratio import PhiClip, scale_by_layer_trust_ratio
from crescendo.optim.weight_decay import add_decayed_weights
from crescendo.ranges import Decay, NotNegative


@OPTIMIZERS
def lamb(
    learning_rate: Rate,
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NotNegative = 1e-6,
    weight_decay: NotNegative = 0.01,
    mask: Mask = None,
    trust_mask: Mask = None,
    phi_clip: PhiClip = None,
    layer_axis: LayerAxis = None,
    moment_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LAMB, with the paper's bias correction and constants.

    .. math::

      u = \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda w, \qquad
      w \leftarrow w - \eta_t \frac{\phi(\lVert w \rVert)}{\lVert u \rVert} u, \qquad
      \phi(x) = \min(\max(x, lo), hi)

    per layer, with Adam's moments m and v. As in the authors' code biases and norm scales are neither decayed nor
    scaled by a trust ratio. `optax.lamb` decays nothing by default, has no such mask and no phi, and takes one norm of
    all the layers of a stack.

    Args:
      learning_rate: a rate or a schedule; see `scale_by_learning_rate`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.
      weight_decay: lambda.
      mask: what decays; None: matrices (see `masks.is_matrix`), True: everything.
      trust_mask: what is scaled by a trust ratio; likewise.
      phi_clip: (lo, hi) of phi; None: phi(x) = x.
      layer_axis: where layers are stacked; see `masks.layer_axes`.
      moment_dtype: dtype in which both moments are stored; None: the parameters'.

    Raises:
      ValueError: a negative or NaN learning rate, a constant out of its range, a bad clip; at `init`, a mask that
        matches nothing.

    References:
      You et al., 2020, `Large Batch Optimization for Deep Learning: Training BERT in 76 minutes
      <https://arxiv.org/abs/1904.00962>`_

    >>> import jax.numpy as jnp
    >>> optimizer = lamb(0.5, weight_decay=0.0)
    >>> params = jnp.array([[3.0, -4.0]])
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> print(f"{jnp.linalg.norm(updates):.4f} {optax.tree_utils.tree_get(state, 'trust_ratio')[0]:.3f}")
    2.5000 3.536
    """
    return in_float32(
        optax.chain(
            optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
            add_decayed_weights(weight_decay, mask, layer_axis),
            scale_by_layer_trust_ratio(phi_clip=phi_clip, trust_mask=trust_mask, layer_axis=layer_axis),
            scale_by_learning_rate(learning_rate),
        ),
        moment_dtype=moment_dtype,
    )
