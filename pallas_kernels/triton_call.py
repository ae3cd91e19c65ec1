"""The one door to jax-triton, whose argument names changed between its versions."""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax_triton
from jax.interpreters import mlir
from jax_triton import triton_lib
from jaxlib.mlir import ir
from triton._C import libtriton

from crescendo.pallas_kernels.op import require_gpu
from crescendo.pallas_kernels.sharded import results_of

# "out_shape" before jax-triton 0.4.
RESULTS = "out_shape" if "out_shape" in inspect.signature(jax_triton.triton_call).parameters else "out_type"


def _for_graphs(lowering: Callable) -> Callable:
    """A lowering whose call of a kernel may be part of a CUDA graph.

    jax-triton before 0.4 calls by XLA's older interface, whose calls are launched from the host one by one, with the
    graphs cut in two around each.
    """

    def lower(*args, **kwargs):
        results = lowering(*args, **kwargs)
        call = results[0].owner
        call.attributes["backend_config"] = ir.DictAttr.get({"opaque": call.attributes["backend_config"]})
        call.attributes["call_target_name"] = ir.StringAttr.get("triton_kernel_call_ffi")
        call.attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4)
        return results

    return lower


if RESULTS == "out_shape":
    on_cuda = functools.partial(triton_lib.triton_kernel_call_lowering, triton_lib.get_cuda_backend)
    mlir.register_lowering(triton_lib.triton_kernel_call_p, _for_graphs(on_cuda), platform="cuda")


@functools.cache
def _look_for_no_pytorch() -> None:
    """Triton's first look at an argument imports PyTorch where that is installed: seconds, for tensors ours never are.

    So the first look is this one, while PyTorch can't be found. Where it is imported already that costs nothing.
    """
    look = getattr(libtriton, "native_specialize_impl", None)  # which Triton before 3.5 has not
    if look is None or "torch" in sys.modules:
        return
    argument = types.SimpleNamespace(data_ptr=lambda: 16, dtype="fp32")
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        look(triton_lib.get_cuda_backend(0, 80), argument, False, True, True)
    finally:
        del sys.modules["torch"]


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
    _look_for_no_pytorch()
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
