"""A model as functions of its configuration: fresh parameters, the model that holds some, and their logical axes.

Parameters are nested dicts of arrays. `model` is a class whose objects are made by `model(config, rngs=nnx.Rngs(...))`;
`transformer`, `vit` and `resnet` each have these functions for theirs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from crescendo.models import axes


@functools.cache
def _abstract(model: Callable, config: Any):
    return nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))


def initialize(model: Callable, config: Any, key) -> dict:
    """Fresh float32 parameters; pure, so it can be jitted with output shardings."""
    return nnx.to_pure_dict(nnx.state(model(config, rngs=nnx.Rngs(key))))


def apply(model: Callable, config: Any, parameters: dict) -> Any:
    """The model that holds `parameters`, as `initialize` makes them; what they have None for, it must not use."""
    structure, state = _abstract(model, config)
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(structure, state)


def logical_axes(model: Callable, config: Any, *, stacked: tuple[str, ...] = ()) -> dict:
    """The logical axis names of every parameter, as nested dicts of tuples.

    Args:
      model, config: as above.
      stacked: parts whose parameters have a leading axis `layers`, which their names don't say.
    """
    named = nnx.to_pure_dict(_abstract(model, config)[1], extract_fn=lambda parameter: tuple(parameter.axes))
    for part in stacked:
        named[part] = jax.tree.map(
            lambda names: (axes.LAYERS, *names), named[part], is_leaf=lambda x: isinstance(x, tuple)
        )
    return named
