"""Where everything lives: tables of parameters, activations, memory and traffic, of a mesh that need not be there."""

import math
from typing import Any

import jax
from rich.table import Table

from crescendo.parallel.collectives import KINDS
from crescendo.parallel.layout import Layout
from crescendo.parallel.rules import ACTIVATIONS, spec_entries

Tree = Any
# What a model's activations are, by the logical names of their axes.
ACTIVATION_AXES = {
    "tokens": ("batch", "length"),
    "residual stream": ("batch", "residual_length", "embed"),
    "queries": ("batch", "length", "heads", "head_width"),
    "keys, values": ("batch", "length", "kv_heads", "head_width"),
    "feed-forward": ("batch", "length", "mlp"),
    "logits": ("batch", "length", "vocab"),
}
# A parameter that is replicated on every device is worth a warning from this size on.
WARN_BYTES = 2**20


def device_bytes(arrays: Tree, shardings: Tree) -> int:
    """What one device holds of arrays (or of their shapes) laid out so.

    >>> from crescendo.parallel.mesh import MeshSpec
    >>> layout = Layout(MeshSpec(fsdp=8, data=1).abstract(8))
    >>> x = {"w": jax.ShapeDtypeStruct((16, 4), "float32")}
    >>> device_bytes(x, layout.parameters({"w": ("embed", "mlp")}))
    32
    """
    return sum(
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(arrays), jax.tree.leaves(shardings), strict=True)
    )


def describe_sharding(arrays: Tree, logical_axes: Tree, layout: Layout) -> tuple[Table, list[str]]:
    """One row a parameter and one an activation, and warnings of what is replicated on every device.

    Args:
      arrays: the parameters or their shapes.
      logical_axes: the names of their axes.
      layout: mesh and strategy.

    Raises:
      ValueError: a dimension that the mesh can't divide.
    """
    layout.parameters(logical_axes, arrays)
    shown = " x ".join(f"{axis} {n}" for axis, n in layout.sizes.items() if n > 1) or "one device"
    table = Table("array", "logical axes", "shape", "parameter", "gradient", "optimizer", title=shown)
    table.add_column("bytes a device", justify="right")
    warnings = []
    names = jax.tree.leaves(logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    trees = (layout.parameters(logical_axes), layout.gradients(logical_axes), layout.optimizer(logical_axes))
    rows = zip(jax.tree_util.tree_leaves_with_path(arrays), names, *map(jax.tree.leaves, trees), strict=True)
    for (path, array), axes, *shardings in rows:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        held = math.prod(shardings[0].shard_shape(array.shape)) * array.dtype.itemsize
        size = " x ".join(map(str, array.shape))
        table.add_row(name, ", ".join(axes), size, *(_spec(s.spec, layout) for s in shardings), f"{held:,}")
        full = math.prod(array.shape) * array.dtype.itemsize
        if layout.mesh.size > 1 and held == full >= WARN_BYTES:
            warnings.append(f"{name} ({full / 2**20:,.0f} MiB) is replicated on each of the {layout.mesh.size} devices")
    table.add_section()
    for name, axes in ACTIVATION_AXES.items():
        table.add_row(name, ", ".join(axes), "", _spec(spec_entries(ACTIVATIONS, axes), layout), "", "", "")
    return table, warnings


def memory_table(parts: dict[str, float]) -> Table:
    """Bytes that a device holds, by part."""
    table = Table("on a device", title="by our own count")
    table.add_column("GiB", justify="right")
    for name, size in parts.items():
        table.add_row(name, f"{size / 2**30:.3f}")
    table.add_section()
    table.add_row("all of these", f"{sum(parts.values()) / 2**30:.3f}")
    return table


def traffic_table(title: str, sent: dict[str, float], counts: dict[str, float] | None = None) -> Table:
    """Bytes that a device sends in a step, by kind of collective."""
    table = Table("collective", title=title)
    if counts:
        table.add_column("count", justify="right")
    table.add_column("GiB sent by a device", justify="right")
    for kind in KINDS:
        table.add_row(kind, *([f"{counts[kind]:,.0f}"] if counts else []), f"{sent[kind] / 2**30:.3f}")
    table.add_section()
    table.add_row("all", *([f"{sum(counts.values()):,.0f}"] if counts else []), f"{sum(sent.values()) / 2**30:.3f}")
    return table


def _spec(entries, layout: Layout) -> str:
    """The mesh axes of each dimension, those of one device left out."""

    def shown(entry) -> str:
        axes = entry if isinstance(entry, tuple) else (entry,)
        return "+".join(axis for axis in axes if axis and layout.sizes[axis] > 1) or "-"

    return ", ".join(map(shown, entries))
