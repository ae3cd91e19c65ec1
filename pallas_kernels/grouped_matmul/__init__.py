"""Rows times the matrix of the group that each belongs to: the linear layer of a mixture of experts."""

import jax.numpy as jnp

from crescendo.pallas_kernels.grouped_matmul import gradient
from crescendo.pallas_kernels.op import check_floating, op
from crescendo.pallas_kernels.sharded import alike

# XLA's own before the kernel for TPUs, which nobody has timed.
ORDER = ("mosaic_gpu", "triton", "looped", "xla", "mosaic_tpu", "reference")


@op({name: f"crescendo.pallas_kernels.grouped_matmul.{name}" for name in ORDER}, run=gradient.run)
def grouped_matmul(x, w, sizes):
    r"""`x_i w_e` for each row i, where e is the group that the row is in; sums in float32, rounded once.

    .. math::

      y_i = x_i W_{e(i)}, \qquad e(i) = \min \{e : i < s_0 + \dots + s_e\}, \qquad
      dx_i = dy_i W_{e(i)}^T, \qquad dW_e = \sum_{i : e(i) = e} x_i^T dy_i

    Rows lie group by group. A group may have any number of rows, none too, and is not padded. Rows of x behind the last
    group may hold anything, NaN too: their results and gradients are 0. Cotangents should be finite: by the kernel for
    Hopper one that isn't may spoil dW of a neighbour too.

    Args:
      x: `[M, D]`, float32, bfloat16, float16 or float64.
      w: `[E, D, F]` in x's dtype.
      sizes: integers `[E]`, 0 or more, at most M in all: the rows of each group. They may be traced; nothing is
        compiled for their values.

    Returns:
      `[M, F]` in the dtype of x and w. Under a mesh F may be split, and the gradients' D; rows are of one device.

    Raises:
      ValueError: shapes that don't fit each other, or no group.
      TypeError: two dtypes, x or w that isn't floating, or sizes that aren't integers.

    References:
      Gale et al., 2022, `MegaBlocks <https://arxiv.org/abs/2211.15841>`_

    >>> x, w = jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.array([[[1.0]], [[5.0]], [[10.0]]])
    >>> print(grouped_matmul(x, w, jnp.array([2, 0, 1])).ravel())
    [ 1.  2. 30.  0.]
    """
    check_floating(x=x, w=w)
    if not (hasattr(sizes, "dtype") and jnp.issubdtype(sizes.dtype, jnp.integer)):
        raise TypeError(f"sizes is {getattr(sizes, 'dtype', type(sizes).__name__)} and must be an array of integers")
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x {list(x.shape)} must be [M, D] and w {list(w.shape)} [E, D, F] with the same D")
    if sizes.shape != w.shape[:1] or not w.size:
        raise ValueError(
            f"sizes {list(sizes.shape)} must be [E], one for each matrix of w {list(w.shape)}, one or more"
        )
    if x.dtype != w.dtype:
        raise TypeError(f"x {x.dtype} and w {w.dtype} must have one dtype: cast them first")
    x, w, sizes = alike(x, w, jnp.asarray(sizes, jnp.int32))
    return {"x": x, "w": w, "sizes": sizes}
