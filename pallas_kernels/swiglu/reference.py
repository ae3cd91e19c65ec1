"""The specification: one line, differentiated by JAX."""

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.swiglu.gradient import halves


def swiglu(gate, up):
    """See the op."""
    gate, up = halves(gate, up)
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    return (jax.nn.silu(gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)
