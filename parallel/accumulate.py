"""Gradients of a batch of any size, one fixed-shape microbatch at a time.

Over several devices the sum may wait: each shard of the batch keeps the sum of its own part of every microbatch, and
the shards are added up once, at the end of the step, instead of after every microbatch. What is measured of a
microbatch's gradient is then measured of each part's.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from crescendo.parallel.pipeline import sums_through_stages
from crescendo.parallel.stages import Pipeline

Tree = Any


class Spread(NamedTuple):
    """How gradients are summed over a mesh.

    Attributes:
      mesh: the devices, or None.
      axes: the mesh axes along which the sum waits for the end of the step; their product is the number of parts.
      keep: lays a tree of gradients out as they are to be added up.
      held: of each parameter, how `axes` split it, a `PartitionSpec`; a gradient isn't summed over axes that do.
      scattered: of each gradient, how `axes` split its sum: a sum over axes that split the result alone is scattered.
      others: of each gradient, how the mesh's other axes split it.
      pipeline: how layers lie over stages; None: on every device.
    """

    mesh: Mesh | AbstractMesh | None = None
    axes: tuple[str, ...] = ()
    keep: Callable[[Tree], Tree] = lambda gradients: gradients
    held: Tree = None
    scattered: Tree = None
    others: Tree = None
    pipeline: Pipeline | None = None

    @property
    def parts(self) -> int:
        """In how many parts a microbatch's gradient is measured."""
        parts = 1
        for axis in self.axes:
            assert self.mesh is not None
            parts *= self.mesh.shape[axis]
        return parts


NOT_SPREAD = Spread()


class Accumulated(NamedTuple):
    """Sums over the microbatches of one batch.

    Attributes:
      loss_sum: float32.
      weight: float32, what `loss_sum` and `gradients` are divided by to get means (`over_weight`).
      extra: float32 scalars by name, what else `loss_fn` sums up.
      gradients: of `loss_sum`, the parameters' tree, float32 (complex64 of complex parameters).
      squared_norms: float32 `[k_max * parts, ...]`, what was measured of part i's mean gradient `g_i / w_i`, by default
        `||g_i / w_i||^2`; 0 from `count * parts` on. A part is a microbatch, or a shard of one (`Spread`).
    """

    loss_sum: jax.Array
    weight: jax.Array
    extra: dict[str, jax.Array]
    gradients: Tree
    squared_norms: Tree


def in_single(x: jax.Array) -> jax.Array:
    """In float32, or complex64 where it is complex."""
    return x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)


def inner_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """`Re(conj(a) b)` entry by entry, float32: the product of real numbers, `|a|^2` of a with itself.

    >>> print(inner_products(jnp.array([3 + 4j]), jnp.array([3 + 4j])))
    [25.]
    """
    return jnp.real(jnp.conj(in_single(a)) * in_single(b))


def squared_norm(tree: Tree) -> jax.Array:
    """The sum of squares of all entries, in float32."""
    return sum((jnp.sum(inner_products(x, x)) for x in jax.tree.leaves(tree)), jnp.float32(0))


def over_weight(sums: Tree, weight: jax.Array) -> Tree:
    """The means `sums / weight`, at any weight: of what weighs nothing they are 0.

    >>> print(over_weight(jnp.array([0.5, 1.0]), jnp.float32(0.25)), over_weight(jnp.zeros(2), jnp.float32(0)))
    [2. 4.] [0. 0.]
    """
    divisor = jnp.where(weight == 0, 1, weight)
    return jax.tree.map(lambda x: x / divisor, sums)


