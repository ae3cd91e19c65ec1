"""What looks at a run now and then and never changes it.

A probe is called with the clock and the state between steps, every so many examples and at the end; the numbers that it
returns become a record of kind `probe`. The state is the loop's own: a probe that keeps arrays must copy them.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crescendo.experiments.runs.state import Clock, TrainState


class Probe(NamedTuple):
    """Something to look at.

    Attributes:
      every_examples: how often.
      call: `(clock, state) -> numbers by name`; None or an empty mapping: nothing to record.
    """

    every_examples: int
    call: Callable[[Clock, TrainState], Mapping[str, float] | None]


def parameter_norms(every_examples: int) -> Probe:
    """The l2 norm of every parameter, all its layers together, by path: `norm/blocks/mlp/up/kernel`.

    Args:
      every_examples: how often, at least 1.

    Raises:
      ValueError: an interval below 1.

    >>> probe = parameter_norms(64)
    >>> print(probe.call(Clock(), TrainState({"head": jnp.array([3.0, 4.0])}, (), 0, 0)))
    {'norm/head': 5.0}
    """
    if every_examples < 1:
        raise ValueError(f"parameter_norms.every_examples = {every_examples} must be at least 1")

    @jax.jit
    def norms(parameters):
        named = jax.tree_util.tree_leaves_with_path(parameters)
        return {
            f"norm/{jax.tree_util.keystr(path, simple=True, separator='/')}": jnp.sqrt(jnp.sum(jnp.square(x)))
            for path, x in named
        }

    def call(clock: Clock, state: TrainState) -> dict[str, float]:
        del clock
        return {name: float(x) for name, x in jax.device_get(norms(state.parameters)).items()}

    return Probe(every_examples, call)


PROBES: dict[str, Callable[..., Probe]] = {f.__name__: f for f in (parameter_norms,)}
"""Those that configs can name."""
