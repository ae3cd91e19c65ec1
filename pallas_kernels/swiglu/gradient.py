"""What the implementations share: the formulas of one entry, the derivative rule, and each device's own part."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.sharded import sharded


def product(gate, up):
    """`silu(gate) up`."""
    return gate * jax.nn.sigmoid(gate) * up


def gradients(gate, up, dy):
    """Of gate and up."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The passes of one implementation, on arrays of one shape and dtype.

    Attributes:
      forward: `(gate, up) -> y`.
      backward: `(gate, up, dy) -> (dgate, dup)`.
    """

    forward: Callable
    backward: Callable


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(kernels: Kernels, gate, up):
    """`kernels.forward` with `kernels.backward` as its gradient."""
    return kernels.forward(gate, up)


def _forward(kernels: Kernels, gate, up):
    return kernels.forward(gate, up), (gate, up)


def _backward(kernels: Kernels, kept, dy):
    return kernels.backward(*kept, dy.astype(kept[0].dtype))


differentiable.defvjp(_forward, _backward)


def everywhere(function: Callable, results: int, *arrays):
    """`function` of arrays of one shape, entry by entry, on each device's own part.

    Args:
      function: takes such parts, of any shape, and returns a tuple of `results` of their shape.
      results: how many.
      arrays: at least one axis, and not empty.
    """
    letters = " ".join(f"d{i}" for i in range(arrays[0].ndim))
    return sharded(function, [letters] * len(arrays), [letters] * results, batch=letters.split())(*arrays)


def check(array, *dtypes) -> None:
    """That a kernel can take an array; raises `Unsupported`."""
    if array.dtype not in dtypes:
        raise Unsupported(f"takes {', '.join(jnp.dtype(dtype).name for dtype in dtypes)}, not {array.dtype}")
    if array.size == 0 or array.ndim == 0:
        raise Unsupported(f"has nothing to do for an array {list(array.shape)}")
