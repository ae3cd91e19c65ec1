"""What an optimizer must be for a run: one that descends, on the run's own clock."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from crescendo.experiments.runtime.errors import UserError
from crescendo.optim.batch_size import BatchSizePolicy
from crescendo.optim.states import find_states, nodes
from crescendo.parallel import Layout

Tree = Any

# Optax's states of schedules, which count the updates.
_COUNTING = (optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState)
_TRIES = 3


def check_optimizer(optimizer: optax.GradientTransformation, parameters: Tree, policy: BatchSizePolicy) -> list[str]:
    """What a person should hear of an optimizer that isn't made of Crescendo's parts.

    Args:
      optimizer: as the run is given it.
      parameters: that it trains, or their shapes.
      policy: of the batch size.

    Raises:
      UserError: an optimizer whose updates point along the gradient, or one whose schedule counts steps under a batch
        size that moves.
    """
    state = jax.eval_shape(optimizer.init, parameters)
    kinds = _kinds(state)
    if any(getattr(node, "takes_learning_rate_factor", False) is True for node in nodes(state)):
        return []
    if climbs(optimizer, parameters):
        raise UserError(
            f"train.optimizer ({kinds}) moves the parameters along the gradient, and the loss would rise: a transform "
            "has no learning rate by itself, so chain it with scale_by_learning_rate"
        )
    counting = [n for n in nodes(state) if isinstance(n, _COUNTING) and getattr(n, "hyperparams_states", True)]
    if not counting:
        return []
    fix = "crescendo.optim.scale_by_learning_rate(schedule), or one of crescendo.optim's optimizers, counts examples"
    if len(policy.sizes) > 1:
        raise UserError(
            f"train.optimizer ({kinds}) has a schedule that counts steps, and the batch size moves from "
            f"{min(policy.sizes)} to {max(policy.sizes)}: {fix}"
        )
    return [
        f"the optimizer's schedule ({type(counting[0]).__name__}) counts steps, of {policy.sizes[0]} examples each "
        f"here, and doesn't know the run's length: {fix}"
    ]


def check_derivatives(opt_state: optax.OptState, layout: Layout) -> None:
    """Refuses an optimizer that estimates the Hessian where the mesh has no second derivatives.

    Args:
      opt_state: its state of any parameters, or the shapes.
      layout: the mesh.

    Raises:
      ValueError: names the axis of the mesh.
    """
    if find_states(opt_state, contrib.HutchinsonState):
        layout.for_second_derivatives()


def climbs(optimizer: optax.GradientTransformation, parameters: Tree) -> bool:
    """Whether a few updates by one gradient point along it; tried on arrays of the parameters' ranks, two numbers wide.

    Raises:
      UserError: an optimizer that can't compute with the values that it was given.

    >>> climbs(optax.scale_by_adam(), {"w": jnp.ones((4, 4))}), climbs(optax.adam(0.1), {"w": jnp.ones((4, 4))})
    (True, False)
    """
    random = np.random.default_rng(0)
    shapes = jax.tree.map(lambda x: tuple(min(2, size) for size in x.shape), parameters)
    draw = functools.partial(
        jax.tree.map,
        lambda shape, x: np.asarray(random.normal(size=shape), x.dtype),
        shapes,
        parameters,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    gradients, weights = draw(), draw()

    @jax.jit
    def along(gradients: Tree, weights: Tree) -> jax.Array:
        update, state, total = optax.with_extra_args_support(optimizer).update, optimizer.init(weights), jnp.zeros(())
        for number in range(_TRIES):
            steps, state = update(gradients, state, weights, examples_seen=number, value=1.0)
            products = jax.tree.map(lambda g, u: jnp.sum((g * u).astype(jnp.float32)), gradients, steps)
            total += sum(jax.tree.leaves(products))
        return total

    try:
        return bool(along(gradients, weights) > 0)
    except (TypeError, OverflowError) as error:
        if "required" not in str(error):  # such as a text where a library's optimizer has a rate
            first = str(error).strip().splitlines()[0]
            raise UserError(f"train.optimizer can't make an update of what it was given: {first}") from None
        return False  # it asks for more than this, which the training step has or names
    except ValueError:
        return False


def _kinds(state: Tree) -> str:
    """The types of an optimizer's states."""
    names = [type(node).__name__ for node in nodes(state) if isinstance(node, tuple) and hasattr(node, "_fields")]
    return ", ".join(dict.fromkeys(names)) or "without a state"
