"""Rows of a matrix that stream through the shared memory of a Hopper GPU, in Pallas' Mosaic GPU dialect.

A block of 128 threads takes every n-th row. The copy engine brings the next rows while the block works on one, and
takes away the results, which lie where the row was: between the passes over a row nothing is read from device memory
twice. So many blocks share a streaming multiprocessor as its shared memory holds: one waits while others compute.

A row is `[W / 128, 128]` for the copy engine, and is worked on in pieces of `PIECE` entries, 16 to a thread.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.op import Unsupported, require_gpu, target_device

LANES = 128
PIECE = 2048
# Of a streaming multiprocessor, for blocks that share it, with 1 KiB that each costs besides.
SHARED_BYTES = 220 * 1024
MAX_BLOCKS = 8
# Rows of a block in shared memory: one to work on, one on its way out, others on their way in.
STAGES = 4


def require_whole_lanes(width: int, bytes_of_a_row: int) -> None:
    """Refuses what doesn't suit the copy engine or shared memory."""
    require_gpu(9.0, below=10.0)
    if width % LANES:
        raise Unsupported(f"needs rows of a multiple of {LANES} entries, not {width:,}")
    if width > 256 * LANES or 3 * bytes_of_a_row > SHARED_BYTES:
        raise Unsupported(f"holds three rows in shared memory, which rows of {width:,} entries are too long for")


def geometry(row_bytes: int, other_bytes: int = 0) -> tuple[int, int]:
    """Stages of a block, and blocks of a streaming multiprocessor."""
    stages = next(n for n in (STAGES, 3) if n == 3 or 2 * (n * row_bytes + other_bytes) <= SHARED_BYTES)
    return stages, max(1, min(MAX_BLOCKS, SHARED_BYTES // (stages * row_bytes + other_bytes + 1024)))


def pieces(width: int) -> list[pl.Slice]:
    """Lines of 128 entries, as many at a time as make a piece."""
    lines, together = width // LANES, PIECE // LANES
    return [pl.ds(first, min(together, lines - first)) for first in range(0, lines, together)]


def load(ref, dtype):
    """A piece in float32, each thread's entries those that it has of a piece of that dtype."""
    size = math.prod(ref.shape)
    vector = min(8 // jnp.dtype(dtype).itemsize, size // LANES)
    while size % (vector * LANES):
        vector //= 2
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=vector)).astype(jnp.float32)


def total(reduce: Callable, combine: Callable, parts: Sequence[jax.Array]):
    """One number of the whole row: pieces of a size are combined first, entry by entry."""
    by_shape: dict[tuple, jax.Array] = {}
    for part in parts:
        by_shape[part.shape] = combine(by_shape[part.shape], part) if part.shape in by_shape else part
    return functools.reduce(combine, [reduce(part) for part in by_shape.values()])


def stream(count, row_of: Callable, sources, results: dict[int, Any], slots, ready, visit: Callable, carry=None):
    """Visits rows that are copied ahead: `visit(row, refs, carry) -> carry`, results left in the place of sources.

    Args:
      count: of the rows of this block.
      row_of: `n -> row`, the index that `sources` and `results` take.
      sources: arrays in device memory, `[rows, W / 128, 128]`.
      results: from the number of a source to the array that takes what is left in its place.
      slots: shared memory, `[sources, stages, W / 128, 128]`.
      ready: a barrier for each stage, with as many arrivals as there are sources.
    """
    stages = slots.shape[1]

    def fetch(n, slot):
        for i, source in enumerate(sources):
            plgpu.copy_gmem_to_smem(source.at[row_of(n)], slots.at[i, slot], ready.at[slot])

    for n in range(stages):
        pl.when(n < count)(functools.partial(fetch, n, n))

    def step(n, carry):
        slot = lax.rem(n, stages)
        plgpu.barrier_wait(ready.at[slot])
        row = row_of(n)
        carry = visit(row, [slots.at[i, slot] for i in range(len(sources))], carry)
        plgpu.commit_smem()
        for i, result in results.items():
            plgpu.copy_smem_to_gmem(slots.at[i, slot], result.at[row], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        # The row before has left.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        ahead = n - 1 + stages

        @pl.when((n > 0) & (ahead < count))
        def _():
            fetch(ahead, lax.rem(ahead, stages))

        return carry

    carry = lax.fori_loop(0, count, step, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry


def call(body: Callable, arrays, out_types, *, blocks: int, stages: int, sources: int, row: tuple, dtype, scratch=()):
    """`plgpu.kernel` with slots and barriers for `stream`: `body(*arrays, *results, slots, ready, *scratch)`."""
    return plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=[
            plgpu.SMEM((sources, stages, *row), dtype),
            plgpu.Barrier(num_arrivals=sources, num_barriers=stages),
            *scratch,
        ],
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*arrays)


def blocks_of(rows: int, blocks: int) -> int:
    """Blocks for the whole device, not more than there are rows."""
    return min(rows, blocks * target_device().cores)
