"""Runs Triton kernels on the CPU, one program after the other (`interpreter`).

A program that waits for another never ends, so the device must be one of a single core. Triton's interpreter changes
Triton for the rest of the process: nothing can be compiled by it afterwards.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from triton.runtime import interpreter, jit

NAMES = {
    **{"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int8": "i8"},
    **{"float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5"},
}


class Memory:
    """As much of a torch tensor as the interpreter asks for, over a numpy array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = NAMES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return Memory(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    size = stride = storage_offset

    def copy_(self, other):
        assert other.array is self.array


def run(
    *arrays: jax.Array,
    kernel: Any,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    zeroed: Sequence[int],
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Results of the kernel, as of `triton_call`; what it doesn't write stays NaN."""

    def on_host(*arrays):
        given = [np.array(array, copy=True, order="C") for array in arrays]
        results = []
        for i, shape in enumerate(out_shape):
            value = 0 if i in zeroed or not jax.numpy.issubdtype(shape.dtype, np.floating) else np.nan
            results.append(np.full(shape.shape, value, shape.dtype))
        with _functions_called_by_kernels():
            interpreter.InterpretedFunction(kernel.fn)[grid](*map(Memory, given + results), **constants)
        return tuple(results)

    shapes = tuple(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in out_shape)
    return jax.pure_callback(on_host, shapes, *arrays, vmap_method="sequential")


@contextlib.contextmanager
def _functions_called_by_kernels() -> Iterator[None]:
    """Other `@triton.jit` functions are interpreted too, and a loaded scalar may be a loop's bound."""
    call, patch = jit.JITFunction.__call__, interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        # It is an array of one entry there, which NumPy doesn't take for an integer any more.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    jit.JITFunction.__call__ = lambda self, *args, **kwargs: interpreter.InterpretedFunction(self.fn)(*args, **kwargs)
    interpreter._patch_lang_tensor = patched
    try:
        yield
    finally:
        jit.JITFunction.__call__, interpreter._patch_lang_tensor = call, patch
