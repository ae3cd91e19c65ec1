"""Which parameters a rule applies to, and along which axis a parameter stacks its layers.

A transformer that scans over its layers stores them stacked: a norm scale has shape [layers, d] and a matrix
[layers, d_in, d_out]. What a rule says of "a layer" (its rank, its norm) must then be read without that axis.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import numpy as np
import optax

from crescendo.ranges import Leaves

Path = tuple[str, ...]
LayerAxis = Annotated[Callable[[Path], int | None] | int | Any | None, Leaves((int,))]
"""Where layers are stacked: a function of the path, or a pytree prefix of `int | None`; None: `stacked_axis`."""

Mask = Annotated[Callable[[optax.Params], Any] | bool | Any | None, Leaves((bool,))]
"""Which parameters: a function of the parameters, or a pytree prefix of booleans; None: `is_matrix` decides."""

_VECTOR_NAMES = frozenset({"bias", "scale"})


def stacked_axis(path: Path) -> int | None:
    """The default rule: what lies under `blocks` is stacked on axis 0, unless `blocks` is a list of layers.

    >>> stacked_axis(("blocks", "mlp", "kernel")), stacked_axis(("blocks", "3", "kernel")), stacked_axis(("head",))
    (0, None, None)
    """
    stacked = any(name == "blocks" and not below.isdecimal() for name, below in itertools.pairwise(path))
    return 0 if stacked else None


def layer_axes(params: optax.Params, layer_axis: LayerAxis = None) -> list[int | None]:
    """The stacking axis of every leaf, in the order of `jax.tree.leaves(params)`; None where nothing is stacked.

    Args:
      params: any pytree of arrays or of `jax.ShapeDtypeStruct`.
      layer_axis: a function of the path (a tuple of names), a pytree prefix of `int | None`, or None for
        `stacked_axis`.

    Raises:
      ValueError: an axis that its parameter doesn't have.

    >>> import jax.numpy as jnp
    >>> params = {"blocks": {"kernel": jnp.ones((3, 4, 4))}, "head": jnp.ones((4, 8))}
    >>> layer_axes(params), layer_axes(params, {"blocks": 1, "head": None})
    ([0, None], [1, None])
    """
    leaves = leaves_with_paths(params)
    if layer_axis is None or callable(layer_axis):
        rule = layer_axis or stacked_axis
        axes = [rule(path) for path, _ in leaves]
    else:
        spread = jax.tree.map(
            lambda axis, below: [axis] * len(jax.tree.leaves(below)), layer_axis, params, is_leaf=lambda x: x is None
        )
        axes = jax.tree.leaves(spread, is_leaf=lambda x: x is None)
    for (path, leaf), axis in zip(leaves, axes, strict=True):
        if axis is not None and not 0 <= axis < np.ndim(leaf):
            raise ValueError(
                f"layer_axis {axis} of {'/'.join(path)} is not an axis of its shape {np.shape(leaf)}: "
                f"give an axis from 0 to {np.ndim(leaf) - 1}, or None where no layers are stacked"
            )
    return axes


def is_matrix(params: optax.Params, layer_axis: LayerAxis = None) -> Any:
    """True for what has two dimensions or more *per layer* and is neither a bias nor a norm's scale.

    The default of every weight-decay and trust-ratio mask here. A bias or a scale is known by its name (`bias`,
    `scale`, or a module whose name holds `norm`), so one of shape [layers, heads, d_head] is one too.

    >>> import jax.numpy as jnp
    >>> norm, kernel, bias = jnp.ones((3, 4)), jnp.ones((3, 4, 4)), jnp.ones((3, 2, 2))
    >>> is_matrix({"blocks": {"norm": {"scale": norm}, "mlp": {"kernel": kernel, "bias": bias}}})
    {'blocks': {'mlp': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}}
    """
    marks = [
        np.ndim(leaf) - (axis is not None) >= 2 and path[-1] not in _VECTOR_NAMES and not any("norm" in n for n in path)
        for (path, leaf), axis in zip(leaves_with_paths(params), layer_axes(params, layer_axis), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), marks)


def as_mask(mask: Mask, layer_axis: LayerAxis = None, *, name: str = "mask") -> Callable[[optax.Params], Any]:
    """The function from parameters to a tree of booleans that `mask` means, as `optax.masked` takes it.

    Args:
      mask: None for `is_matrix` under `layer_axis`, True for every parameter, a pytree prefix of booleans, or a
        function from parameters to one.
      layer_axis: see `layer_axes`.
      name: how the error calls the mask.

    Raises:
      ValueError: (by the function) a given mask which matches no parameter.

    >>> as_mask({"a": True, "b": False})({"a": [1.0, 2.0], "b": 3.0})
    {'a': [True, True], 'b': False}
    """
    if mask is None:
        return lambda params: is_matrix(params, layer_axis)

    def function(params: optax.Params) -> Any:
        prefix = mask(params) if callable(mask) else mask
        full = jax.tree.map(lambda mark, below: jax.tree.map(lambda _: bool(mark), below), prefix, params)
        marks = jax.tree.leaves(full)
        if marks and not any(marks):
            raise ValueError(
                f"{name} matches none of the {len(marks)} parameters: mark at least one True, "
                f"or pass None for the default (matrices) or True for all"
            )
        return full

    return function


def leaves_with_paths(tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False) -> list[tuple[Path, Any]]:
    """The leaves, each with its path as plain names: the same in nested dicts, dataclasses and an `nnx.State`.

    What only holds an array, in its one field `value`, has no name of its own: variables of `nnx`, boxes of `linen`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> leaves_with_paths(nnx.State({"head": {"bias": nnx.Param(jnp.zeros(()))}}))
    [(('head', 'bias'), Array(0., dtype=float32))]
    """
    return [(path or ("",), leaf) for path, leaf in _leaves_with_paths(tree, is_leaf)]


def _leaves_with_paths(tree: Any, is_leaf: Callable[[Any], bool]) -> Iterator[tuple[Path, Any]]:
    def stops(node: Any) -> bool:
        return is_leaf(node) or _boxed(node) is not None

    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stops):
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        box = None if is_leaf(node) else _boxed(node)
        if box is None:
            yield names, node
        else:
            yield from ((names + below, leaf) for below, leaf in _leaves_with_paths(box[0], is_leaf))


def _boxed(node: Any) -> list[Any] | None:
    """What a node holds in `value`, its one field; None for any other node."""
    children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    keys = [path for path, _ in children]
    return [child for _, child in children] if keys == [(jax.tree_util.GetAttrKey("value"),)] else None
