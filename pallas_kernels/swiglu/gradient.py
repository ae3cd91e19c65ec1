"""The formulas of one entry, and the derivative rule.

Of `Passes`, `forward(gate, up)` gives `(y,)` and `backward(gate, up, dy)` `(dgate, dup)`, on arrays of one shape.
"""

import functools

import jax

from crescendo.pallas_kernels.rows import Passes
from crescendo.pallas_kernels.sharded import laid_out_as


def product(gate, up):
    """`silu(gate) up`."""
    return gate * jax.nn.sigmoid(gate) * up


def gradients(gate, up, dy):
    """Of gate and up."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(kernels: Passes, gate, up):
    """The op by way of the passes."""
    return _on_entries(kernels, kernels.forward, 2, 1, gate)(gate, up)[0]


def _forward(kernels: Passes, gate, up):
    return _on_entries(kernels, kernels.forward, 2, 1, gate)(gate, up)[0], (gate, up)


def _backward(kernels: Passes, kept, dy):
    gate, up = kept
    return laid_out_as(kept, _on_entries(kernels, kernels.backward, 3, 2, gate)(gate, up, dy.astype(gate.dtype)))


run.defvjp(_forward, _backward)


def _on_entries(kernels: Passes, function, arrays: int, results: int, like):
    """A pass that every axis may be split for."""
    letters = [f"d{i}" for i in range(like.ndim)]
    return kernels.on_parts(function, [" ".join(letters)] * arrays, [" ".join(letters)] * results, letters)
