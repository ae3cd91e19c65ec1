"""Runs attention's Hopper kernels in Pallas' interpreter, with its race detector.

The interpreter knows neither accumulators that start from registers nor left operands in registers, so what the kernels
say through `begin`, `product` and `finish` is said in other words here: such a part of a sum is kept aside, and added
when the accumulator is read.
"""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice

from crescendo.pallas_kernels.attention import mosaic_gpu
from crescendo.pallas_kernels.op import target


@pytest.fixture
def interpreted(monkeypatch):
    """A context in which the kernels run here, for a GPU of few cores, so that a block of threads takes several tiles.

    Fails on a race.
    """
    aside: dict[int, jax.Array] = {}
    issued: set[int] = set()

    def begin(accumulator, value):
        aside[id(accumulator)] = value

    def product(accumulator, a, b):
        key = id(accumulator)
        if isinstance(a, jax.Array):
            value = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # the matrix instruction would have read `b` as the copies write it
            aside[key] = aside[key] + value if key in aside else value
        else:
            plgpu.wgmma(accumulator, a, b)
            issued.add(key)

    def finish(accumulator, in_flight: int = 0):
        del in_flight
        key = id(accumulator)
        value = aside.pop(key, None)
        if value is None or key in issued:
            issued.discard(key)
            return accumulator[...] if value is None else accumulator[...] + value
        return value

    for name, function in {"begin": begin, "product": product, "finish": finish}.items():
        monkeypatch.setattr(mosaic_gpu, name, function)

    @contextlib.contextmanager
    def context():
        device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=2, platform="gpu")
        with (
            target(device),
            plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
        ):
            yield
        assert not gpu_callbacks.get_races().races_found

    return context
