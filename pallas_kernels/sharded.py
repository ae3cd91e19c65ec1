"""Runs a kernel that XLA can't partition on each device's own part, from the letters of its dimensions.

A kernel computes each index of its batch-like dimensions alone, so a mesh may split those and nothing else: every
device runs the kernel on its part, and nothing is gathered along them. Other dimensions are replicated first.
"""

import contextlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from crescendo.pallas_kernels.op import once_differentiable, target, target_device


def sharded(
    function: Callable[..., tuple[jax.Array, ...]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    batch: Sequence[str],
) -> Callable[..., tuple[jax.Array, ...]]:
    """`function` with the same results under any sharding and under `vmap`.

    Args:
      function: takes arrays, one for each of `inputs`, and returns a tuple of arrays, one for each of `outputs`; sizes
        of batch-like dimensions are read from the arrays.
      inputs, outputs: the letters of each array's dimensions, separated by spaces: `"b t h e"`. The first letter of
        the first array is that of every result: a mapped axis of `vmap` joins it. An input that starts with another
        letter is shared by all of that dimension; where `vmap` maps such a one, the calls run one after the other.
      batch: the letters of the dimensions that may be split.

    Under an automatic mesh the partitioner splits the call, under an explicit one the arguments' types do, and
    inside `shard_map` the arrays are parts already (a mesh axis that it leaves automatic is gathered). The TPU's
    compiler knows no such operation: there several devices need an explicit mesh or `shard_map`.

    >>> double = sharded(lambda x: (2 * x,), ["b t"], ["b t"], batch=["b"])
    >>> double(jnp.ones((2, 3)))[0].sum()
    Array(12., dtype=float32)
    >>> jax.vmap(lambda x: double(x)[0])(jnp.ones((5, 2, 3))).shape
    (5, 2, 3)
    """
    in_letters, out_letters = [tuple(spec.split()) for spec in inputs], [tuple(spec.split()) for spec in outputs]
    first = in_letters[0][0]
    leading = {letters[0] for letters in (in_letters[0], *out_letters)}
    if len(leading) != 1 or not leading <= set(batch):
        raise ValueError(f"every result must start with the first array's batch-like letter, not {sorted(leading)}")
    shared = [letters[0] != first for letters in in_letters]
    partitioned = _partitioned(function, in_letters, out_letters, frozenset(batch))

    @custom_vmap
    def call(*arrays):
        return partitioned(*arrays)

    @call.def_vmap
    def _(size, in_batched, *arrays):
        if any(mapped and alone for mapped, alone in zip(in_batched, shared, strict=True)):

            def one(mapped_arrays):
                given = iter(mapped_arrays)
                return call(*(next(given) if m else a for a, m in zip(arrays, in_batched, strict=True)))

            moving = [array for array, mapped in zip(arrays, in_batched, strict=True) if mapped]
            return jax.lax.map(one, moving), (True,) * len(outputs)
        broadcast = [
            array if mapped or alone else jnp.broadcast_to(array, (size, *array.shape))
            for array, mapped, alone in zip(arrays, in_batched, shared, strict=True)
        ]
        letter = f"{first}_"  # a letter of its own, so that the mesh may split it apart from the others

        def merged(*arrays):
            parts, rows = arrays[0].shape[:2]
            results = function(
                *(
                    array if alone else array.reshape(parts * rows, *array.shape[2:])
                    for array, alone in zip(arrays, shared, strict=True)
                )
            )
            return tuple(result.reshape(parts, rows, *result.shape[1:]) for result in results)

        mapped = sharded(
            merged,
            [spec if alone else f"{letter} {spec}" for spec, alone in zip(inputs, shared, strict=True)],
            [f"{letter} {spec}" for spec in outputs],
            batch=[letter, *batch],
        )
        return mapped(*broadcast), (True,) * len(outputs)

    return call


def _partitioned(function, in_letters, out_letters, batch):
    """The call as the mesh in force asks for it."""
    device = target_device()

    def part(*arrays):
        # Each device's part is traced later, outside of the context that says which device it is for.
        known = jax.sharding.get_abstract_mesh().abstract_device is not None
        with contextlib.nullcontext() if known else target(device.abstract):
            return tuple(function(*arrays))

    def call(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if AxisType.Manual in mesh.axis_types:
            return tuple(function(*arrays))
        if AxisType.Explicit in mesh.axis_types:
            where = _placements(arrays, in_letters, batch)
            return jax.shard_map(
                lambda *arrays: tuple(function(*arrays)),
                in_specs=tuple(PartitionSpec(*(where.get(letter) for letter in letters)) for letters in in_letters),
                out_specs=tuple(PartitionSpec(*(where.get(letter) for letter in letters)) for letters in out_letters),
                check_vma=False,
            )(*arrays)
        if device.platform == "tpu":
            return tuple(function(*arrays))
        return once_differentiable(_automatic(part, arrays, in_letters, out_letters, batch), "a kernel")(*arrays)

    return call


def _placements(arrays, in_letters, batch) -> dict:
    """The mesh axes of each batch-like letter, from the arguments' types."""
    where: dict = {}
    for array, letters in zip(arrays, in_letters, strict=True):
        spec = jax.typeof(array).sharding.spec
        for letter, axes in zip(letters, spec, strict=False):
            if letter in batch and axes is not None:
                where.setdefault(letter, axes)
    return where


def _automatic(part, arrays, in_letters, out_letters, batch):
    """The call as an operation that the partitioner knows how to split."""

    def partition(mesh, arg_shapes, result_shape):
        where: dict = {}
        for shape, letters in zip((*arg_shapes, *result_shape), (*in_letters, *out_letters), strict=True):
            for letter, axes in zip(letters, shape.sharding.spec, strict=False):
                if letter in batch and axes is not None:
                    where.setdefault(letter, axes)

        def placed(letters):
            return NamedSharding(mesh, PartitionSpec(*(where.get(letter) for letter in letters)))

        return mesh, part, tuple(map(placed, out_letters)), tuple(map(placed, in_letters))

    names: dict[str, str] = {}

    def rule(letters):
        # Shardy wants lower-case words.
        return " ".join(names.setdefault(letter, f"f{len(names)}") for letter in letters)

    text = f"{', '.join(map(rule, in_letters))} -> {', '.join(map(rule, out_letters))}"
    replicated = tuple(name for letter, name in names.items() if letter not in batch)
    wrapped = custom_partitioning(part)
    wrapped.def_partition(partition, sharding_rule=text, need_replication_factors=replicated)
    return wrapped
