"""For any device: XLA's own fusions, with the shared gradient."""

import jax.numpy as jnp

from crescendo.pallas_kernels.rows import Passes
from crescendo.pallas_kernels.swiglu.gradient import as_inputs, gradients, halves, product


def swiglu(**_):
    """See the op."""
    return KERNELS


def forward(*inputs):
    """`(y,)`."""
    return (product(*_wide(*halves(*inputs))).astype(inputs[0].dtype),)


def backward(dy, *inputs):
    """Of the inputs."""
    found = gradients(*_wide(dy, *halves(*inputs)))
    return as_inputs(inputs, *(d.astype(dy.dtype) for d in found))


def _wide(*arrays):
    wide = jnp.promote_types(arrays[0].dtype, jnp.float32)
    return (array.astype(wide) for array in arrays)


KERNELS = Passes(forward, backward, split_by_xla=True)
