"""SwiGLU's product `silu(gate) up`, forward and backward in one pass each."""

from crescendo.pallas_kernels.op import check_floating, op
from crescendo.pallas_kernels.sharded import alike
from crescendo.pallas_kernels.swiglu import gradient

# Triton first where there is an NVIDIA GPU. Forward XLA's fusion is as fast (docs/results/row_kernels.md), but in a
# model's gradient it makes two kernels, one for each of dgate and dup, which read and write 7 arrays where one takes 5.
ORDER = ("triton", "mosaic_gpu", "xla", "reference")


@op({name: f"crescendo.pallas_kernels.swiglu.{name}" for name in ORDER}, run=gradient.run)
def swiglu(gate, up=None):
    r"""`silu(gate) up`, entry by entry, computed in float32 at least and rounded once.

    .. math::

      y = g\,\sigma(g)\,u, \qquad dg = dy\,u\,\sigma(g)\,(1 + g\,(1 - \sigma(g))), \qquad du = dy\,g\,\sigma(g)

    Only `gate` and `up` are kept for the gradient, not what lies between.

    Args:
      gate, up: of one shape `[..., F]` and one dtype: float32, bfloat16, float16 or float64. With up None, gate is
        both, `[N, ..., 2, F]`, as one product makes them, and so is its gradient: what splits F over devices leaves
        each its gate and its up.

    Returns:
      `[..., F]` in their dtype.

    Raises:
      ValueError: two shapes, or one that isn't both.
      TypeError: two dtypes, or one that isn't floating.

    References:
      Shazeer, 2020, `GLU Variants Improve Transformer <https://arxiv.org/abs/2002.05202>`_

    >>> import jax.numpy as jnp
    >>> print(swiglu(jnp.array([0.0, 1.0]), jnp.array([5.0, 2.0])))
    [0.        1.4621172]
    >>> print(swiglu(jnp.array([[[0.0, 1.0], [5.0, 2.0]]])))
    [[0.        1.4621172]]
    """
    check_floating(gate=gate, **({} if up is None else {"up": up}))
    if up is None:
        if gate.ndim < 3 or gate.shape[-2] != 2:
            raise ValueError(f"gate {list(gate.shape)} without up must be [N, ..., 2, F]: gate and up side by side")
        return {"gate": gate, "up": None}
    if gate.shape != up.shape:
        raise ValueError(f"gate {list(gate.shape)} and up {list(up.shape)} must have one shape")
    if gate.dtype != up.dtype:
        raise TypeError(f"gate {gate.dtype} and up {up.dtype} must have one dtype: cast them first")
    gate, up = alike(gate, up)
    return {"gate": gate, "up": up}
