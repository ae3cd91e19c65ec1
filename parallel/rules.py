"""Where each logical axis lives: one table a strategy, from logical axis name to mesh axis."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# A logical axis that a table doesn't name stays whole on every device.
STRATEGIES: dict[str, dict[str, str]] = {
    "data": {},
    "fsdp": {"embed": "fsdp"},
}
BATCH_AXES = ("data", "fsdp")


def shard(logical_axes: Any, mesh: Mesh, strategy: str = "fsdp") -> Any:
    """The `NamedSharding` of every array, from the logical names of its axes.

    Args:
      logical_axes: a tree with tuples of names as leaves.
      mesh: as `make_mesh` makes it.
      strategy: a key of `STRATEGIES`.

    >>> from crescendo.parallel.mesh import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> shard({"table": ("vocab", "embed")}, mesh)["table"].spec
    P(None, 'fsdp')
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"no sharding strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    table = STRATEGIES[strategy]

    def sharding(names):
        return NamedSharding(mesh, PartitionSpec(*(table.get(name) for name in names)))

    return jax.tree.map(sharding, logical_axes, is_leaf=lambda x: isinstance(x, tuple))


def constrain(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """`(activation, logical names) -> activation`, split along its examples and whole along all else."""

    def lay_out(array: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        spec = PartitionSpec(*(BATCH_AXES if name == "batch" else None for name in names))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    return lay_out


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The sharding of a batch: the example axis, behind `leading` others, split over every batch-like mesh axis."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))
