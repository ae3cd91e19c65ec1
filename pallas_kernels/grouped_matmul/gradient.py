"""The derivative rule: a grouped product with the matrices transposed, and one product of columns for each group."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import AxisType

from crescendo.pallas_kernels.op import Kernels
from crescendo.pallas_kernels.sharded import laid_out_as, sharded


@dataclasses.dataclass(frozen=True)
class Products(Kernels):
    """The products of one implementation, over plain arrays.

    Attributes:
      of_rows: `(a, w, sizes, transposed)` gives `a_i w_e` of each row, or `a_i w_e^T`.
      of_groups: `(x, dy, sizes)` gives `x_e^T dy_e` of each group's rows.
      split_by_xla: whether XLA knows how to split them over devices, and `vmap` how to map them.
    """

    of_rows: Callable
    of_groups: Callable
    split_by_xla: bool = False

    def on_parts(self, function: Callable, inputs: list[str], output: str, batch: str) -> Callable:
        """A product on each device's own columns, those of the letters in `batch`."""
        # JAX doesn't know the types of ragged products under an explicit mesh.
        if self.split_by_xla and AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
            return function
        part = lambda axes, *arrays: function(*arrays)  # noqa: E731  no sum is split
        return sharded(part, inputs, output, batch=batch.split(), reduces=True, called="grouped_matmul")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(kernels: Products, x, w, sizes):
    """The op by way of the products."""
    forward = functools.partial(kernels.of_rows, transposed=False)
    return kernels.on_parts(forward, ["m d", "e d f", "e"], "m f", "f")(x, w, sizes)


def _backward(kernels: Products, kept, dy):
    x, w, sizes = kept
    of_x = functools.partial(kernels.of_rows, transposed=True)
    dx = kernels.on_parts(of_x, ["m f", "e d f", "e"], "m d", "d")(dy, w, sizes)
    dw = kernels.on_parts(kernels.of_groups, ["m d", "m f", "e"], "e d f", "d f")(x, dy, sizes)
    return laid_out_as((x, w, sizes), (dx, dw, None))


run.defvjp(lambda kernels, x, w, sizes: (run(kernels, x, w, sizes), (x, w, sizes)), _backward)