def accumulate(
    loss_fn: Callable,
    parameters: Tree,
    microbatches: Tree,
    count: jax.Array,
    *,
    measure: Callable[[Tree], Tree] = squared_norm,
    spread: Spread = NOT_SPREAD,
) -> Accumulated:
    """Adds up loss and gradients over the first `count` of `k_max` microbatches.

    The trip count is traced, so a batch of another size is the same program: a change of batch size never recompiles.

    Args:
      loss_fn: `(parameters, microbatch) -> (loss_sum, weight, extra)`: two float32 scalars, and a dict of such (it may
        be empty) that are added up too, such as counts of right answers. For a pipeline it is in parts
        (`crescendo.models.parts.Parts`).
      parameters: a tree of arrays.
      microbatches: a tree of arrays `[k_max, microbatch, ...]`.
      count: int32 scalar in `[1, k_max]`.
      measure: from a part's gradients to a tree of sums of their squares.
      spread: how gradients are summed over the devices.

    >>> loss = lambda w, x: (jnp.sum(w * x), jnp.float32(x.size), {"odd": jnp.sum(x % 2)})
    >>> total = accumulate(loss, jnp.float32(2), jnp.arange(6.0).reshape(3, 2), jnp.int32(2))
    >>> float(total.loss_sum), float(total.weight), float(total.gradients), float(total.extra["odd"])
    (12.0, 4.0, 6.0, 2.0)
    """

    def one(index, k_max, loss_sum, weight, extra, gradients) -> Accumulated:
        squares = over_weight(measure(gradients), jnp.square(weight))
        rows = jax.tree.map(lambda x: jnp.zeros((k_max, *x.shape)).at[index].set(x), squares)
        return Accumulated(loss_sum, weight, extra, gradients, rows)

    def local(parameters, microbatches, count):
        if spread.pipeline is None:
            return _sum_over_microbatches(one, loss_fn, parameters, microbatches, count, spread.keep)
        sums = sums_through_stages(
            spread.pipeline,
            lambda gradient, weight: (gradient, inner_products(gradient, gradient)),
            lambda gradients: spread.keep(jax.tree.map(in_single, gradients)),
            *(loss_fn, parameters, microbatches, count),
        )
        # What is measured is a sum of squares, by parameter or by layer: norms in place of all entries give the same.
        norms = jax.tree.map(
            lambda rows, x: jnp.sqrt(rows).reshape(*rows.shape, *(1,) * (x.ndim + 1 - rows.ndim)), sums.rows, parameters
        )
        squares = jax.vmap(lambda norms, weight: over_weight(measure(norms), weight))(
            norms, jnp.square(sums.microbatch_weights)
        )
        return Accumulated(sums.loss_sum, jnp.sum(sums.microbatch_weights), sums.extra, sums.entries, squares)

    if not spread.axes:
        return local(parameters, microbatches, count)

    def reduced(parameters, microbatches, count):
        total = local(parameters, microbatches, count)
        return (
            jax.lax.psum(total.loss_sum, spread.axes),
            jax.lax.psum(total.weight, spread.axes),
            jax.tree.map(lambda x: jax.lax.psum(x, spread.axes), total.extra),
            _reduce(total.gradients, spread),
            jax.tree.map(lambda x: x[:, None], total.squared_norms),
        )

    by_part = _by_part(reduced, spread, (P(), P(), P(), spread.scattered, P(None, spread.axes)))
    loss_sum, weight, extra, gradients, squared_norms = by_part(parameters, microbatches, count)
    return Accumulated(loss_sum, weight, extra, gradients, jax.tree.map(_flatten_parts, squared_norms))


def _by_part(function: Callable, spread: Spread, out_specs: Tree, *others: Tree) -> Callable:
    """`function(parameters, microbatches, count, *others)` on every part of the microbatches, manual over its axes.

    `others` are the specifications of what else it takes.
    """
    # Unchecked, because a checked one would sum the gradients of replicated parameters in every microbatch.
    return jax.shard_map(
        function,
        mesh=spread.mesh,
        in_specs=(spread.held, P(None, spread.axes), P(), *others),
        out_specs=out_specs,
        axis_names=set(spread.axes),
        check_vma=False,
    )


def _reduce(gradients: Tree, spread: Spread) -> Tree:
    """The sums over the parts."""

    def one(gradient: jax.Array, held: P, scattered: P) -> jax.Array:
        rest = set(spread.axes) - {*_named(held)}
        for dimension, (before, after) in enumerate(itertools.zip_longest(held, scattered)):
            if added := tuple(axis for axis in _named([after]) if axis not in _named([before])):
                gradient = jax.lax.psum_scatter(gradient, added, scatter_dimension=dimension, tiled=True)
                rest -= set(added)
        summed = tuple(axis for axis in spread.axes if axis in rest)
        return jax.lax.psum(gradient, summed) if summed else gradient

    # Manual over all axes: the partitioner would gather a gradient before it scatters the sum.
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        lambda gradients: jax.tree.map(one, gradients, spread.held, spread.scattered),
        mesh=mesh,
        in_specs=(spread.others,),
        out_specs=spread.others,
        axis_names=set(mesh.axis_names) - set(spread.axes),
        check_vma=False,
    )(gradients)


def _named(entries: Iterable) -> dict[str, None]:
    """The mesh axes in entries of a `PartitionSpec`, in their order."""
    return {axis: None for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry or ())}


