"""What the compiler is told of a training step, and what it says of a program."""

from typing import Any

import jax
from jax.sharding import Mesh

from crescendo.models.low_precision import check_device
from crescendo.pallas_kernels.op import target

# By platform. XLA would make one product of the projections to keys and to values, which share their input: their
# results are then cut out of it, and their gradients put together again, by copies of all of them.
STEP_OPTIONS: dict[str, dict[str, int]] = {"gpu": {"xla_gpu_dot_merger_threshold_mb": 0}}


def options(task: Any, platform: str, layout: Any = None) -> dict[str, int]:
    """What XLA is told of a program that computes a task's loss over a layout.

    Of products in 8 bits cuBLAS' kernels are the fastest here; those that XLA would make itself, to compare, take it a
    quarter of a minute for each shape. Where tokens are sent to experts in chunks, XLA is to put work beside what is
    sent, which on GPUs it else does for few of them.

    >>> options(None, "cpu")
    {}
    """
    quantised = getattr(getattr(task, "config", None), "matmul", "dtype") != "dtype"
    further = {"xla_gpu_enable_triton_gemm": False} if quantised and platform == "gpu" else {}
    if platform == "gpu" and layout is not None and layout.strategy.expert_chunks > 1:
        further |= {"xla_gpu_enable_latency_hiding_scheduler": True}
    return STEP_OPTIONS.get(platform, {}) | further


def check_numbers(model: Any, mesh: Any) -> None:
    """Raises ValueError for a model whose products are in numbers that the mesh's devices don't have, if it has any."""
    if isinstance(mesh, Mesh):
        with target(mesh.devices.flat[0]):
            check_device(getattr(model, "matmul", "dtype"))


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """A device's memory at the peak: arguments, results that take no argument's place, and temporaries."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
