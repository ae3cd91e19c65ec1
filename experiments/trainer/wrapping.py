"""What a session wraps around a run's optimizer: the noise scale, the batch-size policy, an average, a guard."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import optax

from crescendo import optim
from crescendo.optim.batch_size import BatchSizePolicy, Coupling
from crescendo.optim.groups import ParameterGroup


def wrapped(
    optimizer: optax.GradientTransformation,
    policy: BatchSizePolicy,
    *,
    coupling: Coupling,
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


class Wraps(NamedTuple):
    """Which of the wraps that not every run has lie around an optimizer, the outermost first."""

    guarded: bool
    averaged: bool
    noisy: bool

    def part(self, path: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """What an array of a `TrainState` belongs to, and the rest of its names.

        >>> Wraps(True, False, True).part(("opt_state", "inner_state", "inner_state", "1", "mu", "head"))
        ('optimizer', ('mu', 'head'))
        >>> Wraps(False, False, False).part(("opt_state", "batch_size"))
        ('batch_size', ('batch_size',))
        """
        if path[:1] != ("opt_state",):
            return "state", path
        rest = path[1:]
        for around, part in ((self.guarded, "guard"), (self.averaged, "average"), (True, "policy")):
            if not around:
                continue
            if rest[:1] != ("inner_state",):
                return ("batch_size" if part == "policy" and rest == ("batch_size",) else part), rest
            rest = rest[1:]
        if self.noisy:
            return ("noise" if rest[:1] == ("0",) else "optimizer"), rest[1:]
        return "optimizer", rest
