"""Pallas for TPU: blocks of rows in fixed places, visited once for each group that has rows in them.

Visits are in the order of the rows, so a block of the result stays in vector memory until its last visit. A visit sets
the rows of other groups to 0. In the gradient of w a group's visits follow each other, one at least.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from crescendo.pallas_kernels.grouped_matmul.gradient import Products
from crescendo.pallas_kernels.grouped_matmul.groups import borders, tiles_of
from crescendo.pallas_kernels.rows import check
from crescendo.pallas_kernels.sharded import result_like
from crescendo.pallas_kernels.tpu_rows import VMEM_BYTES, product, require_tpu

ROWS = 128  # of a block
BLOCKS = (512, 384, 256, 128)  # of the other dimensions: the first that divides, or all of it


def grouped_matmul(x, w, sizes):
    """See the op."""
    del sizes
    require_tpu()
    check(x, w, dtypes=(jnp.float32, jnp.bfloat16))
    return Products(of_rows, of_groups)


def _block(size: int) -> int:
    return next((block for block in BLOCKS if size % block == 0), size)


def _visits(sizes, count: int, *, least: int):
    """What is known before a kernel begins: each visit's group and first row, where groups lie, how many visits."""
    at = borders(sizes, count)
    group, first, behind = tiles_of(at, count, ROWS, ROWS, least)
    return group, first, *at, behind[-1:]


def _kept(ref, group, first, begin_ref, end_ref):
    """A block's rows of a group, the others 0."""
    row = first + lax.broadcasted_iota(jnp.int32, ref.shape, 0)
    return jnp.where((row >= begin_ref[group]) & (row < end_ref[group]), ref[...], 0)


def of_rows(a, w, sizes, transposed: bool):
    """Of the gradient's rule, on one device's arrays."""
    (count, depth), groups = a.shape, len(sizes)
    columns = w.shape[1] if transposed else w.shape[2]
    known = _visits(sizes, count, least=0)
    deep, broad = _block(depth), _block(columns)

    def kernel(group_ref, first_ref, begin_ref, end_ref, visits_ref, a_ref, w_ref, y_ref, sums_ref):
        n, k = pl.program_id(1), pl.program_id(2)
        visits = visits_ref[0]
        group, first = group_ref[n], first_ref[n]
        there = n < visits

        @pl.when(there & (k == 0) & ((n == 0) | (first_ref[jnp.maximum(n - 1, 0)] != first)))
        def _():
            sums_ref[...] = jnp.zeros_like(sums_ref)

        @pl.when(there & (group < groups))
        def _():
            over = ((1,), (1 if transposed else 0,))
            sums_ref[...] += product(_kept(a_ref, group, first, begin_ref, end_ref), w_ref[...], over)

        after = first_ref[jnp.minimum(n + 1, visits - 1)]

        @pl.when(there & (k == pl.num_programs(2) - 1) & ((n == visits - 1) | (after != first)))
        def _():
            y_ref[...] = sums_ref[...].astype(y_ref.dtype)

    def on_visit(place):
        """Where a block lies; there is nothing behind the last visit, which stays."""

        def index(j, n, k, group_ref, first_ref, begin_ref, end_ref, visits_ref):
            del begin_ref, end_ref
            n = jnp.minimum(n, visits_ref[0] - 1)
            return place(j, lax.div(first_ref[n], ROWS), jnp.minimum(group_ref[n], groups - 1), k)

        return index

    of_w = (None, broad, deep) if transposed else (None, deep, broad)
    at_w = on_visit(lambda j, _, group, k: (group, j, k) if transposed else (group, k, j))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(known),
            grid=(pl.cdiv(columns, broad), len(known[0]), depth // deep),
            in_specs=[
                pl.BlockSpec((ROWS, deep), on_visit(lambda j, row, _, k: (row, k))),
                pl.BlockSpec(of_w, at_w),
            ],
            out_specs=pl.BlockSpec((ROWS, broad), on_visit(lambda j, row, *_: (row, j))),
            scratch_shapes=[pltpu.VMEM((ROWS, broad), jnp.float32)],
        ),
        out_shape=result_like(a, (count, columns), a.dtype),
        compiler_params=_PARAMETERS,
    )(*known, a, w)


def of_groups(x, dy, sizes):
    """Of the gradient's rule, on one device's arrays."""
    (count, width), columns, groups = x.shape, dy.shape[1], len(sizes)
    known = _visits(sizes, count, least=1)
    deep, broad = _block(width), _block(columns)

    def kernel(group_ref, first_ref, begin_ref, end_ref, visits_ref, x_ref, dy_ref, dw_ref, sums_ref):
        del visits_ref
        n = pl.program_id(2)
        group, first = group_ref[n], first_ref[n]
        # Behind the last visit numbers are 0, and group 0 was the first.
        before, after = group_ref[jnp.maximum(n - 1, 0)], group_ref[jnp.minimum(n + 1, pl.num_programs(2) - 1)]

        @pl.when((n == 0) | (before != group))
        def _():
            sums_ref[...] = jnp.zeros_like(sums_ref)

        @pl.when(group < groups)
        def _():
            kept = functools.partial(_kept, group=group, first=first, begin_ref=begin_ref, end_ref=end_ref)
            sums_ref[...] += product(kept(x_ref), kept(dy_ref), ((0,), (0,)))

        @pl.when((group < groups) & (after != group))
        def _():
            dw_ref[...] = sums_ref[...].astype(dw_ref.dtype)

    def on_visit(place):
        """Where a block lies; rows of no group, and what is behind the last visit, stay with the last group."""

        def index(i, j, n, group_ref, first_ref, begin_ref, end_ref, visits_ref):
            del begin_ref, end_ref
            n = jnp.minimum(n, visits_ref[0] - 1)
            last = (count - 1) // ROWS
            return place(i, j, jnp.minimum(lax.div(first_ref[n], ROWS), last), jnp.minimum(group_ref[n], groups - 1))

        return index

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(known),
            grid=(pl.cdiv(width, deep), pl.cdiv(columns, broad), len(known[0])),
            in_specs=[
                pl.BlockSpec((ROWS, deep), on_visit(lambda i, j, row, _: (row, i))),
                pl.BlockSpec((ROWS, broad), on_visit(lambda i, j, row, _: (row, j))),
            ],
            out_specs=pl.BlockSpec((None, deep, broad), on_visit(lambda i, j, _, group: (group, i, j))),
            scratch_shapes=[pltpu.VMEM((deep, broad), jnp.float32)],
        ),
        out_shape=result_like(x, (groups, width, columns), x.dtype),
        compiler_params=_PARAMETERS,
    )(*known, x, dy)


_PARAMETERS = pltpu.CompilerParams(
    dimension_semantics=("arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
)
