"""Pallas for Hopper: arrays stream through shared memory (`hopper.rows`), cut into rows of one length."""

import functools

import jax
from jax import lax

from crescendo.pallas_kernels.hopper import rows
from crescendo.pallas_kernels.op import Unsupported, require_gpu
from crescendo.pallas_kernels.rows import Passes, check
from crescendo.pallas_kernels.swiglu.gradient import gradients, product

# Of a row: the longest that divides the array.
LENGTHS = tuple(2**n for n in range(12, 6, -1))


def swiglu(gate, up):
    """See the op."""
    del up
    require_gpu(9.0, below=10.0)
    check(gate)
    if gate.size % rows.LANES:
        raise Unsupported(f"needs a multiple of {rows.LANES} entries, not {gate.size:,}")
    return Passes(functools.partial(_stream, _product, 1), functools.partial(_stream, gradients, 2))


def _product(*entries):
    return (product(*entries),)


def _stream(function, results: int, *arrays):
    """`function` of pieces of all arrays; the results are left in the places of the first ones."""
    size, dtype, sources = arrays[0].size, arrays[0].dtype, len(arrays)
    length = next((length for length in LENGTHS if size % length == 0), None)
    if length is None:
        raise Unsupported(f"needs a device's part to be a multiple of {rows.LANES} entries, not {size:,}")
    how = rows.geometry(length, sources * dtype.itemsize)
    shape = (size // length, 1, how.lines, rows.LANES)
    clusters = how.clusters(shape[0])

    def body(*refs):
        given, outs, (slots, ready) = refs[:sources], refs[sources : sources + results], refs[-2:]
        first = lax.axis_index("row")
        count = (shape[0] - first + clusters - 1) // clusters

        def visit(row, refs, carry):
            del row
            for piece in rows.pieces(length):
                values = function(*(rows.load(ref.at[piece], dtype) for ref in refs))
                for ref, value in zip(refs, values, strict=False):
                    ref[piece] = value.astype(dtype)
            return carry

        rows.stream(count, lambda n: (first + n * clusters, 0), given, dict(enumerate(outs)), slots, ready, visit)

    out_types = [jax.ShapeDtypeStruct(shape, dtype)] * results
    found = rows.call(body, [a.reshape(shape) for a in arrays], out_types, how, clusters, sources=sources, dtype=dtype)
    return tuple(result.reshape(arrays[0].shape) for result in found)
