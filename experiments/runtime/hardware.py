"""What is known of a device: its peak, its memory; and devices that are not there."""

import os
from pathlib import Path

import jax
from jax.experimental import topologies

from crescendo.experiments.runtime.encoding import read_text
from crescendo.experiments.runtime.errors import UserError

# Dense bfloat16 FLOP/s by a piece of `device_kind`, from the vendors' datasheets.
PEAK_FLOPS_PER_SECOND = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops_per_second(device: jax.Device) -> float | None:
    """The device's dense bfloat16 peak, or None where it isn't known (a CPU, say)."""
    for kind, peak in PEAK_FLOPS_PER_SECOND.items():
        if kind in device.device_kind:
            return peak
    return None


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