def _flatten_parts(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


class Deviations(NamedTuple):
    """How the parts' mean gradients `g_i` lie about the batch's, `g`.

    Attributes:
      dot_products: float32 `[k_max * parts]`, `<g_i, g>`; 0 from `count * parts` on.
      squares: float32, `sum_i |g_i - g|^2`, entry by entry, the parameters' tree.
    """

    dot_products: jax.Array
    squares: Tree


def deviations(
    loss_fn: Callable,
    parameters: Tree,
    microbatches: Tree,
    count: jax.Array,
    mean_gradients: Tree,
    *,
    spread: Spread = NOT_SPREAD,
) -> Deviations:
    """Computes every part's gradient again, to compare it with the batch's: as expensive as `accumulate`.

    Args:
      loss_fn, parameters, microbatches, count, spread: as given to `accumulate`.
      mean_gradients: `g`, its gradients over its weight.

    >>> loss = lambda w, x: (jnp.sum(w * x), jnp.float32(x.size), {})
    >>> result = deviations(loss, jnp.float32(2), jnp.arange(6.0).reshape(3, 2), jnp.int32(2), jnp.float32(1.5))
    >>> print(result.dot_products, result.squares)
    [0.75 3.75 0.  ] 2.0
    """

    def one(index, k_max, loss_sum, weight, extra, gradients, mean_gradients) -> Deviations:
        pairs = jax.tree.map(lambda g, mean: _deviation(g, weight, mean), gradients, mean_gradients)
        squares, products = jax.tree.transpose(jax.tree.structure(gradients), jax.tree.structure((0, 0)), pairs)
        dot_product = sum(map(jnp.sum, jax.tree.leaves(products)))
        return Deviations(jnp.zeros(k_max).at[index].set(dot_product), squares)

    def local(parameters, microbatches, count, mean_gradients):
        if spread.pipeline is not None:
            sums = sums_through_stages(
                spread.pipeline,
                _deviation,
                lambda gradients: spread.keep(jax.tree.map(in_single, gradients)),
                *(loss_fn, parameters, microbatches, count, mean_gradients),
            )
            by_parameter = [jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(sums.rows)]
            return Deviations(jnp.sum(jnp.stack(by_parameter), axis=0), sums.entries)
        term = functools.partial(one, mean_gradients=mean_gradients)
        return _sum_over_microbatches(term, loss_fn, parameters, microbatches, count, spread.keep)

    if not spread.axes:
        return local(parameters, microbatches, count, mean_gradients)

    def reduced(*arguments):
        sums = local(*arguments)
        return sums.dot_products[:, None], _reduce(sums.squares, spread)

    # The mean lies as the sums do, and as the parameters where it is compared.
    by_part = _by_part(reduced, spread, (P(None, spread.axes), spread.scattered), spread.held)
    dot_products, squares = by_part(parameters, microbatches, count, mean_gradients)
    return Deviations(_flatten_parts(dot_products), squares)


def _deviation(gradient: jax.Array, weight: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of a parameter: the squares of what a part's mean gradient differs by, and its products with the batch's."""
    of_part = over_weight(gradient, weight)
    return inner_products(of_part - mean, of_part - mean), inner_products(of_part, mean)


def _sum_over_microbatches(
    one: Callable, loss_fn: Callable, parameters: Tree, microbatches: Tree, count: jax.Array, keep: Callable
):
    """The sum of `one(index, k_max, loss_sum, weight, extra, gradients in float32)` over the first `count` of them."""
    k_max = jax.tree.leaves(microbatches)[0].shape[0]

    def loss_and_rest(parameters, microbatch):
        loss_sum, weight, extra = loss_fn(parameters, microbatch)
        return loss_sum, (weight, extra)

    value_and_grad = jax.value_and_grad(loss_and_rest, has_aux=True)

    def term(index, written: Callable = lambda gradient: gradient):
        microbatch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), microbatches)
        (loss_sum, (weight, extra)), gradients = value_and_grad(parameters, microbatch)
        gradients = jax.tree.map(written, keep(jax.tree.map(in_single, gradients)))
        return one(index, k_max, loss_sum, weight, extra, gradients)

    if k_max == 1:
        # A stack of layers is put together once, and not by each who reads it.
        return term(0, jax.lax.optimization_barrier)
    # Traced once: for the shapes of the sums, and for the loop.
    traced, shapes = jax.make_jaxpr(term, return_shape=True)(jnp.int32(0))
    add = jax.extend.core.jaxpr_as_fun(traced)

    def body(index, sums):
        return [jnp.add(total, x) for total, x in zip(sums, add(index), strict=True)]

    leaves, structure = jax.tree.flatten(shapes)
    zeros = [jnp.zeros(x.shape, x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, jax.lax.fori_loop(0, count, body, zeros))
