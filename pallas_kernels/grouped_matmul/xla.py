"""For any device: XLA's own ragged products."""

import functools

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
    product = functools.partial(
        jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=numbers, preferred_element_type=wide
    )
    mapped = jax.custom_batching.custom_vmap(product)

    @mapped.def_vmap
    def _(count, are_mapped, *operands):
        # JAX maps a ragged product over all of its operands or over none.
        every = [
            x if is_mapped else jnp.broadcast_to(x, (count, *x.shape))
            for x, is_mapped in zip(operands, are_mapped, strict=True)
        ]
        return jax.vmap(product)(*every), True

    return mapped(a, b, sizes).astype(a.dtype)


KERNELS = Products(of_rows, of_groups, split_by_xla=True)
