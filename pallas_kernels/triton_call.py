"""The one door to jax-triton, whose argument names changed between its versions."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax_triton

from crescendo.pallas_kernels.op import require_gpu
from crescendo.pallas_kernels.sharded import results_of

# "out_shape" before jax-triton 0.4.
RESULTS = "out_shape" if "out_shape" in inspect.signature(jax_triton.triton_call).parameters else "out_type"


def triton_call(
    *arrays: jax.Array,
    kernel: Any,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int = 1,
    zeroed: Sequence[int] = (),
    aliases: dict[int, int] | None = None,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Runs a `@triton.jit` kernel on pointers to the arrays and then to the results.

    Args:
      kernel: takes the pointers, then `constants` as `tl.constexpr`.
      out_shape: of each result.
      zeroed: which results are set to 0 first.
      aliases: from the number of an array to that of the result that takes its memory.

    Raises:
      Unsupported: on anything but an NVIDIA GPU of compute capability 8.0 or later.
    """
    device = require_gpu(8.0)
    if device.interpreted:
        from crescendo.pallas_kernels import triton_interpreter

        return triton_interpreter.run(
            *arrays, kernel=kernel, out_shape=out_shape, grid=grid, zeroed=zeroed, **constants
        )
    results = jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=round(10 * device.compute_capability),
        zeroed_outputs=tuple(zeroed),
        input_output_aliases=aliases,
        **{RESULTS: tuple(out_shape)},
        **constants,
    )
    return results_of(arrays, tuple(results))
