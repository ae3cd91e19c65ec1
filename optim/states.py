"""What an optimizer's state holds, however its transforms are wrapped and nested."""

import collections
import itertools
from collections.abc import Collection, Iterator
from typing import Any

import jax
import optax


def nodes(opt_state: optax.OptState) -> Iterator[Any]:
    """Every node of a state's tree, leaves included, each before what it holds.

    >>> import jax.numpy as jnp
    >>> state = optax.masked(optax.sgd(0.1, momentum=0.9), True).init(jnp.ones(2))
    >>> [type(node).__name__ for node in nodes(state)][:3]
    ['MaskedState', 'tuple', 'TraceState']
    """
    yield opt_state
    for child in _children(opt_state):
        yield from nodes(child)


def find_states(opt_state: optax.OptState, *kinds: type) -> list[Any]:
    """The states of the given types in a state's tree, the outermost first.

    >>> import jax.numpy as jnp
    >>> len(find_states(optax.adam(0.1).init(jnp.ones(2)), optax.ScaleByAdamState))
    1
    """
    return [node for node in nodes(opt_state) if isinstance(node, kinds)]


def reported(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The scalars that an optimizer's, a transform's and a policy's states say of themselves, by name, for the log.

    A state that has something to say defines `report(self) -> dict[str, jax.Array]`, of scalars; it is read however
    deep it is nested. What several groups of `optax.partition` report gets the group's label behind its name; where
    states of a chain report one name, the second becomes `NAME_2`, and so on.

    >>> import jax.numpy as jnp
    >>> from crescendo.optim.adamw import adamw
    >>> reported(optax.chain(optax.clip(1.0), adamw(0.5)).init(jnp.ones(2)))
    {'learning_rate': Array(0.5, dtype=float32)}
    """
    report = getattr(opt_state, "report", None)
    parts = [report()] if callable(report) else []
    if isinstance(opt_state, optax.transforms.PartitionState):
        parts += _by_label({str(label): reported(state) for label, state in opt_state.inner_states.items()})
    else:
        parts += [reported(child) for child in _children(opt_state)]
    reports: dict[str, jax.Array] = {}
    for part in parts:
        for name, value in part.items():
            reports[_free_name(name, reports)] = value
    return reports


def _free_name(name: str, taken: Collection[str]) -> str:
    """The name, or the first of `NAME_2`, `NAME_3`, ... that is free."""
    return name if name not in taken else next(f"{name}_{i}" for i in itertools.count(2) if f"{name}_{i}" not in taken)


def _by_label(groups: dict[str, dict[str, jax.Array]]) -> list[dict[str, jax.Array]]:
    """The reports of groups, those that would collide renamed."""
    counts = collections.Counter(name for part in groups.values() for name in part)
    return [
        {name if counts[name] == 1 else f"{name}_{label}": value for name, value in part.items()}
        for label, part in groups.items()
    ]


def _children(node: Any) -> list[Any]:
    """What a node of a tree holds, one level down; nothing for a leaf."""
    return [child for child in jax.tree.leaves(node, is_leaf=lambda x: x is not node) if child is not node]


def spread(prefix: Any, tree: Any) -> Any:
    """A prefix of `tree` as a full tree: every leaf of the prefix at each of the leaves below it.

    >>> spread({"a": 2.0, "b": 3.0}, {"a": [0, 0], "b": 0})
    {'a': [2.0, 2.0], 'b': 3.0}
    """
    return jax.tree.map(lambda value, below: jax.tree.map(lambda _: value, below), prefix, tree)
