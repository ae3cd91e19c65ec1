"""What an optimizer's state holds, however its transforms are wrapped and nested."""

from collections.abc import Iterator
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
    for child in jax.tree.leaves(opt_state, is_leaf=lambda x: x is not opt_state):
        if child is not opt_state:
            yield from nodes(child)


def find_states(opt_state: optax.OptState, *kinds: type) -> list[Any]:
    """The states of the given types in a state's tree, the outermost first.

    >>> import jax.numpy as jnp
    >>> len(find_states(optax.adam(0.1).init(jnp.ones(2)), optax.ScaleByAdamState))
    1
    """
    return [node for node in nodes(opt_state) if isinstance(node, kinds)]
