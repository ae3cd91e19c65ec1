"""Runs a function that XLA can't partition on each device's own part, from the letters of its dimensions.

A kernel computes each index of its batch-like dimensions alone, so a mesh may split those and nothing else: every
device runs the kernel on its part, and nothing is gathered along them. Other dimensions are replicated first.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from crescendo.pallas_kernels.op import Device, once_differentiable, target, target_device


def sharded(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Any,
    *,
    batch: Sequence[str],
    sizes: Mapping[str, int] | None = None,
    reduces: bool = False,
    whole: Callable[..., Any] | None = None,
    called: str = "a kernel",
) -> Callable[..., Any]:
    """`function` with the same results under any sharding and under `vmap`.

    Args:
      function: takes arrays, or trees of them, as `inputs`, and returns what `outputs` says; sizes of batch-like
        dimensions are read from the arrays.
      inputs, outputs: the letters of each array's dimensions, separated by spaces, in the place of the array:
        `"b t h e"`; None where there is none. `"k*g"` is one dimension of k groups of g. The first letter of the first
        array is that of every result: a mapped axis of `vmap` joins it. An input that starts with another letter is
        shared by all of that dimension; where `vmap` maps such a one, the calls run one after the other.
      batch: the letters of the dimensions that may be split.
      sizes: of letters that are nowhere alone, as g above.
      reduces: results may lack batch-like letters, over which they are sums: `function` takes first from letters to the
        mesh axes that split them, and adds up over those. Under `vmap` the calls run one after the other.
      whole: what takes the place of `function` where XLA has to split it.
      called: whose derivative is refused.

    Under an automatic mesh the partitioner splits the call, under an explicit one the arguments' types do, and
    inside `shard_map` the arrays are parts already (a mesh axis that it leaves automatic is gathered). The TPU's
    compiler knows no such operation: there several devices need an explicit mesh or `shard_map`. A device that is
    interpreted is alone.

    >>> double = sharded(lambda x: (2 * x,), ["b t"], ["b t"], batch=["b"])
    >>> double(jnp.ones((2, 3)))[0].sum()
    Array(12., dtype=float32)
    >>> jax.vmap(lambda x: double(x)[0])(jnp.ones((5, 2, 3))).shape
    (5, 2, 3)
    """
    outputs = tuple(outputs) if isinstance(outputs, list) else outputs
    of_inputs, of_outputs = (tuple(tuple(a.split()) for a in jax.tree.leaves(tree)) for tree in (inputs, outputs))
    names = _Names(of_inputs, of_outputs, batch)
    first, structure, device = names.inputs[0][0], jax.tree.structure(outputs), target_device()
    if not reduces and (first not in batch or any(letters[:1] != (first,) for letters in names.outputs)):
        raise ValueError(f"every result must start with the first array's batch-like letter, {first}: {outputs}")
    shared = [letters[:1] != (first,) for letters in names.inputs]

    def given(axes: dict[str, Any], function: Callable[..., Any] = function) -> Callable[..., Any]:
        return functools.partial(function, axes) if reduces else function

    @custom_vmap
    def call(*arrays):
        types = jax.sharding.get_abstract_mesh().axis_types
        if AxisType.Manual in types or device.interpreted:
            return given({})(*arrays)
        if AxisType.Explicit in types:
            return _by_types(given, names, arrays, structure)
        if device.platform == "tpu":
            return given({}, whole or function)(*arrays)
        return once_differentiable(_by_partitioner(given, names, device, sizes or {}), called)(*arrays)

    @call.def_vmap
    def _(size, in_batched, *trees):
        arrays, tree = jax.tree.flatten(trees)
        mapped, all_mapped = jax.tree.leaves(in_batched), jax.tree.map(lambda _: True, outputs)
        if reduces or any(moves and alone for moves, alone in zip(mapped, shared, strict=True)):

            def one(moving):
                rest = iter(moving)
                leaves = [next(rest) if moves else array for array, moves in zip(arrays, mapped, strict=True)]
                return call(*jax.tree.unflatten(tree, leaves))

            return jax.lax.map(one, [a for a, moves in zip(arrays, mapped, strict=True) if moves]), all_mapped
        broadcast = [
            array if moves or alone else jnp.broadcast_to(array, (size, *array.shape))
            for array, moves, alone in zip(arrays, mapped, shared, strict=True)
        ]

        def merged(*trees):
            parts, *leaves = jax.tree.leaves(trees)[0].shape[0], *jax.tree.leaves(trees)
            leaves = [a if alone else a.reshape(-1, *a.shape[2:]) for a, alone in zip(leaves, shared, strict=True)]
            results = function(*jax.tree.unflatten(tree, leaves))
            return jax.tree.map(lambda result: result.reshape(parts, -1, *result.shape[1:]), results)

        letter = f"{first}_"  # a letter of its own, so that the mesh may split it apart from the others
        ins = [" ".join(n if alone else (letter, *n)) for n, alone in zip(names.inputs, shared, strict=True)]
        outs = jax.tree.map(lambda array: f"{letter} {array}", outputs)
        run = sharded(merged, jax.tree.unflatten(tree, ins), outs, batch=[letter, *batch], sizes=sizes)
        return run(*jax.tree.unflatten(tree, broadcast)), all_mapped

    return call


def alike(*arrays, but: Any = None):
    """Trees of arrays which, inside of a `jax.shard_map` that checks types, vary over the same axes of the mesh.

    The gradient of an array that devices share is so summed over them outside of an op's derivative rule, which sees
    what a device has. `but`: a mesh axis, or several, which only those vary over that do. Elsewhere the arrays as they
    are.
    """
    axes = frozenset().union(*map(varying, jax.tree.leaves(arrays))) - set(mesh_axes([but]))

    def one(array):
        missing = tuple(sorted(axes - varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(one, arrays)


def laid_out_as(arrays, gradients):
    """Trees of gradients laid out as the arrays they are of: under an explicit mesh a derivative rule has to.

    A gradient is None where there is none. Elsewhere they stay as they are.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return gradients

    def one(gradient, array):
        return None if gradient is None else _placed(gradient, jax.typeof(array).sharding.spec)

    return jax.tree.map(one, gradients, arrays, is_leaf=lambda leaf: leaf is None)


