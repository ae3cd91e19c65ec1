"""The arrays of a state by the names on the way to each, and what is taken of a checkpoint that holds others."""

import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

Names = tuple[str, ...]

_KEY = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")


class Adapting(Protocol):
    """What to take of a checkpoint whose arrays aren't those that are wanted.

    Attributes:
      wanted: dtype and shape of every array of the state, in the order of its leaves.
    """

    wanted: dict[Names, str]

    def carried(self, saved: Mapping[Names, str]) -> dict[Names, Names] | None:
        """Where each wanted array that is taken lies in the checkpoint; None: the checkpoint won't do."""
        ...

    def fresh(self, paths: Collection[Names]) -> dict[Names, jax.Array]:
        """The others, as a run begins with them."""
        ...


def describe_arrays(tree: Any) -> dict[str, str]:
    """Every array of a state by its path, as `float32[3, 128]`: what a checkpoint must match to be restored."""
    return {
        jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def described_array(text: str) -> jax.ShapeDtypeStruct:
    """The array that `describe_arrays` tells of.

    Raises:
      ValueError, TypeError: for another text.

    >>> described_array("float32[3, 128]")
    ShapeDtypeStruct(shape=(3, 128), dtype=float32)
    """
    dtype, _, sizes = text.removesuffix("]").partition("[")
    shape = tuple(int(size) for size in sizes.split(", ") if sizes)
    if any(not 0 <= size < 2**31 for size in shape):
        raise ValueError(f"{text} is no array's")
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def by_path(described: Mapping[str, Any]) -> dict[Names, Any]:
    """What stands under JAX's names of paths, by the names on the way.

    >>> by_path({".opt_state.inner_state[0].mu['head']": "float32[8]"})
    {('opt_state', 'inner_state', '0', 'mu', 'head'): 'float32[8]'}
    """
    return {tuple("".join(key) for key in _KEY.findall(name)): value for name, value in described.items()}


def leaves_by_path(tree: Any) -> dict[Names, Any]:
    """The leaves of a tree by the names on the way, in order.

    >>> leaves_by_path({"a": [1, 2], "b": 3})
    {('a', '0'): 1, ('a', '1'): 2, ('b',): 3}
    """
    return by_path({jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)})
