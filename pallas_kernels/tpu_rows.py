"""What kernels for TPU share: when they may run, their memory, and row kernels' way through blocks of full rows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from crescendo.pallas_kernels import tiles
from crescendo.pallas_kernels.op import Unsupported, target_device
from crescendo.pallas_kernels.sharded import result_like

# Of vector memory, for the arrays of a step, those of the next one and what lies between: float32 entries.
BLOCK_ENTRIES = 2**18
VMEM_BYTES = 64 * 2**20


def require_tpu() -> None:
    """Raises `Unsupported` unless a kernel may run where the call is being traced."""
    device = target_device()
    if device.platform != "tpu":
        raise Unsupported(f"needs a TPU, not {device}")
    axis_types = jax.sharding.get_abstract_mesh().axis_types
    alone = device.interpreted or (jax.devices()[0].platform == "tpu" and jax.device_count() == 1)
    if not (alone or AxisType.Manual in axis_types or AxisType.Explicit in axis_types):
        raise Unsupported("is not split by XLA: with several devices call it inside jax.shard_map or an explicit mesh")


def require_full_rows(width: int) -> None:
    """Raises `Unsupported` unless a kernel for rows of `width` may run where the call is being traced."""
    require_tpu()
    if 8 * width > BLOCK_ENTRIES:
        raise Unsupported(f"holds rows of at most {BLOCK_ENTRIES // 8:,} entries, not {width:,}")


@dataclasses.dataclass(frozen=True)
class RowBlock:
    """How a row kernel is cut up: `entries` of a block, at most."""

    entries: int = BLOCK_ENTRIES


def block_rows(rows: int, width: int) -> int:
    """Rows of a block: a multiple of 32, which every dtype's tiles divide, or all of them, or 8."""
    entries = tiles.tuned("tpu_rows", "blocks", {"width": width}, rows, RowBlock()).entries
    return min(rows, max(8, entries // (32 * -(-width // 128) * 128) * 32))


def on_blocks(
    kernel: Callable, rows: Sequence, of_groups: Sequence = (), *, results: int = 1, sums: int = 0
) -> tuple[Any, ...]:
    """Runs `kernel(*rows, *of_groups, *results, *sums)` on blocks of the rows of `[G, R, D]`, or `[R, D]`.

    Args:
      rows: arrays of one shape.
      of_groups: arrays `[G, D]`; a block sees its group's, `[1, D]`.
      results: how many, each as the first of the rows.
      sums: how many float32 `[G, D]`, which a group's blocks see one after the other in vector memory (`add_to_sum`).
    """
    first = rows[0]
    by_group = [array.reshape(-1, *first.shape[-2:]) for array in rows]
    groups, count, width = by_group[0].shape
    block = block_rows(count, width)
    of_rows = pl.BlockSpec((None, block, width), lambda g, r: (g, r, 0))
    of_group = pl.BlockSpec((None, 1, width), lambda g, r: (g, 0, 0))
    found = pl.pallas_call(
        kernel,
        grid=(groups, pl.cdiv(count, block)),
        in_specs=[of_rows] * len(rows) + [of_group] * len(of_groups),
        out_specs=[of_rows] * results + [of_group] * sums,
        out_shape=[
            *[result_like(first, by_group[0].shape, first.dtype)] * results,
            *[result_like(first, (groups, 1, width), jnp.float32)] * sums,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if sums else "parallel"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(*by_group, *(array[:, None, :] for array in of_groups))
    return *(array.reshape(first.shape) for array in found[:results]), *(array[:, 0] for array in found[results:])


def exists(shape: tuple[int, ...], rows: int):
    """Which entries of a block are of rows that are there, of so many in a group: what lies beyond is anything."""
    return pl.program_id(1) * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0) < rows


def add_to_sum(sum_ref, terms) -> None:
    """Adds up a block's rows of terms, after those of the group's blocks before."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.sum(terms, axis=0, keepdims=True)


def padded(array, axis: int, multiple: int, fill=0):
    """Filled up along an axis to a multiple of so many."""
    extra = -array.shape[axis] % multiple
    if not extra:
        return array
    pad = [(0, 0)] * array.ndim
    pad[axis] = (0, extra)
    return jnp.pad(array, pad, constant_values=fill)


def product(a, b, over):
    """`lax.dot_general` over two dimensions, in float32, of float32 without rounding to less."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (over, ((), ())), precision=precision, preferred_element_type=jnp.float32)
