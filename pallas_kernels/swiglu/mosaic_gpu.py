"""Pallas for Hopper: arrays stream through shared memory (`hopper.rows`), cut into rows of one length."""

import math

import jax
from jax import lax
from jax.experimental import pallas as pl

from crescendo.pallas_kernels.hopper import rows
from crescendo.pallas_kernels.op import Unsupported, require_gpu
from crescendo.pallas_kernels.rows import Passes, check
from crescendo.pallas_kernels.swiglu.gradient import gradients, product

# Of a row: the longest that divides the array.
LENGTHS = tuple(2**n for n in range(12, 6, -1))


def swiglu(gate, up):
    """See the op."""
    require_gpu(9.0, below=10.0)
    check(gate)
    together = gate.shape[-1] if up is None else gate.size
    if together % rows.LANES:
        raise Unsupported(f"needs a multiple of {rows.LANES} entries, not {together:,}")
    return Passes(forward, backward)


def forward(*inputs):
    """`(y,)`."""
    shape = inputs[0].shape if len(inputs) == 2 else (*inputs[0].shape[:-2], inputs[0].shape[-1])
    return _stream(lambda *entries: (product(*entries),), shape, inputs, [shape])


def backward(dy, *inputs):
    """Of the inputs."""
    return _stream(gradients, dy.shape, (dy, *inputs), [a.shape for a in inputs])


def _stream(function, shape, arrays, results):
    """`function` of pieces of all arrays, those of both being two; its results take the places of the first ones.

    Args:
      function: from entries in float32 to such.
      shape: of the arrays that are one; others, of gate and up side by side, have an axis of two before the last.
      arrays: in device memory.
      results: the shapes of what is made.
    """
    both = any(array.shape != shape for array in arrays)
    count, columns = (math.prod(shape[:-1]), shape[-1]) if both else (1, math.prod(shape))
    length = next((length for length in LENGTHS if columns % length == 0), None)
    if length is None:
        raise Unsupported(f"needs a device's part to be a multiple of {rows.LANES} entries, not {columns:,}")
    dtype, parts = arrays[0].dtype, columns // length
    sources = sum(1 if array.shape == shape else 2 for array in arrays)
    how = rows.geometry(length, sources * dtype.itemsize)
    clusters = how.clusters(count * parts)

    def lines(of):
        return (count, parts if of == shape else 2 * parts, how.lines, rows.LANES)

    def apart(refs):
        """Each of gate and up, where a reference is of both."""
        firsts = [range(0, ref.shape[1], parts) for ref in refs]
        return [ref.at[:, pl.ds(i, parts)] for ref, starts in zip(refs, firsts, strict=True) for i in starts]

    def body(*refs):
        given, outs = apart(refs[: len(arrays)]), apart(refs[len(arrays) : -2])
        slots, ready = refs[-2:]
        first = lax.axis_index("row")
        own = (count * parts - first + clusters - 1) // clusters

        def part(n):
            return lax.div(first + n * clusters, parts), lax.rem(first + n * clusters, parts)

        def visit(row, refs, carry):
            del row
            for piece in rows.pieces(length):
                values = function(*(rows.load(ref.at[piece], dtype) for ref in refs))
                for ref, value in zip(refs, values, strict=False):
                    ref[piece] = value.astype(dtype)
            return carry

        rows.stream(own, part, given, dict(enumerate(outs)), slots, ready, visit)

    given, out_types = (
        [a.reshape(lines(a.shape)) for a in arrays],
        [jax.ShapeDtypeStruct(lines(s), dtype) for s in results],
    )
    found = rows.call(body, given, out_types, how, clusters, sources=sources, dtype=dtype)
    return tuple(result.reshape(of) for result, of in zip(found, results, strict=True))
