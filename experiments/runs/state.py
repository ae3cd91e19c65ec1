"""What a run is at one moment."""

import dataclasses
from typing import Any

import jax

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays of a run. With the clock (`Clock`) they are all that a checkpoint holds.

    Attributes:
      parameters: float32 arrays in nested dicts.
      opt_state: the optimizer's, the schedule's and the batch-size policy's state.
      skipped_steps: int32, updates left out: loss, gradient or update were not finite, or the guard said no.
      skipped_in_a_row: int32, how many of them were the latest ones.
    """

    parameters: Tree
    opt_state: Tree
    skipped_steps: Any
    skipped_in_a_row: Any


@dataclasses.dataclass(frozen=True)
class Clock:
    """The host's integers of a run: nothing here waits for the device.

    Attributes:
      examples_seen: global examples drawn so far; the data position and the argument of every schedule.
      steps: optimizer steps so far.
      batch_size: examples in the next batch.
      seconds: training time so far, over all resumes.
    """

    examples_seen: int = 0
    steps: int = 0
    batch_size: int = 0
    seconds: float = 0.0

    def after(self, examples: int) -> "Clock":
        """The clock after a step of so many examples.

        >>> Clock(batch_size=8).after(8)
        Clock(examples_seen=8, steps=1, batch_size=8, seconds=0.0)
        """
        return dataclasses.replace(self, examples_seen=self.examples_seen + examples, steps=self.steps + 1)
