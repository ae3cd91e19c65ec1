"""Gradients computed in the forward pass, rows in chunks: three matmuls in all, and logits of one chunk at a time.

Differentiating the loss of a chunk of rows needs its logits; once they are there, so are both of their gradients:
`dX` of the chunk is final and `dW` is added to a float32 accumulator. The backward pass scales what the forward pass
made. Recomputing logits in the backward would take a fourth matmul; keeping them, `N x V` numbers.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.custom_derivatives import SymbolicZero
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from crescendo.pallas_kernels.op import once_differentiable, target, target_device


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
class Kernels:
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

    kernels: Kernels
    z_loss: float
    soft_cap: float | None
    label_smoothing: float
    vocab_axis: Any  # a mesh axis or several, None for a w that isn't split
    dw_dtype: Any  # of the gradient that the caller gets

    def vocab_size(self, w: jax.Array) -> int:
        """Of all shards together."""
        return w.shape[0] * (1 if self.vocab_axis is None else jax.lax.axis_size(self.vocab_axis))


def rows_in_chunk(rows: int, vocab_size: int, bytes_per_logit: int, multiple: int = 1, lent_bytes: int = 0) -> int:
    """As many rows as cost the least, with padding, of those that `CHUNK_BYTES` or `lent_bytes` hold.

    At least `MIN_CHUNK_ROWS` may be taken. Bytes are lent by a result that isn't there yet.

    >>> rows_in_chunk(8192, 50304, 2), rows_in_chunk(17, 50304, 6), rows_in_chunk(17, 50304, 2, multiple=256)
    (2048, 17, 256)
    """
    most = max(MIN_CHUNK_ROWS, max(CHUNK_BYTES, lent_bytes) // (bytes_per_logit * vocab_size))
    fewest = math.ceil(rows / most)
    if fewest == 1:
        return -(-rows // multiple) * multiple
    aligned = math.lcm(multiple, ROW_ALIGNMENT)
    sizes = {count: -(-rows // (count * aligned)) * aligned for count in range(fewest, 2 * fewest)}
    return min(sizes.values(), key=lambda size: -(-rows // size) * (size + ROWS_A_CHUNK_COSTS))


CHUNK_BYTES = 350 * 2**20
# Every chunk reads and writes all of dW in float32: fewer rows, and that takes longer than the matmul itself. It takes
# the time of so many rows' three matmuls (on an H100, whatever V and D).
MIN_CHUNK_ROWS = 2048
ROWS_A_CHUNK_COSTS = 111
ROW_ALIGNMENT = 128


def chunked(x, w, labels, weights, *, return_lse, **options):
    """The op by way of `options["kernels"]`."""
    axes = _varying(x) - _varying(w)
    if axes:  # transposed, this sums the gradient of a w that all devices share
        w = jax.lax.pcast(w, tuple(axes), to="varying")
    loss_sum, weight_sum, lse = _loss(Options(dw_dtype=w.dtype, **options), x, w, labels, weights)
    return (loss_sum, weight_sum, lse) if return_lse else (loss_sum, weight_sum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, x, w, labels, weights):
    results = _everywhere(options, (False, False), x, w, labels, weights)
    return _totals(results, weights)[:3]


def _forward(options: Options, x, w, labels, weights):
    needs = x.perturbed, w.perturbed
    x, w, labels, weights = x.value, w.value, labels.value, weights.value
    results = _everywhere(options, needs, x, w, labels, weights)
    loss_sum, weight_sum, lse, losses = _totals(results, weights)
    return (loss_sum, weight_sum, lse), (x, w, labels, weights, losses, results["dx"], results["dw"])


def _backward(options: Options, residuals, cotangents):
    x, w, labels, weights, losses, dx, dw = residuals
    of_loss, of_weight, of_lse = cotangents
    scale = jnp.zeros((), losses.dtype) if isinstance(of_loss, SymbolicZero) else of_loss
    dweights = (losses * scale).astype(weights.dtype)
    if not isinstance(of_weight, SymbolicZero):
        dweights += of_weight.astype(weights.dtype)
    dx, dw = (None if d is None else d * scale for d in (_unpacked(dx), dw))
    if not isinstance(of_lse, SymbolicZero):
        # Rare (a loss of the log-sum-exps themselves): a pass of its own.
        more = _everywhere(options, (dx is not None, dw is not None), x, w, labels, weights, of_lse)
        dx, dw = (None if d is None else d + m for d, m in ((dx, _unpacked(more["dx"])), (dw, more["dw"])))
    return None if dx is None else dx.astype(x.dtype), None if dw is None else dw.astype(w.dtype), None, dweights


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _totals(results, weights):
    """`(loss_sum, weight_sum, lse, losses)`; a row of weight 0 counts nothing, whatever is in it."""
    losses = jnp.where(weights == 0, 0, results["losses"])
    return jnp.sum(losses * weights), jnp.sum(weights), results["lse"], losses


def _everywhere(options: Options, needs: tuple[bool, bool], x, w, labels, weights, *of_lse) -> dict[str, Any]:
    """`_over_chunks` under any mesh and `vmap`: each device takes its rows and its part of the vocabulary."""
    w = w.astype(x.dtype)  # before it moves between devices
    arrays = (x, w, labels, weights, *of_lse)
    mesh = jax.sharding.get_abstract_mesh()
    rows = (*x.shape[:-1],)

    device = target_device()

    def local(row_axes, vocab_axis, *arrays):
        # The partitioner asks for a device's part later, outside of the context that says which device it is for.
        known = jax.sharding.get_abstract_mesh().abstract_device is not None
        with contextlib.nullcontext() if known else target(device.abstract):
            results = _over_chunks(dataclasses.replace(options, vocab_axis=vocab_axis), needs, *arrays)
        if row_axes and needs[1]:
            results["dw"] = jax.lax.psum(results["dw"], row_axes)
        return results

    def specs(of_rows, of_vocab):
        ins = (P(*of_rows, None), P(of_vocab, None), *(P(*of_rows),) * (2 + len(of_lse)))
        outs = {"losses": P(*of_rows), "lse": P(*of_rows), "dx": (ins[0], P(*of_rows)), "dw": ins[1]}
        return ins, {name: spec for name, spec in outs.items() if name not in without}

    without = {name for name, needed in zip(("dx", "dw"), needs, strict=True) if not needed}
    if AxisType.Manual in mesh.axis_types:
        return local((), options.vocab_axis, *arrays)
    if AxisType.Explicit in mesh.axis_types:
        of_rows, of_vocab = jax.typeof(x).sharding.spec[:-1], jax.typeof(w).sharding.spec[0]
        ins, outs = specs(of_rows, of_vocab)
        run = functools.partial(local, _flat(of_rows), of_vocab)
        parts = jax.shard_map(lambda *a: _given(run(*a)), in_specs=ins, out_specs=outs, check_vma=False)(*arrays)
        return {"dx": None, "dw": None, **parts}

    if device.platform == "tpu":
        # JAX's callback for the partitioner is not there. It splits the formula itself, by all axes but the last.
        return _over_chunks(options, needs, *arrays, last_axis=True)

    def partition(mesh, arg_shapes, result_shape):
        of_rows, (of_vocab, _) = _padded(arg_shapes[0], len(rows) + 1)[:-1], _padded(arg_shapes[1], 2)
        if set(_flat(of_rows)) & set(_flat((of_vocab,))):
            of_vocab = None
        ins, outs = specs(of_rows, of_vocab)
        place = functools.partial(jax.tree.map, lambda spec: NamedSharding(mesh, spec))
        run = functools.partial(local, _flat(of_rows), of_vocab)
        return mesh, lambda *a: _given(run(*a)), place(outs), place(ins)

    letters = " ".join(f"r{i}" for i in range(len(rows)))
    table = {"losses": letters, "lse": letters, "dx": f"{letters} d, {letters}", "dw": "v d"}
    results = ", ".join(text for name, text in sorted(table.items()) if name not in without)
    split = custom_partitioning(lambda *a: _given(local((), None, *a)))
    split.def_partition(
        partition,
        sharding_rule=f"{letters} d, v d{f', {letters}' * (2 + len(of_lse))} -> {results}",
        need_replication_factors=("d",),
    )
    results = once_differentiable(sequential_vmap(split), "linear_cross_entropy")(*arrays)
    return {"dx": None, "dw": None, **results}


def _given(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if value is not None}


def _flat(axes) -> tuple[str, ...]:
    """The names in the entries of a partition specification."""
    return tuple(
        name for entry in axes if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)
    )


def _padded(shape, length: int):
    spec = tuple(shape.sharding.spec)
    return spec + (None,) * (length - len(spec))


def _over_chunks(options: Options, *arguments, **how) -> dict[str, Any]:
    """`_by_pass` by the quick pass, and by the other one where that is needed."""
    kernels = options.kernels
    if kernels.quick_pass is None:
        return _by_pass(kernels.logit_pass, options, *arguments, **how)
    results = _by_pass(kernels.quick_pass, options, *arguments, **how)
    again = jnp.any(results["lse"] == jnp.inf)
    # A loop, and not a condition, as its results take the place of what was there.
    run = lambda carry: (carry[0] & False, _by_pass(kernels.logit_pass, options, *arguments, **how))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[0], run, (again, results))[1]


def _by_pass(
    logit_pass: LogitPass,
    options: Options,
    needs: tuple[bool, bool],
    x,
    w,
    labels,
    weights,
    of_lse=None,
    *,
    last_axis: bool = False,
) -> dict[str, Any]:
    """`losses` and `lse`, and `dx` and `dw` of the loss (or, given its cotangents, of the lse alone) where needed.

    `dx` is `_packed`. The rows are cut as they are in memory, or along the last of their axes only, so that the others
    may be split.
    """
    needs_dx, needs_dw = needs
    wide, kernels = _wide(x.dtype), options.kernels
    shape = x.shape[:-1]
    rows = {"x": x, "labels": labels, "weights": weights.astype(wide)}
    if of_lse is not None:
        rows["of_lse"] = of_lse.astype(wide)
    if last_axis:
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

    count = -(-n // chunk)
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
    if last_axis:
        return {"dw": dw, **jax.tree.map(lambda a: jnp.moveaxis(a, 0, len(shape) - 1), results)}
    return {"dw": dw, **jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), results)}


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _varying(array) -> frozenset[str]:
    """The mesh axes that an array varies over inside `shard_map`."""
    return jax.typeof(array).manual_axis_type.varying
