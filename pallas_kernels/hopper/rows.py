"""Rows of a matrix that stream through the shared memory of a Hopper GPU, in Pallas' Mosaic GPU dialect.

A block of 128 threads takes every n-th row. The copy engine brings the next rows while the block works on one, and
takes away the results, which lie where the row was: between the passes over a row nothing is read from device memory
twice. So many blocks share a streaming multiprocessor as its shared memory holds: one waits while others compute.

A row is `[W / 128, 128]` for the copy engine, and is worked on in pieces (`Cut`). A long row is shared by the blocks of
a cluster, which tell each other a few numbers of each row: they go on with the next row while these are on their way.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels import tiles
from crescendo.pallas_kernels.op import Unsupported, require_gpu, target_device
from crescendo.pallas_kernels.sharded import results_of

LANES = 128
# Of a streaming multiprocessor, for blocks that share it, with 1 KiB that each costs besides.
SHARED_BYTES = 220 * 1024


@dataclasses.dataclass(frozen=True)
class Cut:
    """How rows are cut up.

    Attributes:
      piece: entries that a block works on at a time, 16 to a thread.
      held: entries of a row, or of two, that a block keeps in registers between two passes.
      blocks: of a streaming multiprocessor at most.
      stages: rows of a block in shared memory: one to work on, one on its way out, others on their way in.
      part_bytes: a row of more is shared by two blocks, or four, or eight.
      cluster_rows: that a cluster of blocks takes.
    """

    piece: int = 2048
    held: int = 8192
    blocks: int = 8
    stages: int = 4
    part_bytes: int = 32 * 1024
    cluster_rows: int = 8


def cut() -> Cut:
    """How they are cut up on the target device."""
    return tiles.tuned("hopper", "rows", {}, 1, Cut())


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How rows are spread over the device.

    Attributes:
      parts: blocks that share a row, a cluster.
      lines: of 128 entries, of a part.
      stages: rows of a block in shared memory: those on their way, and those worked on.
      blocks: of a streaming multiprocessor.
    """

    parts: int
    lines: int
    stages: int
    blocks: int

    def clusters(self, rows: int) -> int:
        """So many as run at a time; of long rows a few for each, as not all multiprocessors suit a cluster."""
        at_once = self.blocks * target_device().cores // self.parts
        return min(rows, at_once if self.parts == 1 else -(-rows // cut().cluster_rows))


def geometry(width: int, bytes_of_an_entry: int, other_bytes: int = 0, *, shared: bool = False) -> Geometry:
    """For rows of that width, with so many bytes besides for a block; `shared` if blocks may share a row.

    Raises:
      Unsupported: rows that don't suit the copy engine or shared memory.
    """
    require_gpu(9.0, below=10.0)
    usual, lines = cut(), width // LANES
    if width % LANES:
        raise Unsupported(f"needs rows of a multiple of {LANES} entries, not {width:,}")
    fitting = [
        parts
        for parts in ((1, 2, 4, 8) if shared else (1,))
        if not lines % parts
        and lines // parts <= 256
        and 3 * (lines // parts * LANES * bytes_of_an_entry) + other_bytes <= SHARED_BYTES
    ]
    if not fitting:
        raise Unsupported(f"can't hold three rows of {width:,} entries in shared memory")
    small = [parts for parts in fitting if width // parts * bytes_of_an_entry <= usual.part_bytes]
    parts = min(small) if small else max(fitting)
    row_bytes = width // parts * bytes_of_an_entry
    stages = next(n for n in (usual.stages, 3) if n == 3 or 2 * (n * row_bytes + other_bytes) <= SHARED_BYTES)
    blocks = max(1, min(usual.blocks, SHARED_BYTES // (stages * row_bytes + other_bytes + 1024)))
    return Geometry(parts, lines // parts, stages, blocks)


def pieces(width: int) -> list[pl.Slice]:
    """Lines of 128 entries, as many at a time as make a piece."""
    lines, together = width // LANES, cut().piece // LANES
    return [pl.ds(first, min(together, lines - first)) for first in range(0, lines, together)]


def load(ref, dtype):
    """A piece in float32, each thread's entries those that it has of a piece of that dtype."""
    return plgpu.load(ref, layout=_layout(ref.shape, dtype)).astype(jnp.float32)


def zeros(shape, dtype):
    """The same of nothing."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _layout(shape, dtype))


def _layout(shape, dtype):
    size = math.prod(shape)
    vector = min(8 // jnp.dtype(dtype).itemsize, size // LANES)
    while size % (vector * LANES):
        vector //= 2
    return plgpu.Layout.WG_STRIDED(shape, vec_size=vector)


def total(reduce: Callable, combine: Callable, parts: Sequence[jax.Array]):
    """One number of all of the row: pieces of a size are combined first, entry by entry."""
    by_shape: dict[tuple, jax.Array] = {}
    for part in parts:
        by_shape[part.shape] = combine(by_shape[part.shape], part) if part.shape in by_shape else part
    return functools.reduce(combine, [reduce(part) for part in by_shape.values()])


def stream(count, row_of: Callable, sources, results: dict[int, Any], slots, ready, visit: Callable, carry=None):
    """Visits rows that are copied ahead: `visit(row, refs, carry) -> carry`, results left in the place of sources.

    Args:
      count: of the rows of this block.
      row_of: `n -> index` of the row's part in `sources` and `results`.
      sources: arrays in device memory, `[rows, parts, lines, 128]`.
      results: from the number of a source to the array that takes what is left in its place.
      slots: shared memory, `[sources, stages, lines, 128]`.
      ready: a barrier for each stage, with as many arrivals as there are sources.
    """
    stages = slots.shape[1]

    def step(n, carry):
        refs = _arrived(slots, ready, n)
        carry = visit(row_of(n), refs, carry)
        _leave(refs, results, row_of(n))
        # The row before has left.
        _fetch(n - 1 + stages, (n > 0) & (n - 1 + stages < count), row_of, sources, slots, ready)
        return carry

    for n in range(stages):
        _fetch(n, n < count, row_of, sources, slots, ready)
    carry = lax.fori_loop(0, count, step, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry


def stream_parts(count, row_of: Callable, sources, results, slots, ready, meeting, first: Callable, second: Callable):
    """The same for parts of rows: `first(refs) -> numbers`, and `second(refs, numbers of each part)` a row later.

    Args:
      meeting: `(numbers, met)`, an array in device memory, float32 `[rows, parts, 2]`, and two barriers of the cluster.
    """
    stages = slots.shape[1]
    numbers, met = meeting

    def step(n, _):
        @pl.when(n < count)
        def _this_row():
            for i, number in enumerate(first(_arrived(slots, ready, n))):
                numbers[(*row_of(n), i)] = number
            fence()
            plgpu.barrier_arrive(met.at[lax.rem(n, 2)])

        @pl.when(n > 0)
        def _row_before():
            before = n - 1
            plgpu.barrier_wait(met.at[lax.rem(before, 2)])
            fence()
            refs = [slots.at[i, lax.rem(before, stages)] for i in range(len(sources))]
            row = row_of(before)[0]
            second(refs, [[numbers[row, part, i] for i in range(2)] for part in range(numbers.shape[1])])
            _leave(refs, results, row_of(before))
            _fetch(n - 2 + stages, (n > 1) & (n - 2 + stages < count), row_of, sources, slots, ready)

    for n in range(stages):
        _fetch(n, n < count, row_of, sources, slots, ready)
    lax.fori_loop(0, count + 1, step, None)
    plgpu.wait_smem_to_gmem(0)


def fence() -> None:
    """Orders what this thread has written and reads, for all of the device."""

    @plgpu.inline_mgpu()
    def emit(_):
        from jax.experimental.mosaic.gpu import utils

        utils.inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)

    emit()


def _fetch(n, wanted, row_of, sources, slots, ready):
    """Begins to copy row number n."""

    @pl.when(wanted)
    def _():
        slot = lax.rem(n, slots.shape[1])
        for i, source in enumerate(sources):
            plgpu.copy_gmem_to_smem(source.at[row_of(n)], slots.at[i, slot], ready.at[slot])


def _arrived(slots, ready, n):
    """Row number n in shared memory, once it is there."""
    slot = lax.rem(n, slots.shape[1])
    plgpu.barrier_wait(ready.at[slot])
    return [slots.at[i, slot] for i in range(slots.shape[0])]


def _leave(refs, results, place):
    """Begins to copy results away, and waits until the row before has left."""
    plgpu.commit_smem()
    for i, result in results.items():
        plgpu.copy_smem_to_gmem(refs[i], result.at[place], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)


def call(body: Callable, arrays, out_types, how: Geometry, clusters: int, *, sources: int, dtype, scratch=()):
    """`plgpu.kernel` with slots and barriers for `stream`: `body(*arrays, *results, slots, ready, *scratch)`.

    The axes are "row" and, where blocks share one, "part"; two barriers of the cluster are then there besides.
    """
    scratch = [
        plgpu.SMEM((sources, how.stages, how.lines, LANES), dtype),
        plgpu.Barrier(num_arrivals=sources, num_barriers=how.stages),
        *scratch,
    ]
    cluster: dict[str, Any] = {}
    if how.parts > 1:
        scratch.append(plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=2))
        cluster = {"cluster": (how.parts,), "cluster_names": ("part",)}
    results = plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=scratch,
        grid=(clusters,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **cluster,
    )(*arrays)
    return results_of(arrays, results)
