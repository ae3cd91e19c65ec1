"""RMSNorm with a residual sum, or with rotary positions for queries and keys, in one pass over the activations."""

import math

from crescendo.pallas_kernels.op import check_floating, check_number, op
from crescendo.pallas_kernels.rms_norm import gradient
from crescendo.pallas_kernels.sharded import alike

# Triton first where there is an NVIDIA GPU: with rotation 1.9 to 2.4 times as fast as what XLA makes of the two steps
# (docs/results/row_kernels.md). On a TPU XLA fuses a norm with what surrounds it, and nobody has measured which is
# faster.
ORDER = ("triton", "mosaic_gpu", "xla", "mosaic_tpu", "reference")
MODULES = {name: f"crescendo.pallas_kernels.rms_norm.{name}" for name in ORDER}


@op(MODULES, run=gradient.norm)
def rms_norm(x, scale, *, eps, residual=None, probe=None):
    r"""`x / rms(x) * scale` over the last axis, computed in float32 at least.

    .. math::

      h = x + r, \qquad y = \frac{h}{\sqrt{\mathrm{mean}(h^2) + \epsilon}} \, s

    Args:
      x: `[..., D]`; float32, bfloat16, float16 or float64.
      scale: `[D]`, or `[B, D]` with one for each example of x `[B, ..., D]`; its gradient is then per example.
      eps: epsilon, at least 0.
      residual: of the shape and dtype of x, added first; h is rounded to that dtype.
      probe: float32 `[B]`, its values don't matter. Its gradient is defined as the squared norms of the per-example
        gradients of the scale, `||dL/ds_b||^2`: the extra output of the backward pass. Pass the same probe to all
        layers, and its gradient is the sum over them, as the noise-scale estimator wants it.

    Returns:
      y in the shape and dtype of x; `(y, h)` with a residual.

    Raises:
      ValueError: shapes that don't fit each other, a negative eps.
      TypeError: dtypes that are not floating, a residual of another dtype than x, an eps that is no Python number.

    References:
      Zhang and Sennrich, 2019, `Root Mean Square Layer Normalization <https://arxiv.org/abs/1910.07467>`_;
      Gray et al., 2024, `Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in
      Transformers <https://arxiv.org/abs/2411.00999>`_ (per-example norms)

    >>> import jax.numpy as jnp
    >>> y, h = rms_norm(jnp.array([[3.0, 3.0]]), jnp.ones(2), eps=0.0, residual=jnp.array([[0.0, 1.0]]))
    >>> print(h, jnp.sum(y * y))
    [[3. 4.]] 2.0
    """
    check_floating(x=x, scale=scale)
    check_vectors(x, scale=scale)
    check_residual(x, residual)
    if probe is not None and (x.ndim < 2 or probe.shape != x.shape[:1]):
        raise ValueError(f"probe {list(probe.shape)} must be [B] for x {list(x.shape)}, [B, ..., D]")
    x, scale, residual, probe = alike(x, scale, residual, probe)
    return {"x": x, "scale": scale, "eps": checked_eps(eps), "residual": residual, "probe": probe}


@op({name: module for name, module in MODULES.items() if name != "mosaic_gpu"}, run=gradient.qk_norm_rotary)
def qk_norm_rotary(q, k, q_scale, k_scale, cosine, sine, *, eps):
    r"""Norms queries and keys over the head's width, and turns pairs `(x[i], x[i + E/2])` by the position's angle.

    .. math::

      u = \mathrm{rms\_norm}(x, s), \qquad
      y = (u_1 \cos - u_2 \sin,\; u_2 \cos + u_1 \sin), \qquad u = (u_1, u_2)

    Args:
      q, k: `[B, T, H, E]` and `[B, T, K, E]`, E even.
      q_scale, k_scale: `[E]`, or `[B, E]` with one for each example.
      cosine, sine: float32 `[B, T, E / 2]`, or with 1 in place of B.
      eps: epsilon of the norms, at least 0.

    Returns:
      `(q, k)` in their dtype, rounded to it once by kernels, and by the reference behind the norm too. No gradient
      flows to the angles.

    Raises:
      ValueError: shapes that don't fit each other, an odd E, a negative eps.
      TypeError: dtypes that are not floating, an eps that is no Python number.

    References:
      Dehghani et al., 2023, `Scaling Vision Transformers to 22 Billion Parameters <https://arxiv.org/abs/2302.05442>`_
      (the norms); Su et al., 2021, `RoFormer <https://arxiv.org/abs/2104.09864>`_

    >>> import jax.numpy as jnp
    >>> q = jnp.ones((1, 1, 1, 2))
    >>> angle = jnp.full((1, 1, 1), math.pi / 2)
    >>> turned, _ = qk_norm_rotary(q, q, jnp.ones(2), jnp.ones(2), jnp.cos(angle), jnp.sin(angle), eps=0.0)
    >>> print(jnp.round(turned.ravel()))
    [-1.  1.]
    """
    check_floating(q=q, k=k, q_scale=q_scale, k_scale=k_scale, cosine=cosine, sine=sine)
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {list(q.shape)} must be [B, T, H, E] and k {list(k.shape)} [B, T, K, E]")
    batch, length, _, width = q.shape
    if width % 2:
        raise ValueError(f"a head of width {width} must be even: rotary positions turn pairs")
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale)):
        if scale.shape not in ((width,), (batch, width)):
            raise ValueError(f"{name} {list(scale.shape)} must be [E] or [B, E] for q {list(q.shape)}")
    for name, angle in (("cosine", cosine), ("sine", sine)):
        if angle.shape not in ((batch, length, width // 2), (1, length, width // 2)):
            raise ValueError(f"{name} {list(angle.shape)} must be [B, T, E / 2] for q {list(q.shape)}")
    arguments = {"q": q, "k": k, "q_scale": q_scale, "k_scale": k_scale, "cosine": cosine, "sine": sine}
    return {**alike(arguments)[0], "eps": checked_eps(eps)}


def check_vectors(x, **vectors) -> None:
    """Raises ValueError for vectors of a norm, by their names, which are neither `[D]` nor one for each example."""
    for name, vector in vectors.items():
        if x.ndim < 1 or vector.shape not in ((x.shape[-1],), (x.shape[0], x.shape[-1])[: x.ndim]):
            raise ValueError(f"{name} {list(vector.shape)} must be [D] or [B, D] for x {list(x.shape)}, [B, ..., D]")


def check_residual(x, residual) -> None:
    """Raises an error for a residual, not None, of another shape or dtype than x."""
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        kind = TypeError if residual.shape == x.shape else ValueError
        raise kind(f"residual {residual.dtype}{list(residual.shape)} must be as x, {x.dtype}{list(x.shape)}")


def checked_eps(eps) -> float:
    """A norm's epsilon; raises TypeError for what is no number, ValueError for one out of its range."""
    check_number("eps", eps)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps = {eps} must be at least 0 and finite")
    return float(eps)