def _placed(array, spec: PartitionSpec):
    return array if jax.typeof(array).sharding.spec == spec else jax.sharding.reshard(array, spec)


def results_of(arrays, results):
    """What a kernel made of arrays, varying as they do: a kernel's own results have no such types."""
    return alike(arrays, results)[1]


def result_like(array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of what `pallas_call` makes of an array, varying as it does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def varying(array) -> frozenset[str]:
    """The axes of the mesh that an array varies over inside `shard_map`."""
    return jax.typeof(array).manual_axis_type.varying


def plain(number):
    """A number that a kernel reads, of the type that its arithmetic has: what varies over a mesh is outside of it."""
    return number + jnp.int32(0) if varying(number) else number


def mesh_axes(entries) -> tuple[str, ...]:
    """The names in the entries of a partition specification."""
    entries = [(entry,) if isinstance(entry, str) else entry for entry in entries if entry is not None]
    return tuple(name for entry in entries for name in entry)


class _Names(NamedTuple):
    """The letters of each array's dimensions, and those that may be split."""

    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[tuple[str, ...], ...]
    batch: Sequence[str]

    def axes(self, specs) -> dict[str, Any]:
        """The mesh axes of each batch-like letter, from the partition specifications of arrays and maybe of results."""
        where: dict[str, Any] = {}
        for dimensions, spec in zip((*self.inputs, *self.outputs), specs, strict=False):
            for dimension, entry in zip(dimensions, spec, strict=False):
                letter, taken = dimension.split("*")[0], mesh_axes(where.values())
                if letter in self.batch and letter not in where and not set(mesh_axes([entry])) & set(taken):
                    where |= {} if entry is None else {letter: entry}
        return where

    @staticmethod
    def specs(arrays, where: dict[str, Any]) -> list[PartitionSpec]:
        return [PartitionSpec(*(where.get(dimension.split("*")[0]) for dimension in array)) for array in arrays]


def _by_types(given, names: _Names, arrays, structure):
    """The call under an explicit mesh."""
    leaves, tree = jax.tree.flatten(arrays)
    where = names.axes([jax.typeof(leaf).sharding.spec for leaf in leaves])

    def part(*leaves):
        return jax.tree.leaves(given(where)(*jax.tree.unflatten(tree, alike(*leaves))))

    in_specs, out_specs = tuple(names.specs(names.inputs, where)), names.specs(names.outputs, where)
    leaves = [_placed(leaf, spec) for leaf, spec in zip(leaves, in_specs, strict=True)]
    return jax.tree.unflatten(structure, jax.shard_map(part, in_specs=in_specs, out_specs=out_specs)(*leaves))


@contextlib.contextmanager
def _meant_for(device: Device) -> Iterator[None]:
    """The device that is known here, or this one: parts are traced later, outside of the context that says which."""
    known = jax.sharding.get_abstract_mesh().abstract_device is not None
    with contextlib.nullcontext() if known else target(device.abstract):
        yield


def _by_partitioner(given, names: _Names, device: Device, sizes: Mapping[str, int]):
    """The call as an operation that the partitioner knows how to split."""

    def partition(mesh, arg_shapes, result_shape):
        where = names.axes([shape.sharding.spec for shape in jax.tree.leaves((arg_shapes, result_shape))])

        def placed(tree, arrays):
            places = [NamedSharding(mesh, spec) for spec in names.specs(arrays, where)]
            return jax.tree.unflatten(jax.tree.structure(tree), places)

        part = _meant_for(device)(given(where))
        return mesh, part, placed(result_shape, names.outputs), placed(arg_shapes, names.inputs)

    words: dict[str, str] = {}  # Shardy wants lower-case ones

    def rule(array):
        dimensions = [[words.setdefault(n, f"f{len(words)}") for n in dimension.split("*")] for dimension in array]
        return " ".join(f"({' '.join(factors)})" if len(factors) > 1 else factors[0] for factors in dimensions)

    text = " -> ".join(", ".join(map(rule, arrays)) for arrays in (names.inputs, names.outputs))
    replicated = tuple(word for letter, word in words.items() if letter not in names.batch)
    wrapped = custom_partitioning(_meant_for(device)(given({})))
    of_words = {words[letter]: size for letter, size in sizes.items()}
    wrapped.def_partition(partition, sharding_rule=text, need_replication_factors=replicated, **of_words)
    return wrapped
