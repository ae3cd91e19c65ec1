"""Pallas for Hopper: rows stream through shared memory (`hopper.rows`), read once and written once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from crescendo.pallas_kernels.hopper import rows as hopper_rows
from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.sharded import sharded
from crescendo.pallas_kernels.softmax.gradient import Options, differentiable, weighted_mean

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
    hopper_rows.geometry(x.shape[axis], 2 * x.dtype.itemsize, shared=True)  # of the gradient, which reads two
    options = Options(_forward, _backward, log, -1, scale, soft_cap)
    return jnp.moveaxis(differentiable(options, jnp.moveaxis(x, axis, -1), None), -1, axis)


def _forward(x, mask, options: Options):
    del mask
    return _on_rows(_Forward(options), [x])


def _backward(y, dy, x, options: Options):
    del x
    return _on_rows(_Backward(options), [y, dy.astype(y.dtype)])


def _on_rows(passes, arrays):
    """Both passes over each row, under any mesh that splits the rows; the result is left in the last one's place."""
    shape = arrays[0].shape if arrays[0].ndim > 1 else (1, *arrays[0].shape)
    leading = [f"r{i}" for i in range(len(shape) - 1)]
    letters = " ".join([*leading, "c"])
    sources = len(arrays)

    def local(*parts):
        dtype, width = parts[0].dtype, shape[-1]
        how = hopper_rows.geometry(width, sources * dtype.itemsize, shared=True)
        rows = [part.reshape(-1, how.parts, how.lines, hopper_rows.LANES) for part in parts]
        clusters = how.clusters(len(rows[0]))
        out_types = [jax.ShapeDtypeStruct(rows[0].shape, dtype)]
        if how.parts > 1:
            out_types.append(jax.ShapeDtypeStruct((len(rows[0]), 8, 2), jnp.float32))

        fixed = 2 + (how.parts > 1)  # slots and barriers

        def body(*refs):
            given, results, (slots, ready, *met) = (
                refs[:sources],
                refs[sources : sources + len(out_types)],
                refs[-fixed:],
            )
            cluster = lax.axis_index("row")
            part = lax.axis_index("part") if how.parts > 1 else 0
            count = (len(rows[0]) - cluster + clusters - 1) // clusters
            row_of = lambda n: (cluster + n * clusters, part)  # noqa: E731
            streamed = count, row_of, given, {sources - 1: results[0]}, slots, ready
            if how.parts > 1:
                meeting = results[1].at[:, : how.parts], met[0]
                hopper_rows.stream_parts(*streamed, meeting, lambda refs: passes.first(refs)[0], passes.second)
            else:
                hopper_rows.stream(*streamed, passes.both)

        y = hopper_rows.call(body, rows, out_types, how, clusters, sources=sources, dtype=dtype)[0]
        return (y.reshape(parts[0].shape),)

    run = sharded(local, [letters] * sources, [letters], batch=leading)
    return run(*(array.reshape(shape) for array in arrays))[0].reshape(arrays[0].shape)


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Two passes over a part of a row, and what the parts tell each other between them: two numbers."""

    options: Options

    def first(self, refs, keep=False):
        """`(numbers, what the second pass may use)`."""
        raise NotImplementedError

    def second(self, refs, of_parts, held=None):
        """Leaves the result in the place of the last one."""
        raise NotImplementedError

    def both(self, row, refs, carry):
        """On a full row."""
        del row
        keep = refs[0].shape[0] * len(refs) * hopper_rows.LANES <= HELD
        numbers, held = self.first(refs, keep)
        self.second(refs, [numbers], held)
        return carry


@dataclasses.dataclass(frozen=True)
class _Forward(_Passes):
    """The numbers are the maximum, -inf where nothing counts, and the sum of exponentials relative to it."""

    def first(self, refs, keep=False):
        logits = [_held(keep, self._logits, ref) for ref in _pieces(refs[0])]
        top = hopper_rows.total(jnp.max, jnp.maximum, [logit() for logit in logits])
        top = jnp.where(top == -jnp.inf, 0.0, top)
        exponentials = [_held(keep, lambda logit=logit: jnp.exp2((logit() - top) * LOG2E)) for logit in logits]
        total = hopper_rows.total(jnp.sum, jnp.add, [exponential() for exponential in exponentials])
        return [jnp.where(total > 0, top, -jnp.inf), total], (logits, exponentials)

    def second(self, refs, of_parts, held=None):
        top = functools.reduce(jnp.maximum, [top for top, _ in of_parts])
        top = jnp.where(top == -jnp.inf, 0.0, top)
        total = functools.reduce(jnp.add, [total * jnp.exp2((part - top) * LOG2E) for part, total in of_parts])
        total = jnp.where(total == 0, 1.0, total)
        shift, factor = top + jnp.log2(total) * LN2, 1 / total
        for i, ref in enumerate(_pieces(refs[0])):
            logit = self._logits(ref) if held is None else held[0][i]()
            if self.options.log:
                y = logit - shift
            else:
                y = (jnp.exp2((logit - top) * LOG2E) if held is None else held[1][i]()) * factor
            ref[...] = y.astype(ref.dtype)

    def _logits(self, ref):
        return hopper_rows.load(ref, ref.dtype) * self.options.scale


@dataclasses.dataclass(frozen=True)
class _Backward(_Passes):
    """The numbers are the sums of the products and of the results, or in log space of the cotangents and 0."""

    def first(self, refs, keep=False):
        terms = [_held(keep, self._terms, *pair) for pair in zip(*map(_pieces, refs), strict=True)]
        total = functools.partial(hopper_rows.total, jnp.sum, jnp.add)
        if self.options.log:
            return [total([dy for _, dy in (term() for term in terms)]), 0.0], terms
        products = total([y * dy for y, dy in (term() for term in terms)])
        return [products, total([y for y, _ in (term() for term in terms)])], terms

    def second(self, refs, of_parts, held=None):
        total, weight = (functools.reduce(jnp.add, numbers) for numbers in zip(*of_parts, strict=True))
        total = total if self.options.log else weighted_mean(total, weight)
        for i, (y_ref, dy_ref) in enumerate(zip(*map(_pieces, refs), strict=True)):
            y, dy = self._terms(y_ref, dy_ref) if held is None else held[i]()
            dx = dy - jnp.exp2(y * LOG2E) * total if self.options.log else y * (dy - total)
            dx = jnp.where(self._hidden(y), 0.0, dx * self.options.scale)
            dy_ref[...] = dx.astype(dy_ref.dtype)

    def _terms(self, y_ref, dy_ref):
        y, dy = hopper_rows.load(y_ref, y_ref.dtype), hopper_rows.load(dy_ref, y_ref.dtype)
        return y, jnp.where(self._hidden(y), 0.0, dy)

    def _hidden(self, y):
        return y == (-jnp.inf if self.options.log else 0.0)


def _pieces(ref):
    return [ref.at[piece] for piece in hopper_rows.pieces(ref.shape[0] * hopper_rows.LANES)]


def _held(keep: bool, compute, *arguments):
    """Computed once and held in registers, or from shared memory whenever it is asked for."""
    if not keep:
        return functools.partial(compute, *arguments)
    value = compute(*arguments)
    return lambda: value
