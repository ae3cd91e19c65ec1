"""Pallas for Hopper: rows stream through shared memory (`hopper.rows`), read once and written once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from crescendo.pallas_kernels import rows
from crescendo.pallas_kernels.hopper import rows as hopper_rows
from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.softmax.gradient import Call, weighted_mean

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


def softmax(x, *, axis, soft_cap, mask, **_):
    """See the op."""
    rows.check(x)
    if mask is not None or soft_cap is not None:
        raise Unsupported("takes neither a mask nor a soft cap")
    hopper_rows.geometry(x.shape[axis], 2 * x.dtype.itemsize, shared=True)  # of the gradient, which reads two
    return rows.Passes(functools.partial(_walk, _Forward), functools.partial(_walk, _Backward))


log_softmax = softmax


def _walk(passes_of, call: Call, *arrays):
    """Both passes over each row; the result is left in the last one's place."""
    passes, arrays = passes_of(call), tuple(array for array in arrays if array is not None)
    (count, width), dtype, sources = arrays[0].shape, arrays[0].dtype, len(arrays)
    how = hopper_rows.geometry(width, sources * dtype.itemsize, shared=True)
    clusters = how.clusters(count)
    shape = (count, how.parts, how.lines, hopper_rows.LANES)
    out_types = [jax.ShapeDtypeStruct(shape, dtype)]
    if how.parts > 1:
        out_types.append(jax.ShapeDtypeStruct((count, 8, 2), jnp.float32))

    def body(*refs):
        given, results, rest = (
            refs[:sources],
            refs[sources : sources + len(out_types)],
            refs[sources + len(out_types) :],
        )
        slots, ready, *met = rest
        cluster = lax.axis_index("row")
        part = lax.axis_index("part") if how.parts > 1 else 0
        rounds = (count - cluster + clusters - 1) // clusters
        row_of = lambda n: (cluster + n * clusters, part)  # noqa: E731
        streamed = rounds, row_of, given, {sources - 1: results[0]}, slots, ready
        if how.parts > 1:
            meeting = results[1].at[:, : how.parts], met[0]
            hopper_rows.stream_parts(*streamed, meeting, lambda refs: passes.first(refs)[0], passes.second)
        else:
            hopper_rows.stream(*streamed, passes.both)

    arrays = tuple(array.reshape(shape) for array in arrays)
    return (
        hopper_rows.call(body, arrays, out_types, how, clusters, sources=sources, dtype=dtype)[0].reshape(count, width),
    )


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Two passes over a part of a row, and what the parts tell each other between them: two numbers."""

    call: Call

    def first(self, refs, keep=False):
        """`(numbers, what the second pass may use)`."""
        raise NotImplementedError

    def second(self, refs, of_parts, held=None):
        """Leaves the result in the place of the last one."""
        raise NotImplementedError

    def both(self, row, refs, carry):
        """On a full row."""
        del row
        keep = refs[0].shape[0] * len(refs) * hopper_rows.LANES <= hopper_rows.cut().held
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
            if self.call.log:
                y = logit - shift
            else:
                y = (jnp.exp2((logit - top) * LOG2E) if held is None else held[1][i]()) * factor
            ref[...] = y.astype(ref.dtype)

    def _logits(self, ref):
        return hopper_rows.load(ref, ref.dtype) * self.call.scale


@dataclasses.dataclass(frozen=True)
class _Backward(_Passes):
    """The numbers are the sums of the products and of the results, or in log space of the cotangents and 0."""

    def first(self, refs, keep=False):
        terms = [_held(keep, self._terms, *pair) for pair in zip(*map(_pieces, refs), strict=True)]
        total = functools.partial(hopper_rows.total, jnp.sum, jnp.add)
        if self.call.log:
            return [total([dy for _, dy in (term() for term in terms)]), 0.0], terms
        products = total([y * dy for y, dy in (term() for term in terms)])
        return [products, total([y for y, _ in (term() for term in terms)])], terms

    def second(self, refs, of_parts, held=None):
        total, weight = (functools.reduce(jnp.add, numbers) for numbers in zip(*of_parts, strict=True))
        total = total if self.call.log else weighted_mean(total, weight)
        for i, (y_ref, dy_ref) in enumerate(zip(*map(_pieces, refs), strict=True)):
            y, dy = self._terms(y_ref, dy_ref) if held is None else held[i]()
            dx = dy - jnp.exp2(y * LOG2E) * total if self.call.log else y * (dy - total)
            dx = jnp.where(self._hidden(y), 0.0, dx * self.call.scale)
            dy_ref[...] = dx.astype(dy_ref.dtype)

    def _terms(self, y_ref, dy_ref):
        y, dy = hopper_rows.load(y_ref, y_ref.dtype), hopper_rows.load(dy_ref, y_ref.dtype)
        return y, jnp.where(self._hidden(y), 0.0, dy)

    def _hidden(self, y):
        return y == (-jnp.inf if self.call.log else 0.0)


def _pieces(ref):
    return [ref.at[piece] for piece in hopper_rows.pieces(ref.shape[0] * hopper_rows.LANES)]


def _held(keep: bool, compute, *arguments):
    """Computed once and held in registers, or from shared memory whenever it is asked for."""
    if not keep:
        return functools.partial(compute, *arguments)
    value = compute(*arguments)
    return lambda: value
