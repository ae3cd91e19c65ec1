"""Loads of experts, as evaluations record them: a number for each expert of each layer that has experts."""

import re
from collections.abc import Mapping

import numpy as np

_NAME = re.compile(r"expert_load_(\d+)_(\d+)")


def is_load(name: str) -> bool:
    """Whether a mean of an evaluation is the load of one expert."""
    return _NAME.fullmatch(name) is not None


def loads(means: Mapping[str, float]) -> np.ndarray | None:
    """The share of a layer's choices that fall on each expert, times the experts: `[layers, experts]`, 1 where even.

    Args:
      means: of one evaluation and one held-out set.

    Returns:
      None where there are no experts, or not all that their names say.

    >>> print(loads({"loss": 2.0, "expert_load_0_0": 0.25, "expert_load_0_1": 0.75}))
    [[0.5 1.5]]
    """
    places = {(int(m[1]), int(m[2])): value for name, value in means.items() if (m := _NAME.fullmatch(name))}
    if not places:
        return None
    layers, experts = (1 + max(place[i] for place in places) for i in (0, 1))
    if len(places) < layers * experts:
        return None
    return experts * np.array([[places[i, j] for j in range(experts)] for i in range(layers)])


def with_extremes(means: Mapping[str, float]) -> dict[str, float]:
    """The means with the least and the largest load in place of all.

    >>> with_extremes({"loss": 2.0, "expert_load_0_0": 0.25, "expert_load_0_1": 0.75})
    {'loss': 2.0, 'least_load': 0.5, 'largest_load': 1.5}
    """
    rest = {name: value for name, value in means.items() if not is_load(name)}
    found = loads(means)
    return rest if found is None else rest | {"least_load": float(found.min()), "largest_load": float(found.max())}
