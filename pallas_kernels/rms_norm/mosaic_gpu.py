"""Pallas for Hopper: rows stream through shared memory (`hopper.rows`), read once and written once.

A block has rows of one group, with the group's scale in shared memory. Backward it adds up its share of the scale's
gradient in registers; the shares, one for each block, are added up at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.hopper import rows as hopper_rows
from crescendo.pallas_kernels.hopper.rows import LANES
from crescendo.pallas_kernels.op import Unsupported, target_device
from crescendo.pallas_kernels.rms_norm import gradient, xla
from crescendo.pallas_kernels.sharded import sharded


def rms_norm(x, scale, *, eps, residual, probe):
    """See the op."""
    for array in (x, scale):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise Unsupported(f"takes float32, bfloat16 and float16, not {array.dtype}")
    if x.size == 0:
        raise Unsupported(f"has nothing to do for an array {list(x.shape)}")
    _geometry(x.shape[-1], x.dtype, 2 if residual is None else 3)
    return gradient.rms_norm(KERNELS, x, scale, eps, residual, probe)


def _geometry(width: int, dtype, sources: int) -> hopper_rows.Geometry:
    if width > MAX_WIDTH:
        raise Unsupported(f"takes rows of at most {MAX_WIDTH:,}, not {width:,}")
    return hopper_rows.geometry(width, sources * dtype.itemsize, 4 * width)


# Backward each of 128 threads adds up an entry in 128.
MAX_WIDTH = 8192


def forward(x, residual, scale, eps):
    """`(y, h)`."""

    def local(x, scale, *residual):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)

        def visit(_, refs, scale_ref, carry):
            pieces, dtype = hopper_rows.pieces(x.shape[2]), x.dtype
            for piece in pieces if residual else ():
                h = hopper_rows.load(refs[0].at[piece], dtype) + hopper_rows.load(refs[1].at[piece], dtype)
                refs[1][piece] = h.astype(dtype)
            h = [hopper_rows.load(refs[-1].at[piece], dtype) for piece in pieces]
            inverse = _inverse(hopper_rows.total(jnp.sum, jnp.add, [part * part for part in h]), x.shape[2], eps)
            for piece, part in zip(pieces, h, strict=True):
                refs[0][piece] = (part * inverse * hopper_rows.load(scale_ref.at[piece], dtype)).astype(dtype)
            return carry

        return _walk(visit, [x, *residual], scale, [0, 1] if residual else [0], [like, like] if residual else [like])

    if residual is None:
        return sharded(local, ["g r d", "g d"], ["g r d"], batch=["g"])(x, scale)[0], x
    run = sharded(local, ["g r d", "g d", "g r d"], ["g r d", "g r d"], batch=["g"])
    return run(x, scale, residual)


def backward(h, scale, dy, dh, eps):
    """`(dx, dscale)`; with u = h inverse and g = dy scale, `dx = inverse (g - u mean(g u))`."""

    def local(h, scale, dy, *dh):
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

        dx, shares = _walk(visit, [h, dy, *dh], scale, [1], [like], shares=True)
        return dx, jnp.sum(shares, axis=1)

    rows = ["g r d"] * (1 if dh is None else 2)
    run = sharded(local, ["g r d", "g d", *rows], ["g r d", "g d"], batch=["g"])
    return run(h, scale, *((dy,) if dh is None else (dy, dh)))


KERNELS = gradient.Kernels(forward, backward, xla.rotary_forward, xla.rotary_backward)


def _inverse(total, width: int, eps: float):
    return lax.rsqrt(total * (1.0 / width) + eps)


def _walk(visit, arrays, scale, results, out_types, *, shares: bool = False):
    """`visit(row, refs, scale, carry)` on all rows of `[G, R, D]`; results are left in the place of those numbers.

    With shares, visits carry a piece of one for each piece of a row, and they are returned last: `[G, programs, D]`.
    """
    groups, rows, width = arrays[0].shape
    dtype, sources = arrays[0].dtype, len(arrays)
    how = _geometry(width, dtype, sources)
    programs = max(1, min(rows, how.blocks * target_device().cores // groups))
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
        count = (rows - first + programs - 1) // programs
        row_of = lambda n: (group * rows + first + n * programs, 0)  # noqa: E731
        pieces = hopper_rows.pieces(width)
        carry = [hopper_rows.zeros((piece.size, LANES), dtype) for piece in pieces] if shares else None
        step = lambda row, refs, carry: visit(row, refs, scale_ref, carry)  # noqa: E731
        placed = {number: ref for number, ref in zip(results, to, strict=False)}
        final = hopper_rows.stream(count, row_of, given, placed, slots, ready, step, carry)
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
