"""For any device: XLA's own ragged products."""

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.grouped_matmul.gradient import Products

# [M, D], [E, D, F]: D is summed over, M is in groups; transposed F is. [M, D], [M, F]: rows of a group are.
_ROWS, _TRANSPOSED, _GROUPS = (
    jax.lax.RaggedDotDimensionNumbers(((contracted, ((), ()))), [0], groups)
    for contracted, groups in ((((1,), (1,)), [0]), (((1,), (2,)), [0]), (((0,), (0,)), []))
)


def grouped_matmul(**_):
    """See the op."""
    return KERNELS


def of_rows(a, w, sizes, transposed):
    """Of the gradient's rule."""
    return _product(a, w, sizes, _TRANSPOSED if transposed else _ROWS)


def of_groups(x, dy, sizes):
    """Of the gradient's rule."""
    return _product(x, dy, sizes, _GROUPS)


def _product(a, b, sizes, numbers):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.ragged_dot_general(a, b, sizes, numbers, preferred_element_type=wide).astype(a.dtype)


KERNELS = Products(of_rows, of_groups, split_by_xla=True)
