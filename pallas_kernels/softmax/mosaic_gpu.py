"""Pallas for Hopper: rows stream through shared memory (`hopper_rows`), read once and written once."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from crescendo.pallas_kernels import hopper_rows
from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.sharded import sharded
from crescendo.pallas_kernels.softmax.gradient import Options, differentiable

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Entries of a row, or two, that a block holds in registers.
HELD = 8192


def softmax(x, *, axis, scale, soft_cap, mask):
    """See the op."""
    return _call(x, axis, scale, soft_cap, mask, log=False)


def log_softmax(x, *, axis, scale, soft_cap, mask):
    """See the op."""
    return _call(x, axis, scale, soft_cap, mask, log=True)


def _call(x, axis, scale, soft_cap, mask, *, log: bool):
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise Unsupported(f"takes float32, bfloat16 and float16, not {x.dtype}")
    if x.size == 0:
        raise Unsupported(f"has nothing to do for x {list(x.shape)}")
    if mask is not None or soft_cap is not None:
        raise Unsupported("takes neither a mask nor a soft cap")
    hopper_rows.require_whole_lanes(x.shape[axis], 2 * x.shape[axis] * x.dtype.itemsize)
    options = Options(_forward, _backward, log, -1, scale, soft_cap)
    return jnp.moveaxis(differentiable(options, jnp.moveaxis(x, axis, -1), None), -1, axis)


def _forward(x, mask, options: Options):
    del mask
    return _on_rows(functools.partial(_softmax_of_row, options), [x])


def _backward(y, dy, x, options: Options):
    del x
    return _on_rows(functools.partial(_gradient_of_row, options), [y, dy.astype(y.dtype)])


def _on_rows(visit, arrays):
    """`visit(row, refs, carry)` on each row, under any mesh that splits the rows; the result is in the last one's place."""
    shape = arrays[0].shape if arrays[0].ndim > 1 else (1, *arrays[0].shape)
    leading = [f"r{i}" for i in range(len(shape) - 1)]
    letters = " ".join([*leading, "c"])
    sources = len(arrays)

    def local(*parts):
        lines = shape[-1] // hopper_rows.LANES
        rows = [part.reshape(-1, lines, hopper_rows.LANES) for part in parts]
        like = jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype)
        stages, together = hopper_rows.geometry(sources * shape[-1] * like.dtype.itemsize)
        blocks = hopper_rows.blocks_of(like.shape[0], together)

        def body(*refs):
            *given, result, slots, ready = refs
            block = lax.axis_index("block")
            count = (like.shape[0] - block + blocks - 1) // blocks
            row_of = lambda n: block + n * blocks  # noqa: E731
            hopper_rows.stream(count, row_of, given, {sources - 1: result}, slots, ready, visit)

        found = hopper_rows.call(
            body, rows, like, blocks=blocks, stages=stages, sources=sources, row=like.shape[1:], dtype=like.dtype
        )
        return (found.reshape(parts[0].shape),)

    run = sharded(local, [letters] * sources, [letters], batch=leading)
    return run(*(array.reshape(shape) for array in arrays))[0].reshape(arrays[0].shape)


def _pieces(ref):
    return [ref.at[piece] for piece in hopper_rows.pieces(ref.shape[0] * hopper_rows.LANES)]


def _softmax_of_row(options: Options, row, refs, carry):
    del row
    (x_ref,) = refs
    keep = _keep if x_ref.shape[0] * hopper_rows.LANES <= HELD else _again
    refs = _pieces(x_ref)
    logits = [keep(lambda ref=ref: hopper_rows.load(ref, x_ref.dtype) * options.scale) for ref in refs]
    top = hopper_rows.total(jnp.max, jnp.maximum, [logit() for logit in logits])
    top = jnp.where(top == -jnp.inf, 0.0, top)
    exponentials = [keep(lambda logit=logit: jnp.exp2((logit() - top) * LOG2E)) for logit in logits]
    total = hopper_rows.total(jnp.sum, jnp.add, [exponential() for exponential in exponentials])
    total = jnp.where(total == 0, 1.0, total)
    shift, factor = top + jnp.log2(total) * LN2, 1 / total
    for ref, logit, exponential in zip(refs, logits, exponentials, strict=True):
        y = logit() - shift if options.log else exponential() * factor
        ref[...] = y.astype(x_ref.dtype)
    return carry


def _gradient_of_row(options: Options, row, refs, carry):
    del row
    dtype = refs[0].dtype
    keep = _keep if 2 * refs[0].shape[0] * hopper_rows.LANES <= HELD else _again
    pairs = list(zip(*map(_pieces, refs), strict=True))

    def terms(y_ref, dy_ref):
        y, dy = hopper_rows.load(y_ref, dtype), hopper_rows.load(dy_ref, dtype)
        return (y, jnp.where(y == -jnp.inf, 0.0, dy)) if options.log else (y, dy)

    parts = [keep(functools.partial(terms, *pair)) for pair in pairs]
    products = [dy if options.log else y * dy for y, dy in (part() for part in parts)]
    total = hopper_rows.total(jnp.sum, jnp.add, products)
    for (_, ref), part in zip(pairs, parts, strict=True):
        y, dy = part()
        dx = dy - jnp.exp2(y * LOG2E) * total if options.log else y * (dy - total)
        ref[...] = (dx * options.scale).astype(dtype)
    return carry


def _keep(compute):
    """Computed once and held in registers."""
    value = compute()
    return lambda: value


def _again(compute):
    """Computed, and read from shared memory, whenever it is asked for."""
    return compute
