"""What a session wraps around a run's optimizer: the noise scale, the batch-size policy, an average, a guard."""

from collections.abc import Sequence
from typing import Any

import optax

from crescendo import optim
from crescendo.optim.batch_size import BatchSizePolicy
from crescendo.optim.groups import ParameterGroup


def wrapped(
    optimizer: optax.GradientTransformation,
    policy: BatchSizePolicy,
    *,
    coupling: str,
    base_batch_size: int | None,
    noise_scale: optax.GradientTransformation | None,
    average_examples: int | None,
    guard: optim.Guard | None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run: from the inside, what each of `Session`'s arguments of these names asks for.

    A guard is outermost, so that a batch which it leaves out leaves all else as it was.
    """
    if noise_scale is not None:
        optimizer = optax.chain(noise_scale, optimizer)
    optimizer = optim.adaptive_batch_size(optimizer, policy, coupling, base_batch_size=base_batch_size)
    if average_examples is not None:
        optimizer = optim.average_weights(optimizer, average_examples)
    return optimizer if guard is None else optim.guarded(optimizer, guard)


def by_groups(
    optimizer: optax.GradientTransformation, groups: Sequence[ParameterGroup], logical_axes: Any
) -> optax.GradientTransformation:
    """The optimizer with the multipliers of the groups that aren't frozen."""
    moved = [group for group in groups if not group.frozen]
    return optim.scale_groups(optimizer, moved, logical_axes) if moved else optimizer
