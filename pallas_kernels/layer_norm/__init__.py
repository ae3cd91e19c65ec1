"""LayerNorm with a residual sum, in one pass over the activations; the kernels are RMSNorm's, centered."""

from crescendo.pallas_kernels.op import check_floating, op
from crescendo.pallas_kernels.rms_norm import MODULES, check_residual, check_vectors, checked_eps, gradient
from crescendo.pallas_kernels.sharded import alike


@op(MODULES | {"reference": "crescendo.pallas_kernels.layer_norm.reference"}, run=gradient.norm)
def layer_norm(x, scale, bias, *, eps, residual=None):
    r"""`(x - mean(x)) / std(x) * scale + bias` over the last axis, computed in float32 at least.

    .. math::

      h = x + r, \qquad c = h - \mathrm{mean}(h), \qquad
      u = \frac{c}{\sqrt{\mathrm{mean}(c^2) + \epsilon}}, \qquad y = u \, s + b

    The gradient reads h and dy once: with `g = dy s`, `dh = (g - mean(g) - u mean(g u)) / std`, `ds = sum dy u` and
    `db = sum dy`. Only h is kept for it.

    Args:
      x: `[..., D]`; float32, bfloat16, float16 or float64.
      scale, bias: of one shape, `[D]`, or `[B, D]` with one for each example of x `[B, ..., D]`; their gradients are
        then per example.
      eps: epsilon, added to the variance, at least 0.
      residual: of the shape and dtype of x, added first; h is rounded to that dtype.

    Returns:
      y in the shape and dtype of x; `(y, h)` with a residual.

    Raises:
      ValueError: shapes that don't fit each other, a negative eps.
      TypeError: dtypes that are not floating, a residual of another dtype than x, an eps that is no Python number.

    References:
      Ba, Kiros and Hinton, 2016, `Layer Normalization <https://arxiv.org/abs/1607.06450>`_

    >>> import jax.numpy as jnp
    >>> print(layer_norm(jnp.array([[1.0, 3.0]]), jnp.array([2.0, 2.0]), jnp.array([0.0, 1.0]), eps=0.0))
    [[-2.  3.]]
    """
    check_floating(x=x, scale=scale, bias=bias)
    check_vectors(x, scale=scale, bias=bias)
    if scale.shape != bias.shape:
        raise ValueError(f"scale {list(scale.shape)} and bias {list(bias.shape)} must have one shape")
    check_residual(x, residual)
    x, scale, bias, residual = alike(x, scale, bias, residual)
    return {"x": x, "scale": scale, "bias": bias, "eps": checked_eps(eps), "residual": residual}
