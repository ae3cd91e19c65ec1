"""Device meshes."""

from collections.abc import Sequence

import jax
import numpy as np

AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, *, devices: Sequence | None = None) -> jax.sharding.Mesh:
    """A mesh with the axes `data` (batch split, parameters replicated) and `fsdp` (both split).

    Args:
      data: devices along `data`; -1 takes the rest.
      fsdp: devices along `fsdp`; -1 takes the rest.
      devices: the devices to use; all of them when None.

    Raises:
      ValueError: when the product isn't the number of devices.

    >>> make_mesh(devices=jax.devices()[:1]).shape["data"]
    1
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp]
    if sizes.count(-1) > 1 or any(size != -1 and size < 1 for size in sizes):
        raise ValueError(f"mesh data = {data}, fsdp = {fsdp}: each must be at least 1, and one of them may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // -(sizes[0] * sizes[1])
    if sizes[0] * sizes[1] != len(devices):
        raise ValueError(
            f"mesh data = {data}, fsdp = {fsdp} does not cover the {len(devices)} devices: "
            f"their product must be {len(devices)} (-1 takes the rest)"
        )
    return jax.sharding.Mesh(np.array(devices).reshape(sizes), AXES)
