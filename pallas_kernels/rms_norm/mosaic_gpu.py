"""Pallas for Hopper: rows stream through shared memory (`hopper.rows`), read once and written once.

A block has rows of one group, with the group's scale in shared memory. Backward it adds up its share of the scale's
gradient in registers; the shares, one for each block, are added up at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels import rows
from crescendo.pallas_kernels.hopper import rows as hopper_rows
from crescendo.pallas_kernels.hopper.rows import LANES
from crescendo.pallas_kernels.op import Unsupported, target_device


def rms_norm(x, scale, *, residual, **_):
    """See the op."""
    rows.check(x, scale)
    _geometry(x.shape[-1], x.dtype, 2 if residual is None else 3)
    return rows.Passes(forward, backward)


def _geometry(width: int, dtype, sources: int) -> hopper_rows.Geometry:
    if width > MAX_WIDTH:
        raise Unsupported(f"takes rows of at most {MAX_WIDTH:,}, not {width:,}")
    return hopper_rows.geometry(width, sources * dtype.itemsize, 4 * width)


# Backward each of 128 threads adds up an entry in 128.
MAX_WIDTH = 8192


def forward(eps, x, scale, residual):
    """`(y,)`, or `(y, h)` with a residual."""
    like, dtype, width = jax.ShapeDtypeStruct(x.shape, x.dtype), x.dtype, x.shape[2]

    def visit(_, refs, scale_ref, carry):
        pieces = hopper_rows.pieces(width)
        for piece in pieces if residual is not None else ():
            h = hopper_rows.load(refs[0].at[piece], dtype) + hopper_rows.load(refs[1].at[piece], dtype)
            refs[1][piece] = h.astype(dtype)
        h = [hopper_rows.load(refs[-1].at[piece], dtype) for piece in pieces]
        inverse = _inverse(hopper_rows.total(jnp.sum, jnp.add, [part * part for part in h]), width, eps)
        for piece, part in zip(pieces, h, strict=True):
            refs[0][piece] = (part * inverse * hopper_rows.load(scale_ref.at[piece], dtype)).astype(dtype)
        return carry

    if residual is None:
        return _walk(visit, [x], scale, [0], [like])
    return _walk(visit, [x, residual], scale, [0, 1], [like, like])


def backward(eps, h, scale, dy, dh):
    """`(dx, dscale)`; with u = h inverse and g = dy scale, `dx = inverse (g - u mean(g u))`."""
    like, dtype, width = jax.ShapeDtypeStruct(h.shape, h.dtype), h.dtype, h.shape[2]
    load = lambda ref, piece: hopper_rows.load(ref.at[piece], dtype)  # noqa: E731

    def visit(_, refs, scale_ref, shares):
        pieces = hopper_rows.pieces(width)
        total = functools.partial(hopper_rows.total, jnp.sum, jnp.add)
        inverse = _inverse(total([jnp.square(load(refs[0], piece)) for piece in pieces]), width, eps)
        products = [load(refs[0], piece) * load(refs[1], piece) * load(scale_ref, piece) for piece in pieces]
        mean = total(products) * inverse * (1.0 / width)
        added = []
        for piece, share in zip(pieces, shares, strict=True):
            u, dy = load(refs[0], piece) * inverse, load(refs[1], piece)
            dx = inverse * (dy * load(scale_ref, piece) - u * mean)
            if len(refs) > 2:
                dx += load(refs[2], piece)
            refs[1][piece] = dx.astype(dtype)
            added.append(share + dy * u)
        return added

    arrays = [h, dy] if dh is None else [h, dy, dh]
    dx, shares = _walk(visit, arrays, scale, [1], [like], shares=True)
    return dx, jnp.sum(shares, axis=1)


def _inverse(total, width: int, eps: float):
    return lax.rsqrt(total * (1.0 / width) + eps)


def _walk(visit, arrays, scale, results, out_types, *, shares: bool = False):
    """`visit(row, refs, scale, carry)` on all rows of `[G, R, D]`; results are left in the place of those numbers.

    With shares, visits carry a piece of one for each piece of a row, and they are returned last: `[G, programs, D]`.
    """
    groups, count, width = arrays[0].shape
    dtype, sources = arrays[0].dtype, len(arrays)
    how = _geometry(width, dtype, sources)
    programs = max(1, min(count, how.blocks * target_device().cores // groups))
    by_rows = lambda shape: (groups * shape[1], 1, how.lines, LANES)  # noqa: E731
    outs = [jax.ShapeDtypeStruct(by_rows(out.shape), out.dtype) for out in out_types]
    if shares:
        outs.append(jax.ShapeDtypeStruct((groups * programs, 1, how.lines, LANES), jnp.float32))

    def body(*refs):
        given, scale_all, refs = refs[:sources], refs[sources], refs[sources + 1 :]
        to, (slots, ready, scale_ref, scale_ready) = refs[: len(outs)], refs[len(outs) :]
        program = lax.axis_index("row")
        group, first = lax.div(program, programs), lax.rem(program, programs)
        plgpu.copy_gmem_to_smem(scale_all.at[group], scale_ref, scale_ready)
        plgpu.barrier_wait(scale_ready)
        rounds = (count - first + programs - 1) // programs
        row_of = lambda n: (group * count + first + n * programs, 0)  # noqa: E731
        pieces = hopper_rows.pieces(width)
        carry = [hopper_rows.zeros((piece.size, LANES), dtype) for piece in pieces] if shares else None
        step = lambda row, refs, carry: visit(row, refs, scale_ref, carry)  # noqa: E731
        placed = {number: ref for number, ref in zip(results, to, strict=False)}
        final = hopper_rows.stream(rounds, row_of, given, placed, slots, ready, step, carry)
        for piece, share in zip(pieces, final or (), strict=False):
            to[-1][program, 0, piece] = share

    results_of = hopper_rows.call(
        body,
        [
            *(array.reshape(by_rows(array.shape)) for array in arrays),
            scale.astype(jnp.float32).reshape(groups, -1, LANES),
        ],
        outs,
        how,
        groups * programs,
        sources=sources,
        dtype=dtype,
        scratch=[plgpu.SMEM((how.lines, LANES), jnp.float32), plgpu.Barrier()],
    )
    shapes = [out.shape for out in out_types] + [(groups, programs, width)] * shares
    return tuple(array.reshape(shape) for array, shape in zip(results_of, shapes, strict=True))
