"""For any device: XLA's own fusions, with the shared gradient."""

import jax.numpy as jnp

from crescendo.pallas_kernels.rows import Passes
from crescendo.pallas_kernels.swiglu.gradient import gradients, product


def swiglu(**_):
    """See the op."""
    return KERNELS


def forward(gate, up):
    """`(y,)`."""
    return (product(*_wide(gate, up)).astype(gate.dtype),)


def backward(gate, up, dy):
    """`(dgate, dup)`."""
    return tuple(d.astype(gate.dtype) for d in gradients(*_wide(gate, up, dy)))


def _wide(*arrays):
    wide = jnp.promote_types(arrays[0].dtype, jnp.float32)
    return (array.astype(wide) for array in arrays)


KERNELS = Passes(forward, backward, split_by_xla=True)
