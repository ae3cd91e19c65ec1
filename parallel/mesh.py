"""Device meshes: six named axes, sizes by `MeshSpec`, and an order of devices that follows their links."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import numpy as np
from annotated_types import MinLen
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from crescendo.ranges import Count, check_fields

# From the slowest links to the fastest: neighbours along the last axis talk most.
AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")
# Several machines or slices are joined by slow links, so they take their factor from these axes, in this order.
SLOW_AXES = ("data", "stage", "fsdp", "expert", "sequence", "tensor")
# In a mesh the axis of stages comes behind those of the batch: XLA wants the axes of a manual region inside another one
# behind those of the outer one, and a pipeline is inside of what splits the batch. No device's place is another for it.
_ORDER = ("data", "fsdp", "expert", "stage", "sequence", "tensor")
Extent = Literal[-1] | Count


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many devices lie along each axis of a mesh; -1, at most once, takes the rest.

    Args:
      data: the batch is split, parameters are replicated.
      fsdp: the batch is split, and so is what the strategy splits: optimizer state, gradients, parameters.
      tensor: heads, feed-forward width and vocabulary are split (Megatron; Shoeybi et al. 2019).
      sequence: tokens of a row are split (ring attention; Liu et al. 2023; Ulysses; Jacobs et al. 2023).
      expert: the batch is split outside of experts, the experts inside.
      stage: layers are split into pipeline stages.

    Raises:
      ValueError: for a size that is neither -1 nor at least 1, or more than one -1.

    >>> MeshSpec(data=-1, tensor=2).sizes(8)
    {'stage': 1, 'data': 4, 'fsdp': 1, 'expert': 1, 'sequence': 1, 'tensor': 2}
    """

    data: Extent = -1
    fsdp: Extent = 1
    tensor: Extent = 1
    sequence: Extent = 1
    expert: Extent = 1
    stage: Extent = 1

    def __post_init__(self):
        check_fields(self)
        if [getattr(self, axis) for axis in AXES].count(-1) > 1:
            raise ValueError(f"mesh {self}: only one of them may be -1")

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ", ".join(f"{axis} = {n}" for axis, n in shown.items() if n != 1 or axis in ("data", "fsdp"))

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of every axis over so many devices.

        Raises:
          ValueError: when the product isn't the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        sizes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
        if math.prod(sizes.values()) != devices:
            free = -1 in (getattr(self, axis) for axis in AXES)
            fix = f"{fixed} must divide {devices}" if free else f"their product must be {devices} (-1 takes the rest)"
            raise ValueError(f"mesh {self} does not cover the {devices} devices: {fix}")
        return sizes

    def make(self, devices: Sequence | None = None) -> Mesh:
        """The mesh over `devices`, or over all there are.

        On TPUs neighbours in the mesh are neighbours in the torus. Several hosts or slices, joined by slower links,
        are split along `data` as far as it goes, then `stage`, then `fsdp`, and so on.
        """
        devices = list(jax.devices() if devices is None else devices)
        sizes = self.sizes(len(devices))
        shape = list(sizes.values())
        if devices[0].platform == "tpu":
            slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
            if slices == 1:
                return _mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True))
            slow = slow_factors(sizes, slices)
            fast = [n // m for n, m in zip(shape, slow, strict=True)]
            return _mesh(mesh_utils.create_hybrid_device_mesh(fast, slow, devices, allow_split_physical_axes=True))
        devices.sort(key=lambda d: (d.process_index, d.id))
        hosts = len({d.process_index for d in devices})
        if hosts == 1 or len(devices) % hosts:
            # All links are alike, and XLA compiles best for devices in the mesh's own order.
            in_order = np.array(devices).reshape([sizes[axis] for axis in _ORDER])
            return _mesh(in_order.transpose([_ORDER.index(axis) for axis in AXES]))
        slow = slow_factors(sizes, hosts)
        fast = [n // m for n, m in zip(shape, slow, strict=True)]
        # [slow axes..., fast axes...] -> [(slow, fast) of each axis]
        order = [i for axis in range(len(shape)) for i in (axis, axis + len(shape))]
        return _mesh(np.array(devices).reshape(*slow, *fast).transpose(order).reshape(shape))

    def abstract(self, devices: int) -> AbstractMesh:
        """The mesh with no devices behind it: enough to know what every device would hold.

        >>> MeshSpec(fsdp=64, tensor=8).abstract(4096).shape["data"]
        8
        """
        sizes = self.sizes(devices)
        return AbstractMesh(tuple(sizes[axis] for axis in _ORDER), _ORDER, axis_types=(AxisType.Auto,) * len(_ORDER))


def make_mesh(
    data: Extent = -1,
    fsdp: Extent = 1,
    tensor: Extent = 1,
    sequence: Extent = 1,
    expert: Extent = 1,
    stage: Extent = 1,
    *,
    devices: Annotated[Sequence[jax.Device], MinLen(1)] | None = None,
) -> Mesh:
    """`MeshSpec(...).make(devices)`.

    Args:
      devices: which ones; None: all.

    >>> make_mesh(devices=jax.devices()[:1]).shape["data"]
    1
    """
    return MeshSpec(data, fsdp, tensor, sequence, expert, stage).make(devices)


def slow_factors(sizes: dict[str, int], groups: int) -> list[int]:
    """Which part of each axis goes across the slow links between `groups` hosts or slices; the product is `groups`.

    There always is one, since `groups` divides the product of the sizes.

    >>> slow_factors({"stage": 1, "data": 2, "fsdp": 8, "expert": 1, "sequence": 1, "tensor": 4}, groups=8)
    [1, 2, 4, 1, 1, 1]
    """
    factors = dict.fromkeys(AXES, 1)
    left = groups
    for axis in SLOW_AXES:
        factors[axis] = math.gcd(sizes[axis], left)
        left //= factors[axis]
    return [factors[axis] for axis in AXES]


def _mesh(devices: np.ndarray) -> Mesh:
    devices = devices.transpose([AXES.index(axis) for axis in _ORDER])
    return Mesh(devices, _ORDER, axis_types=(AxisType.Auto,) * len(_ORDER))
