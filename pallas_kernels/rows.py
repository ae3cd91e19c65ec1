"""What the ops share whose kernels go over the rows of a matrix: passes on every device's own part, and what they take.

Such an op has a module with its derivative rule, the maths of it, and implementations that answer with `Passes`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.op import Kernels, Unsupported
from crescendo.pallas_kernels.sharded import sharded

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def check(*arrays, dtypes: Sequence[Any] = FLOATS) -> None:
    """Raises `Unsupported` for arrays of another dtype, and for empty ones."""
    for array in arrays:
        if array.dtype not in dtypes:
            names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
            raise Unsupported(f"takes {names}, not {array.dtype}")
        if array.size == 0 or array.ndim == 0:
            raise Unsupported(f"has nothing to do for an array {list(array.shape)}")


@dataclasses.dataclass(frozen=True)
class Passes(Kernels):
    """The passes of one implementation, over plain arrays; an op's module of the derivative says what they take.

    Attributes:
      forward: gives a tuple of results.
      backward: gives a tuple of gradients.
      split_by_xla: whether XLA knows how to split them over devices, and `vmap` how to map them.
    """

    forward: Callable[..., tuple]
    backward: Callable[..., tuple]
    split_by_xla: bool = False

    def on_parts(
        self, function: Callable[..., tuple], inputs: Sequence[Any], outputs: Sequence[str], batch: Sequence[str]
    ):
        """A pass on each device's own part, from the letters of its dimensions (`sharded`)."""
        return function if self.split_by_xla else sharded(function, inputs, outputs, batch=batch)

    def on_rows(self, function: Callable[..., tuple], *shapes):
        """A pass over arrays `[..., C]` and None's, each device's own part of which it sees as a matrix `[R, C]`.

        `function` gives one result, as the first of them; what XLA splits sees the arrays as they are.
        """
        if self.split_by_xla:
            return function
        leading = [f"r{i}" for i in range(shapes[0].ndim - 1)]
        letters = " ".join([*leading, "c"])

        def rows(*parts):
            matrices = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), parts)
            return (function(*matrices)[0].reshape(parts[0].shape),)

        return sharded(rows, jax.tree.map(lambda _: letters, shapes), [letters], batch=leading)
