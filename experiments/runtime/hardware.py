"""What is known of a device: its peak, its memory; and devices that are not there."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

from crescendo.experiments.runtime.encoding import read_text
from crescendo.experiments.runtime.errors import UserError
from crescendo.parallel.costs import Links


class KnownDevice(NamedTuple):
    """A device as its vendor states it.

    Attributes:
      name: what people call it.
      kinds: a regular expression of all of `device_kind`, without the maker's words before it.
      peak_flops_per_second: dense bfloat16 matrix products that add up in float32.
      memory_gib: of the device.
      links: to other devices, in the vendor's own machines; None: unknown here.
    """

    name: str
    kinds: str
    peak_flops_per_second: float
    memory_gib: int
    links: Links | None = None

    @property
    def device_kind(self) -> str:
        """The name, where a device has its kind."""
        return self.name

    @property
    def platform(self) -> str:
        """JAX's: "gpu" or "tpu"."""
        return "tpu" if self.name.startswith("TPU") else "gpu"

    @property
    def memory_bytes(self) -> int:
        """Of the device."""
        return self.memory_gib * 2**30


# One direction of NVLink, by the same data sheets, and of the network in a DGX with eight of them: an InfiniBand
# adapter of 200 (A100) or 400 Gb/s a GPU.
_DGX_A100, _DGX_H100, _DGX_B200 = (
    Links(nvlink, network, 8) for nvlink, network in ((300e9, 25e9), (450e9, 50e9), (900e9, 50e9))
)

# NVIDIA's from the products' data sheets, where a figure with sparsity is halved; of RTX cards from the architectures'
# white papers (Ampere GA102, Ada, RTX Blackwell), which state bfloat16 with FP32 accumulation: on GeForce cards half of
# what FP16 accumulation, and so the headline figure, has; on the RTX A6000 all of it. TPUs from Google Cloud's pages of
# each version, a chip; JAX has a device for each of the two cores of a TPU7x, which is half of one.
KNOWN_DEVICES = (
    KnownDevice("A10", "A10", 125e12, 24),
    KnownDevice("A100", "A100([- ].*)?", 312e12, 80, _DGX_A100),
    KnownDevice("A100 40GB", "A100-.*40GB", 312e12, 40, _DGX_A100),
    KnownDevice("B200", "B200", 2250e12, 180, _DGX_B200),
    KnownDevice("GB200", "GB200", 2500e12, 186),
    KnownDevice("H100", "H100( [0-9]+GB HBM3)?|GH200 .*", 989e12, 80, _DGX_H100),
    KnownDevice("H100 NVL", "H100 NVL", 835e12, 94),
    KnownDevice("H100 PCIe", "H100 PCIe", 756e12, 80),
    KnownDevice("H200", "H200", 989e12, 141, _DGX_H100),
    KnownDevice("H200 NVL", "H200 NVL", 835e12, 141),
    KnownDevice("L4", "L4", 121e12, 24),
    KnownDevice("L40S", "L40S", 362e12, 48),
    KnownDevice("RTX 3090", "RTX 3090", 71e12, 24),
    KnownDevice("RTX 4090", "RTX 4090", 165.2e12, 24),
    KnownDevice("RTX 5090", "RTX 5090", 209.5e12, 32),
    KnownDevice("RTX A6000", "RTX A6000", 154.8e12, 48),
    KnownDevice("TPU v4", "TPU v4", 275e12, 32),
    KnownDevice("TPU v5e", "TPU v5 lite|TPU v5e", 197e12, 16),
    KnownDevice("TPU v5p", "TPU v5p?", 459e12, 95),
    KnownDevice("TPU v6e", "TPU v6 lite|TPU v6e", 918e12, 32),
    KnownDevice("TPU7x", "TPU7x?", 1153.5e12, 96),
)


def known_device(device_kind: str) -> KnownDevice | None:
    """What is known of a device by its kind, as JAX reports it, or name; None of others, such as a part of one (MIG).

    >>> known_device("NVIDIA GeForce RTX 4090").peak_flops_per_second
    165200000000000.0
    >>> known_device("NVIDIA GeForce RTX 4090 Laptop GPU"), known_device("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    (None, None)
    """
    if " MIG " in device_kind:
        return None
    kind = device_kind.removeprefix("NVIDIA ").removeprefix("GeForce ")
    fitting = [known for known in KNOWN_DEVICES if re.fullmatch(known.kinds, kind)]
    return fitting[-1] if fitting else None


def named_device(name: str) -> KnownDevice:
    """A device that need not be there, by its name in any case, with or without spaces.

    Raises:
      UserError: for one that isn't known.

    >>> named_device("tpu v5e").memory_bytes, named_device("rtx4090").name
    (17179869184, 'RTX 4090')
    """

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]", "", text).lower()

    for known in KNOWN_DEVICES:
        if plain(known.name) == plain(name):
            return known
    raise UserError(f"--device {name}: known are {', '.join(known.name for known in KNOWN_DEVICES)}")


def peak_flops_per_second(device: jax.Device | KnownDevice) -> float | None:
    """The device's dense bfloat16 peak, or None where it isn't known (a CPU, say)."""
    known = known_device(device.device_kind)
    return known and known.peak_flops_per_second


def memory_bytes(device: jax.Device) -> int | None:
    """What the allocator may hand out on the device, or None where it doesn't say."""
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def topology_devices(name: str, target: Path | None) -> list:
    """The devices of a machine that need not be there, to compile for.

    Args:
      name: such as `v5p:16x16x16` or `h100:1x1x8`.
      target: for GPUs a file with XLA's description of them.

    Raises:
      UserError: an unknown name, or GPUs without a description.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    kind, _, shape = name.partition(":")
    try:
        if kind == "h100":
            if target is None or not target.is_file():
                raise UserError(
                    f"--topology {name} needs --target FILE, XLA's description of the GPU (GpuTargetConfig as text; "
                    "tests/aot/h100.txtpb in the source tree)"
                )
            return topologies.get_topology_desc("h100", "cuda", target_config=read_text(target), topology=shape).devices
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology {name}: {str(error).splitlines()[0][:200]}; names are such as v5e:4x4, v5p:16x16x16, v6e:8x8 "
            "(with crescendo[tpu] installed) or h100:1x1x8 (with jax-cuda13-plugin)"
        ) from None
