"""What kernels for TPU share: when they may run, their memory, and how many rows a row kernel's block holds."""

import jax
from jax.sharding import AxisType

from crescendo.pallas_kernels.op import Unsupported, target_device

# Of vector memory, for the arrays of a step, those of the next one and what lies between: float32 entries.
BLOCK_ENTRIES = 2**18
VMEM_BYTES = 64 * 2**20


def require_tpu() -> None:
    """Raises `Unsupported` unless a kernel may run where the call is being traced."""
    device = target_device()
    if device.platform != "tpu":
        raise Unsupported(f"needs a TPU, not {device}")
    axis_types = jax.sharding.get_abstract_mesh().axis_types
    alone = jax.devices()[0].platform == "tpu" and jax.device_count() == 1
    if not (alone or AxisType.Manual in axis_types or AxisType.Explicit in axis_types):
        raise Unsupported("is not split by XLA: with several devices call it inside jax.shard_map or an explicit mesh")


def require_full_rows(width: int) -> None:
    """Raises `Unsupported` unless a kernel for rows of `width` may run where the call is being traced."""
    require_tpu()
    if 8 * width > BLOCK_ENTRIES:
        raise Unsupported(f"holds rows of at most {BLOCK_ENTRIES // 8:,} entries, not {width:,}")


def block_rows(rows: int, width: int) -> int:
    """Rows of a block: a multiple of 32, which every dtype's tiles divide, or all of them."""
    return min(rows, max(8, BLOCK_ENTRIES // (32 * -(-width // 128) * 128) * 32))
