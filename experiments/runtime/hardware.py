"""What is known of a device: its peak, its memory."""

import jax

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
