"""A block of threads: one warpgroup that loads, and consumers that compute, tile after tile."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.hopper.memory import REGISTERS


def warpgroups(
    consumers: int, rounds, *, load: Callable, compute: Callable, begin=None, drain: Callable, end: Callable
):
    """The body of a kernel that `launch` launches.

    Args:
      consumers: warpgroups that compute.
      rounds: tiles of this block of threads.
      load: `(n, step) -> step`, of the warpgroup that loads: fills rings for tile n, from step `step` on.
      compute: `(consumer, n, step) -> step`, of each of the others: works on tile n.
      begin: `(consumer)`, before the first tile; None: nothing.
      drain: `(steps)`, after the last one of the warpgroup that loads: drains its rings.
      end: `(consumer)`, after the last one of a consumer.
    """
    warpgroup = lax.axis_index("wg")

    @pl.when(warpgroup == consumers)
    def _load():
        plgpu.set_max_registers(REGISTERS[consumers][0], action="decrease")
        drain(lax.fori_loop(0, rounds, load, jnp.int32(0)))

    @pl.when(warpgroup < consumers)
    def _compute():
        plgpu.set_max_registers(REGISTERS[consumers][1], action="increase")
        if begin is not None:
            begin(warpgroup)
        lax.fori_loop(0, rounds, lambda n, step: compute(warpgroup, n, step), jnp.int32(0))
        end(warpgroup)


def launch(body: Callable, *, consumers: int, blocks: int, scratch: Any, out_type: Any = ()) -> Callable:
    """`plgpu.kernel` of so many blocks of threads, each of `warpgroups`; the grid's axis is "block"."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="wg",
    )
