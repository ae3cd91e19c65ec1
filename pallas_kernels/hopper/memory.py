"""Shared memory and registers of a Hopper GPU: what a block of threads may have, and how its arrays lie there."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

SHARED_BYTES = 227 * 1024  # of a block of threads
ROWS = 64  # of a warpgroup's matrix instruction
# Of a thread of the producer and of a consumer, by the number of consumers: together at most what they start with.
REGISTERS = {1: (40, 240), 2: (24, 240), 3: (32, 160)}
OTHER_REGISTERS = 8  # that a thread needs at least, beside matrices


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory laid out for the copy engine and the matrix instructions."""
    # mypy takes a protocol's method for abstract.
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def size_bytes(scratch: Any) -> int:
    """The shared memory that a kernel's scratch types take.

    >>> size_bytes([plgpu.SMEM((4, 128), jnp.float32), {"full": plgpu.Barrier(num_barriers=3)}, None])
    2072
    """
    total = 0
    for leaf in jax.tree.leaves(scratch, is_leaf=lambda each: isinstance(each, plgpu.Barrier)):
        barriers = isinstance(leaf, plgpu.Barrier)
        total += (
            8 * math.prod(leaf.num_barriers) if barriers else math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
        )
    return total


def fits(scratch: Any, matrices: int, consumers: int) -> bool:
    """Whether shared memory holds the scratch, and a consumer's thread its share of the matrices, in registers."""
    return size_bytes(scratch) <= SHARED_BYTES and matrices + OTHER_REGISTERS <= REGISTERS[consumers][1]
