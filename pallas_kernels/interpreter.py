"""Kernels without their device: calls run here, each kernel in the interpreter of its language.

Whatever asks for the target device is told of one whose kind begins with "interpreted": Pallas' kernels for Hopper and
for TPU are run by Pallas' interpreters, which detect races, and Triton's by `triton_interpreter`. All of it is slow,
seconds for a call of a few hundred rows.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice

from crescendo.pallas_kernels.hopper.products import sums_aside
from crescendo.pallas_kernels.op import INTERPRETED, target


@contextlib.contextmanager
def interpreted(device: AbstractDevice, *, seed: int | None = None) -> Iterator[None]:
    """Calls of ops within are traced for `device` and run here, also those that `jax.jit` compiles within.

    Memory is NaN before it is written.

    Args:
      device: a GPU or a TPU. Of few cores, so that each has several tiles to work on; Triton's kernels want one.
      seed: of the order in which a TPU's parallel steps are taken.

    Raises:
      RuntimeError: at the end, if parts of a kernel raced with each other.

    >>> import jax.numpy as jnp
    >>> from crescendo.pallas_kernels import swiglu
    >>> with interpreted(AbstractDevice("NVIDIA H100 80GB HBM3", 2, "gpu")):
    ...     y = swiglu(jnp.ones(128), jnp.full(128, 2.0), implementation="mosaic_gpu")
    >>> print(y[:2])
    [1.4621172 1.4621172]
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu

    # The interpreter has no instructions of the machine's own, of which there is a fence (`hopper.rows`).
    of_gpu = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")
    of_tpu = pltpu.InterpretParams(detect_races=True, random_seed=seed, num_cores_or_threads=2)
    on_gpu = device.platform == "gpu"
    mode = plgpu.force_gpu_interpret_mode(of_gpu) if on_gpu else pltpu.force_tpu_interpret_mode(of_tpu)
    reset = gpu.reset_gpu_interpret_mode_state if on_gpu else tpu.reset_tpu_interpret_mode_state
    reset()  # what an interpreter that was stopped has left
    with (
        target(AbstractDevice(INTERPRETED + device.device_kind, device.num_cores, device.platform)),
        sums_aside(),
        mode,
    ):
        try:
            yield
            jax.effects_barrier()
        except BaseException:
            reset()
            raise
    races = gpu._races if on_gpu else tpu.races
    if races is not None and races.races_found:
        raise RuntimeError(f"parts of a kernel raced with each other on {device}: see what was printed")
