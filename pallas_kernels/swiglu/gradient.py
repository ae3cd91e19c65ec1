"""The formulas of one entry, and the derivative rule.

Of `Passes`, `forward(*inputs)` gives `(y,)` and `backward(dy, *inputs)` the gradients of the inputs: gate and up, or
one array `[..., 2, F]` of both.
"""

import functools

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.rows import Passes
from crescendo.pallas_kernels.sharded import laid_out_as


def product(gate, up):
    """`silu(gate) up`."""
    return gate * jax.nn.sigmoid(gate) * up


def gradients(dy, gate, up):
    """Of gate and up."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu


def halves(gate, up=None):
    """Gate and up, of the op's one input or two."""
    return (gate[..., 0, :], gate[..., 1, :]) if up is None else (gate, up)


def as_inputs(inputs, dgate, dup):
    """Their gradients as the inputs are."""
    return (dgate, dup) if len(inputs) == 2 else (jnp.stack([dgate, dup], axis=-2),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(kernels: Passes, gate, up):
    """The op by way of the passes."""
    return _forward(kernels, gate, up)[0]


def _forward(kernels: Passes, gate, up):
    inputs = (gate,) if up is None else (gate, up)
    of_inputs, of_y, letters = _letters(inputs)
    return kernels.on_parts(kernels.forward, of_inputs, [of_y], letters)(*inputs)[0], inputs


def _backward(kernels: Passes, inputs, dy):
    of_inputs, of_y, letters = _letters(inputs)
    backward = kernels.on_parts(kernels.backward, [of_y, *of_inputs], of_inputs, letters)
    gradients = laid_out_as(inputs, backward(dy.astype(inputs[0].dtype), *inputs))
    return gradients if len(inputs) == 2 else (*gradients, None)


run.defvjp(_forward, _backward)


def _letters(inputs) -> tuple[list[str], str, list[str]]:
    """Of the inputs' dimensions, of the result's, and of those that may be split: all but that of gate and up."""
    letters = [f"d{i}" for i in range(inputs[0].ndim - (len(inputs) == 1))]
    both = [*letters[:-1], "two", letters[-1]] if len(inputs) == 1 else letters
    return [" ".join(both)] * len(inputs), " ".join(letters), letters
