"""The norm of every parameter along a run."""

import jax
import jax.numpy as jnp

from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.trainer.probes import Probe
from crescendo.ranges import Count


@checked
def parameter_norms(every_examples: Count) -> Probe:
    """The l2 norm of every parameter, all its layers together, by path: `norm/blocks/mlp/up/kernel`.

    Args:
      every_examples: how often, at least 1.

    Raises:
      UserError: an interval below 1.

    >>> probe = parameter_norms(64)
    >>> print(probe.call(Clock(), TrainState({"head": jnp.array([3.0, 4.0])}, (), 0, 0)))
    {'norm/head': 5.0}
    """

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
