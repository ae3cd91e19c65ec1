"""When each stage of a pipeline does what: schedules as closed formulas of the tick, the stage and the microbatches.

In a tick a stage runs the forward pass of one microbatch, the backward pass of another, both or none. With p stages,
stage s runs forward microbatch `t - s` and backward `t - b - (p - 1 - s)` at tick t, b being the first tick of a
backward pass. What a stage sends is used in the next tick. Whether all stages are idle is known by the tick alone, so a
program can leave such passes out without a branch that differs from stage to stage; of m microbatches,

.. math::  \\frac{p - 1}{m + p - 1}

of the time of each pass is idle, whatever the schedule: they differ in how many inputs a stage keeps.

Huang et al., 2019, "GPipe", https://arxiv.org/abs/1811.06965; Narayanan et al., 2020, "Memory-Efficient
Pipeline-Parallel DNN Training" (PipeDream-Flush, which is 1F1B), https://arxiv.org/abs/2006.09503; Narayanan et al.,
2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
https://arxiv.org/abs/2104.04473.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

SCHEDULES = ("1f1b", "gpipe")
"""`gpipe` runs all forward passes before any backward pass, `1f1b` a microbatch's backward pass as soon as it can."""


class Work(NamedTuple):
    """What a stage does of a pass in a tick.

    Attributes:
      microbatch: of which.
      due: whether there is any; where there isn't, the number is none of a microbatch.
    """

    microbatch: Any
    due: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A schedule over some stages; its numbers may be arrays, also traced ones.

    Attributes:
      name: one of `SCHEDULES`.
      stages: p.

    >>> schedule = Schedule("1f1b", 2)
    >>> print(schedule.draw(3))
    stage 0  F0   F1   F2B0 B1   B2
    stage 1       F0B0 F1B1 F2B2
    """

    name: str
    stages: int

    def passing(self, microbatches: Any) -> Any:
        """How many ticks a pass takes, from the first stage's first microbatch to the last stage's last one."""
        return microbatches + self.stages - 1

    def first_backward(self, microbatches: Any) -> Any:
        """The first tick of a backward pass."""
        return self.passing(microbatches) if self.name == "gpipe" else self.stages - 1

    def ticks(self, microbatches: Any) -> Any:
        """How many there are."""
        return self.first_backward(microbatches) + self.passing(microbatches)

    def forward(self, tick: Any, stage: Any, microbatches: Any) -> Work:
        """What a stage does of the forward passes."""
        microbatch = tick - stage
        return Work(microbatch, (microbatch >= 0) & (microbatch < microbatches))

    def backward(self, tick: Any, stage: Any, microbatches: Any) -> Work:
        """What a stage does of the backward passes, after its forward pass of the same tick."""
        microbatch = tick - self.first_backward(microbatches) - (self.stages - 1 - stage)
        return Work(microbatch, (microbatch >= 0) & (microbatch < microbatches))

    def kept(self, max_microbatches: int) -> int:
        """How many inputs a stage keeps for its backward passes: so many are never on their way at once."""
        return max_microbatches if self.name == "gpipe" else min(max_microbatches, 2 * self.stages - 1)

    def finished(self, max_microbatches: int) -> int:
        """How many outputs of the last stage wait for the loss."""
        return max_microbatches if self.name == "gpipe" else 1

    def table(self, microbatches: int) -> tuple[np.ndarray, np.ndarray]:
        """The microbatches of the forward and of the backward passes, int `[ticks, stages]` each; -1 is none."""
        ticks, stages = np.arange(self.ticks(microbatches))[:, None], np.arange(self.stages)
        works = (of(ticks, stages, microbatches) for of in (self.forward, self.backward))
        forward, backward = (np.where(work.due, work.microbatch, -1) for work in works)
        return forward, backward

    def draw(self, microbatches: int) -> str:
        """A line a stage, a column a tick: `F2B0` is the forward pass of microbatch 2, then the backward one of 0."""

        def cell(forward: int, backward: int) -> str:
            return (f"F{forward}" if forward >= 0 else "") + (f"B{backward}" if backward >= 0 else "")

        cells = np.vectorize(cell, otypes=[object])(*self.table(microbatches))
        width = max(map(len, cells.flat))
        lines = (" ".join(f"{text:{width}}" for text in column) for column in cells.T)
        return "\n".join(f"stage {stage}  {line}".rstrip() for stage, line in enumerate(lines))

    def idle_share(self, microbatches: int) -> float:
        """The share of a stage's time in which it waits for others, `(p - 1) / (m + p - 1)`.

        >>> Schedule("1f1b", 4).idle_share(9)
        0.25
        """
        return (self.stages - 1) / self.passing(microbatches)
