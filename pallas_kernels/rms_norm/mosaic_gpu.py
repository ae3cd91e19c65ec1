"""Pallas for Hopper: rows stream through shared memory (`hopper.rows`), read once and written once.

A block has rows of one group, with the group's scale, and bias, in shared memory. Backward it adds up its share of
their gradients in registers; the shares, one for each block, are added up at the end.
"""

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
    return _passes(x, [scale], residual)


def layer_norm(x, scale, bias, *, residual, **_):
    """See the op."""
    return _passes(x, [scale, bias], residual)


def _passes(x, vectors, residual) -> rows.Passes:
    rows.check(x, *vectors)
    longest = MAX_WIDTH // len(vectors)
    if x.shape[-1] > longest:
        raise Unsupported(f"takes rows of at most {longest:,}, not {x.shape[-1]:,}")
    _geometry(x.shape[-1], x.dtype, 2 if residual is None else 3, len(vectors))
    return rows.Passes(forward, backward)


def _geometry(width: int, dtype, sources: int, vectors: int) -> hopper_rows.Geometry:
    return hopper_rows.geometry(width, sources * dtype.itemsize, 4 * width * vectors)


# Backward each of 128 threads adds up an entry in 128 of each vector's gradient.
MAX_WIDTH = 8192


def forward(eps, x, scale, bias, residual):
    """`(y,)`, or `(y, h)` with a residual."""
    like, dtype, width = jax.ShapeDtypeStruct(x.shape, x.dtype), x.dtype, x.shape[2]

    def visit(_, refs, vectors, carry):
        pieces = hopper_rows.pieces(width)
        for piece in pieces if residual is not None else ():
            h = hopper_rows.load(refs[0].at[piece], dtype) + hopper_rows.load(refs[1].at[piece], dtype)
            refs[1][piece] = h.astype(dtype)
        h = [hopper_rows.load(refs[-1].at[piece], dtype) for piece in pieces]
        if bias is not None:
            mean = _mean(h, width)
            h = [part - mean for part in h]
        inverse = lax.rsqrt(_mean([part * part for part in h], width) + eps)
        for piece, part in zip(pieces, h, strict=True):
            scale, *of_bias = (hopper_rows.load(ref.at[piece], dtype) for ref in vectors)
            y = part * inverse * scale
            refs[0][piece] = (y + of_bias[0] if of_bias else y).astype(dtype)
        return carry

    arrays = [x] if residual is None else [x, residual]
    vectors = [scale] if bias is None else [scale, bias]
    return _walk(visit, arrays, vectors, range(len(arrays)), [like] * len(arrays))


def backward(eps, centered, h, scale, dy, dh):
    """`(dx, dscale)`, and dbias if centered; with u = h inverse and g = dy scale, `dx = inverse (g - u mean(g u))`.

    Centered, h less its mean is in the place of h, and `inverse mean(g)` is taken off.
    """
    like, dtype, width = jax.ShapeDtypeStruct(h.shape, h.dtype), h.dtype, h.shape[2]
    load = lambda ref, piece: hopper_rows.load(ref.at[piece], dtype)  # noqa: E731

    def visit(_, refs, vectors, shares):
        pieces = hopper_rows.pieces(width)
        mean = _mean([load(refs[0], piece) for piece in pieces], width) if centered else None
        taken = lambda piece: load(refs[0], piece) - mean if centered else load(refs[0], piece)  # noqa: E731
        g = lambda piece: load(refs[1], piece) * load(vectors[0], piece)  # noqa: E731
        inverse = lax.rsqrt(_mean([jnp.square(taken(piece)) for piece in pieces], width) + eps)
        along = _mean([taken(piece) * g(piece) for piece in pieces], width) * inverse
        mean_g = _mean([g(piece) for piece in pieces], width) if centered else None
        added = []
        for piece, *share in zip(pieces, *shares, strict=True):
            u, dy = taken(piece) * inverse, load(refs[1], piece)
            dx = dy * load(vectors[0], piece) - u * along
            dx = inverse * (dx - mean_g if centered else dx)
            if len(refs) > 2:
                dx += load(refs[2], piece)
            refs[1][piece] = dx.astype(dtype)
            added.append([one + part for one, part in zip(share, (dy * u, dy), strict=False)])
        return [list(one) for one in zip(*added, strict=True)]

    arrays = [h, dy] if dh is None else [h, dy, dh]
    dx, *shares = _walk(visit, arrays, [scale], [1], [like], shares=1 + centered)
    return dx, *(jnp.sum(share, axis=1) for share in shares)


def _mean(parts, width: int):
    return hopper_rows.total(jnp.sum, jnp.add, parts) * (1.0 / width)


def _walk(visit, arrays, vectors, results, out_types, *, shares: int = 0):
    """`visit(row, refs, vectors, carry)` on all rows of `[G, R, D]`; results are left in the place of those numbers.

    With shares, visits carry so many lists of a piece for each piece of a row, and they are returned last:
    `[G, programs, D]`.
    """
    groups, count, width = arrays[0].shape
    dtype, sources = arrays[0].dtype, len(arrays)
    how = _geometry(width, dtype, sources, len(vectors))
    programs = max(1, min(count, how.blocks * target_device().cores // groups))
    by_rows = lambda shape: (groups * shape[1], 1, how.lines, LANES)  # noqa: E731
    outs = [jax.ShapeDtypeStruct(by_rows(out.shape), out.dtype) for out in out_types]
    outs += [jax.ShapeDtypeStruct((groups * programs, 1, how.lines, LANES), jnp.float32)] * shares

    def body(*refs):
        given, whole, refs = refs[:sources], refs[sources : sources + len(vectors)], refs[sources + len(vectors) :]
        to, (slots, ready, of_group, arrived) = refs[: len(outs)], refs[len(outs) :]
        program = lax.axis_index("row")
        group, first = lax.div(program, programs), lax.rem(program, programs)
        for i, vector in enumerate(whole):
            plgpu.copy_gmem_to_smem(vector.at[group], of_group.at[i], arrived)
        plgpu.barrier_wait(arrived)
        rounds = (count - first + programs - 1) // programs
        row_of = lambda n: (group * count + first + n * programs, 0)  # noqa: E731
        pieces = hopper_rows.pieces(width)
        carry = [[hopper_rows.zeros((piece.size, LANES), dtype) for piece in pieces] for _ in range(shares)]
        local = [of_group.at[i] for i in range(len(vectors))]
        step = lambda row, refs, carry: visit(row, refs, local, carry)  # noqa: E731
        placed = dict(zip(results, to, strict=False))
        final = hopper_rows.stream(rounds, row_of, given, placed, slots, ready, step, carry)
        for ref, share in zip(to[len(out_types) :], final, strict=True):
            for piece, part in zip(pieces, share, strict=True):
                ref[program, 0, piece] = part

    results_of = hopper_rows.call(
        body,
        [
            *(array.reshape(by_rows(array.shape)) for array in arrays),
            *(vector.astype(jnp.float32).reshape(groups, -1, LANES) for vector in vectors),
        ],
        outs,
        how,
        groups * programs,
        sources=sources,
        dtype=dtype,
        scratch=[plgpu.SMEM((len(vectors), how.lines, LANES), jnp.float32), plgpu.Barrier(num_arrivals=len(vectors))],
    )
    shapes = [out.shape for out in out_types] + [(groups, programs, width)] * shares
    return tuple(array.reshape(shape) for array, shape in zip(results_of, shapes, strict=True))
