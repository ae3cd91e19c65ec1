"""Runs Hopper kernels in Pallas' interpreter, with its race detector."""

import contextlib

import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.sharding import AbstractDevice

from crescendo.pallas_kernels.hopper import products
from crescendo.pallas_kernels.op import target


@pytest.fixture
def interpreted():
    """A context in which the kernels run here, for a GPU of few cores, so that a block of threads takes several tiles.

    Fails on a race.
    """

    @contextlib.contextmanager
    def context():
        device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=2, platform="gpu")
        with target(device), products.interpreted(detect_races=True):
            yield
        assert not gpu_callbacks.get_races().races_found

    return context
