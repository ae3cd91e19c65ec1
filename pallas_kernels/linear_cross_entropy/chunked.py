"""Gradients computed in the forward pass, rows in chunks: three matmuls in all, and logits of one chunk at a time.

Differentiating the loss of a chunk of rows needs its logits; once they are there, so are both of their gradients:
`dX` of the chunk is final and `dW` is added to a float32 accumulator. The backward pass scales what the forward pass
made. Recomputing logits in the backward would take a fourth matmul; keeping them, `N x V` numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from crescendo.pallas_kernels import op, tiles
from crescendo.pallas_kernels.sharded import laid_out_as, mesh_axes, sharded


class RowCoefficients(NamedTuple):
    """What multiplies the terms of a row's logit gradient: `(a + b lse) p - c q`, with `q` the target distribution.

    Attributes:
      constant: `a` of each row, `[C]`, as all of them.
      lse: `b` of each row.
      target: `c` of each row.
    """

    constant: jax.Array
    lse: jax.Array
    target: jax.Array


class Rows(NamedTuple):
    """What is computed for each row of a chunk.

    Attributes:
      lse: `[C]`; +inf if a quick pass couldn't tell.
      target_logit: the mean logit under the target distribution, `[C]`.
      gradient: `[C, V]` in the inputs' dtype or float32, as which it is multiplied, or None.
      scale: that each row of the gradient still has to be multiplied by, `[C]`, or None for 1.
      of_label: with a scale, the gradient of the label's logit, `[C]`, which is 0 in `gradient`. As large as all others
        together, it is not rounded to the inputs' dtype.
    """

    lse: jax.Array
    target_logit: jax.Array
    gradient: Any
    scale: Any = None
    of_label: Any = None


# (x, w, labels, coefficients | None, options) -> Rows
LogitPass = Callable[[jax.Array, jax.Array, jax.Array, RowCoefficients | None, "Options"], Rows]


def _packed(dx, dtype):
    """Rows `[..., D]` in the memory that they take in `dtype`, and what they were multiplied by, `[...]`.

    The loss's own gradient scales them later. So that they are rounded to bfloat16 once, and not twice, 16-bit rows are
    float16 until then, with 3 bits more, each times a power of two that makes the most of its range.
    """
    if dtype.itemsize > 2:
        return dx.astype(dtype), jnp.ones(dx.shape[:-1], dx.dtype)
    largest = jnp.max(jnp.abs(dx), axis=-1)
    exponent = jnp.maximum(jnp.frexp(largest)[1], -100)
    factor = jnp.where(jnp.isfinite(largest), jnp.ldexp(jnp.ones_like(largest), 15 - exponent), 1)
    return (dx * factor[..., None]).astype(jnp.float16), factor


def _unpacked(packed):
    """The rows that `_packed` was given, in float32; None for None."""
    if packed is None:
        return None
    dx, factor = packed
    return dx.astype(_wide(dx.dtype)) / factor[..., None]


def _add_product(dw, gradient, x):
    """`dw + gradient^T x`, in the memory of dw, or the product alone."""
    rows = tuple(range(x.ndim - 1))
    x = x.astype(gradient.dtype)
    product = jax.lax.dot_general(gradient, x, ((rows, rows), ((), ())), preferred_element_type=_wide(x.dtype))
    return product if dw is None else dw + product


@dataclasses.dataclass(frozen=True)
class Kernels(op.Kernels):
    """One implementation.

    Attributes:
      logit_pass: `(x, w, labels, coefficients or None, options) -> Rows`, without a gradient where None.
      quick_pass: the same for rows as there usually are: if there are others, `logit_pass` does everything again.
      bytes_per_logit: from the inputs' dtype to the bytes that a chunk takes for each of its logits.
      row_multiple: that the rows of a chunk must be of.
    """

    logit_pass: LogitPass
    quick_pass: LogitPass | None = None
    # The float32 logit and its gradient.
    bytes_per_logit: Callable = lambda dtype: _wide(dtype).itemsize + dtype.itemsize
    row_multiple: int = 1


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when a call is traced."""

    z_loss: float
    soft_cap: float | None
    label_smoothing: float
    vocab_axis: Any  # a mesh axis or several, None for a w that isn't split
    dw_dtype: Any  # of the gradient that the caller gets
    return_lse: bool

    def vocab_size(self, w: jax.Array) -> int:
        """Of all shards together."""
        return w.shape[0] * (1 if self.vocab_axis is None else jax.lax.axis_size(self.vocab_axis))


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How rows are cut up.

    Attributes:
      bytes: of a chunk's logits.
      fewest: chunks that many rows are cut into: up to `most_bytes`, they may take more than `bytes`.
      most_bytes: of a chunk's logits, where there are many rows: beside the activations that made them it is little.
      least_rows: that a chunk may have, whatever its logits take. Every chunk reads and writes all of dW in float32:
        with fewer rows, that takes longer than the matmul itself.
      cost_rows: a chunk takes the time of so many rows' three matmuls (on an H100, whatever V and D).
      alignment: rows of a chunk are a multiple of so many.
    """

    bytes: int = 350 * 2**20
    fewest: int = 4
    most_bytes: int = 2**30
    least_rows: int = 2048
    cost_rows: int = 111
    alignment: int = 128


def rows_in_chunk(rows: int, vocab_size: int, bytes_per_logit: int, multiple: int = 1, lent_bytes: int = 0) -> int:
    """As many rows as cost the least, with padding, of those that `Chunks.bytes` or `lent_bytes` hold.

    At least `Chunks.least_rows` may be taken, and of many rows a quarter. Bytes are lent by a result that isn't there
    yet.

    >>> rows_in_chunk(8192, 50304, 2), rows_in_chunk(17, 50304, 6), rows_in_chunk(17, 50304, 2, multiple=256)
    (2048, 17, 256)
    >>> rows_in_chunk(32768, 50304, 2)
    8192
    """
    cut = tiles.tuned("linear_cross_entropy", "chunks", {}, max(1, rows), Chunks())
    of_many = min(rows // cut.fewest, cut.most_bytes // (bytes_per_logit * vocab_size))
    most = max(cut.least_rows, max(cut.bytes, lent_bytes) // (bytes_per_logit * vocab_size), of_many)
    fewest = math.ceil(rows / most)
    if fewest <= 1:
        return max(1, -(-rows // multiple)) * multiple
    aligned = math.lcm(multiple, cut.alignment)
    sizes = {count: -(-rows // (count * aligned)) * aligned for count in range(fewest, 2 * fewest)}
    return min(sizes.values(), key=lambda size: -(-rows // size) * (size + cut.cost_rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def loss(kernels: Kernels, options: Options, x, w, labels, weights):
    """The op by way of `kernels`."""
    results = _on_parts(kernels, options, (False, False), x)(x, w.astype(x.dtype), labels, weights)
    return _totals(options, results, weights)[0]


def _forward(kernels: Kernels, options: Options, x, w, labels, weights):
    needs = x.perturbed, w.perturbed
    x, w, labels, weights = x.value, w.value, labels.value, weights.value
    results = _on_parts(kernels, options, needs, x)(x, w.astype(x.dtype), labels, weights)
    totals, losses = _totals(options, results, weights)
    return totals, (x, w, labels, weights, losses, results["dx"], results["dw"])


def _backward(kernels: Kernels, options: Options, residuals, cotangents):
    x, w, labels, weights, losses, dx, dw = residuals
    of_loss, of_weight, *of_lse = cotangents
    scale = jnp.zeros((), losses.dtype) if isinstance(of_loss, SymbolicZero) else of_loss
    dweights = (losses * scale).astype(weights.dtype)
    if not isinstance(of_weight, SymbolicZero):
        dweights += of_weight.astype(weights.dtype)
    dx, dw = (None if d is None else d * scale for d in (_unpacked(dx), dw))
    if of_lse and not isinstance(of_lse[0], SymbolicZero):
        # Rare (a loss of the log-sum-exps themselves): a pass of its own.
        run = _on_parts(kernels, options, (dx is not None, dw is not None), x, of_lse=True)
        more = run(x, w.astype(x.dtype), labels, weights, *of_lse)
        dx, dw = (None if d is None else d + m for d, m in ((dx, _unpacked(more["dx"])), (dw, more["dw"])))
    dx, dw = None if dx is None else dx.astype(x.dtype), None if dw is None else dw.astype(w.dtype)
    return laid_out_as((x, w, labels, weights), (dx, dw, None, dweights))


loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _totals(options: Options, results, weights):
    """The op's results, and each row's loss: one of weight 0 counts nothing, whatever is in it."""
    losses = jnp.where(weights == 0, 0, results["losses"])
    totals = jnp.sum(losses * weights), jnp.sum(weights)
    return ((*totals, results["lse"]) if options.return_lse else totals), losses


class _How(NamedTuple):
    """How rows are gone over.

    Attributes:
      needs: which gradients are wanted, of x and of w.
      last_axis: the rows are cut along the last of their axes only, so that the others may be split.
      again: by the pass for any rows, after the quick one.
    """

    kernels: Kernels
    options: Options
    needs: tuple[bool, bool]
    last_axis: bool = False
    again: bool = False


def _on_parts(kernels: Kernels, options: Options, needs: tuple[bool, bool], x, *, of_lse: bool = False) -> Callable:
    """`_over_chunks` under any mesh and `vmap`: each device takes its rows and its part of the vocabulary."""
    how = _How(kernels, options, needs)
    letters = [f"r{i}" for i in range(x.ndim - 1)]
    rows = " ".join(letters)
    of_x, of_w = f"{rows} d", "v d"
    dx, dw = (of_x, rows) if needs[0] else None, of_w if needs[1] else None
    return sharded(
        functools.partial(_over_chunks, how),
        (of_x, of_w, *(rows,) * (3 if of_lse else 2)),
        {"losses": rows, "lse": rows, "dx": dx, "dw": dw},
        batch=(*letters, "v"),
        reduces=True,
        whole=functools.partial(_over_chunks, how._replace(last_axis=True)),
        called="linear_cross_entropy",
    )


def _over_chunks(how: _How, axes: dict[str, Any], x, w, labels, weights, of_lse=None) -> dict[str, Any]:
    """`losses` and `lse`, and `dx` and `dw` of the loss (or, given its cotangents, of the lse alone) where needed.

    `dx` is `_packed`. `axes` are those of a mesh that split the letters of `_on_parts`.
    """
    kernels, (needs_dx, needs_dw) = how.kernels, how.needs
    options = dataclasses.replace(how.options, vocab_axis=axes.get("v", how.options.vocab_axis))
    quick = None if how.again else kernels.quick_pass
    logit_pass = quick or kernels.logit_pass
    wide, shape = _wide(x.dtype), x.shape[:-1]
    rows = {"x": x, "labels": labels, "weights": weights.astype(wide)}
    if of_lse is not None:
        rows["of_lse"] = of_lse.astype(wide)
    if how.last_axis:
        rows = {name: jnp.moveaxis(a, len(shape) - 1, 0) for name, a in rows.items()}
    else:
        rows = {name: a.reshape(-1, *a.shape[len(shape) :]) for name, a in rows.items()}
    n, together = rows["labels"].shape[0], max(1, math.prod(rows["labels"].shape[1:]))
    # The float32 sum is turned into a narrower dW in the end.
    lent = w.size * options.dw_dtype.itemsize if needs_dw and options.dw_dtype.itemsize < wide.itemsize else 0
    per_logit = kernels.bytes_per_logit(x.dtype)
    chunk = rows_in_chunk(n, w.shape[0] * together, per_logit, kernels.row_multiple, lent)

    def one(rows, dw):
        coefficients = None
        if needs_dx or needs_dw:
            weights, zeros = rows["weights"], jnp.zeros_like(rows["weights"])
            coefficients = RowCoefficients(weights, 2 * options.z_loss * weights, weights)
            if of_lse is not None:
                coefficients = RowCoefficients(rows["of_lse"], zeros, zeros)
        x = rows["x"]
        of_logits = logit_pass(x, w, rows["labels"], coefficients, options)
        losses = of_logits.lse - of_logits.target_logit + options.z_loss * jnp.square(of_logits.lse)
        of_label = None if of_logits.scale is None else of_logits.of_label
        dx = None
        if needs_dx:
            dx = jnp.dot(of_logits.gradient, w.astype(of_logits.gradient.dtype), preferred_element_type=wide)
            if of_label is not None:
                dx = of_logits.scale[:, None] * dx + of_label[:, None] * w[rows["labels"]]
            if options.vocab_axis is not None:
                dx = jax.lax.psum(dx, options.vocab_axis)
            dx = _packed(dx, x.dtype)
        if needs_dw:
            scaled = x if of_label is None else (of_logits.scale[:, None] * x).astype(x.dtype)
            dw = _add_product(dw, of_logits.gradient, scaled)
        return dw, {"losses": losses, "lse": of_logits.lse, "dx": dx, "of_label": of_label}

    count = max(1, -(-n // chunk))
    padding = count * chunk - n
    if padding:
        # Padded rows have weight 0: they add nothing to dW, and their own results are cut off.
        rows = {name: jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)) for name, a in rows.items()}
    # The first chunk apart: it writes dW, to which others add.
    dw, results = one({name: a[:chunk] for name, a in rows.items()}, None)
    if count > 1:
        split = {name: a[chunk:].reshape(count - 1, chunk, *a.shape[1:]) for name, a in rows.items()}
        # Not before the first chunk's logits are gone.
        (dw, results), split = jax.lax.optimization_barrier(((dw, results), split))
        dw, others = jax.lax.scan(lambda dw, rows: one(rows, dw), dw, split)
        results = jax.tree.map(lambda a, b: jnp.concatenate([a, b.reshape(-1, *a.shape[1:])]), results, others)
    results = jax.tree.map(lambda a: a[:n], results)
    of_label = results.pop("of_label")
    if dw is not None and of_label is not None:
        dw = dw.at[rows["labels"][:n]].add(of_label[:, None] * rows["x"][:n])
    placed = lambda a: jnp.moveaxis(a, 0, len(shape) - 1) if how.last_axis else a.reshape(*shape, *a.shape[1:])  # noqa: E731
    results = {"dw": dw, **jax.tree.map(placed, results)}
    if quick is not None:
        # A loop, and not a condition, as its results take the place of what was there.
        redo = functools.partial(_over_chunks, how._replace(again=True), axes, x, w, labels, weights, of_lse)
        start = jnp.any(results["lse"] == jnp.inf), results
        results = jax.lax.while_loop(lambda carry: carry[0], lambda carry: (carry[0] & False, redo()), start)[1]
    of_rows = mesh_axes(entry for letter, entry in axes.items() if letter != "v")
    if needs_dw and of_rows and not how.again:
        results["dw"] = jax.lax.psum(results["dw"], of_rows)
    return results


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)
