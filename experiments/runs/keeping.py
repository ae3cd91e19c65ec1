"""Which checkpoints of a run stay: what orbax calls preservation policies."""

import dataclasses
from collections.abc import Callable, Collection


@dataclasses.dataclass
class FirstOfEach:
    """Keeps the first checkpoint of each interval that `interval_of(examples)` numbers from 1; none of interval 0."""

    interval_of: Callable[[int], int]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """One answer a checkpoint, oldest first."""
        del context
        interval = [self.interval_of(checkpoint.step) for checkpoint in checkpoints]
        return [now > before for before, now in zip([0, *interval], interval, strict=False)]


@dataclasses.dataclass
class Those:
    """Keeps those of the checkpoints that `which(all of them)` names at each save."""

    which: Callable[[list[int]], Collection[int | None]]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """One answer a checkpoint."""
        del context
        every = [checkpoint.step for checkpoint in checkpoints]
        kept = self.which(every)
        return [step in kept for step in every]
