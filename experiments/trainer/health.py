"""Whether a run is well: what its records say of skipped steps and jumps, and which checkpoints lie before them.

All of it is a function of the training records up to now, whose floats read back as they were written: a run that goes
on replays its records and decides the same, and every process of a run sees the same numbers. It costs a few operations
a step on the host, one step late as the records themselves.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from crescendo.experiments.runs.records import Record

LEVEL_STEPS = 64
"""The time constant of a level, in steps; after so many steps in line an episode is over."""
FIRST_STEPS = 16
"""A level is known from so many steps in line on; before, only what lies far above it is a jump."""
MOST_DUE = 64
"""So many of the newest checkpoints are known by when they were due."""
JUMP_RATIO, FAR_RATIO = 3.0, 30.0
JUMP_DEVIATIONS = 8.0


@dataclasses.dataclass
class Level:
    """The running mean of what is in line, and that of its absolute deviation.

    >>> level = Level()
    >>> for _ in range(FIRST_STEPS):
    ...     level.add(2.0)
    >>> level.jumped(5.0), level.jumped(7.0)
    (False, True)
    """

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """One more value; the first ones weigh alike."""
        self.count += 1
        share = 1 / min(self.count, LEVEL_STEPS)
        self.deviation += share * (abs(value - self.mean) * (self.count > 1) - self.deviation)
        self.mean += share * (value - self.mean)

    def jumped(self, value: float) -> bool:
        """Whether a value is above `JUMP_RATIO` times the mean (`FAR_RATIO`: early) and `JUMP_DEVIATIONS` above it."""
        ratio = JUMP_RATIO if self.count >= FIRST_STEPS else FAR_RATIO
        above = value - self.mean
        return self.count > 1 and above > (ratio - 1) * abs(self.mean) and above > JUMP_DEVIATIONS * self.deviation


@dataclasses.dataclass
class Health:
    """Follows a run's steps. A step is out of line

    - where it was skipped: a loss, gradient or update that isn't finite, or by the run's guard;
    - where its loss, or the norm of its update, has jumped (`Level.jumped`) over that of the steps in line.

    The first such step begins an episode, and 64 steps in line end it. Updates alone that stay larger for as long, with
    the loss in line, are a new level. The newest checkpoint from before an episode is kept until the next one begins;
    and where the smoothed loss hasn't come back by then, until it has.

    Attributes:
      due: whether a checkpoint is saved after the step from one clock to another, whoever stops the run or goes on.
      ill: whether an episode goes on.
      began_at: checkpoints up to here, in examples, are from before the latest episode; None: there was none.
      good_up_to: likewise of the latest one that began while the run was as good as ever.
      rollbacks: how often the run went back in this episode.
      due_before: the checkpoints that were due before it, in examples, the newest first.
      loss: of the steps in line.
      update_norm: likewise.
    """

    due: Callable[[int, int], bool] = dataclasses.field(default=lambda start, end: True, compare=False, repr=False)
    ill: bool = False
    began_at: int | None = None
    good_up_to: int | None = None
    rollbacks: int = 0
    due_before: list[int] = dataclasses.field(default_factory=list)
    loss: Level = dataclasses.field(default_factory=Level)
    update_norm: Level = dataclasses.field(default_factory=Level)
    _due: collections.deque[int] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=MOST_DUE))
    _good_loss: float = math.inf
    _in_line: int = 0
    _larger: int = 0
    _skipped: int = 0
    _told: bool = False

    @classmethod
    def of(
        cls, records: Iterable[Record], examples_seen: int, due: Callable[[int, int], bool] = lambda start, end: True
    ) -> "Health":
        """That of a run which goes on from a clock, by its records up to there."""
        health = cls(due)
        for record in records:
            if record["examples_seen"] > examples_seen:
                continue
            if record["kind"] == "train":
                health.step(record["examples_seen"], record["batch_size"], record)
            elif record["kind"] == "rollback":
                health.rollbacks += 1
        return health

    def step(self, seen: int, examples: int, values: Mapping[str, Any]) -> str | None:
        """Takes a finished step; says in words what is wrong, once in an episode, where that isn't the update alone.

        Args:
          seen: the clock after it, in examples.
          examples: in its batch.
          values: its record, or what it returned: `loss`, `update_norm`, `skipped_steps` and, of the latter,
            `skipped_in_a_row`.
        """
        loss, update_norm = _number(values.get("loss")), _number(values.get("update_norm"))
        skipped_steps = self._skipped if values.get("skipped_steps") is None else values["skipped_steps"]
        # A live step says it itself: the records of those before it may be lost.
        skipped = values.get("skipped_in_a_row", skipped_steps - self._skipped) > 0
        self._skipped = skipped_steps
        jumped, larger = self.loss.jumped(loss), self.update_norm.jumped(update_norm)
        self._larger = self._larger + 1 if larger and not (skipped or jumped) else 0
        if self._larger >= LEVEL_STEPS:
            larger, self.update_norm = False, Level()
        if not (skipped or jumped or larger):
            self._add(loss, update_norm)
            if not self.ill and self.due(seen - examples, seen):
                self._due.append(seen)
            return None
        self._in_line = 0
        if not self.ill:
            # The parameters that gave a loss may be bad already; those that a large update is added to are not.
            self._begin(seen - examples - (jumped and not skipped))
        if self._told or not (skipped or jumped):
            return None
        self._told = True
        return "a step was skipped" if skipped else f"the loss has jumped from {self.loss.mean:.4g} to {loss:.4g}"

    def _add(self, loss: float, update_norm: float) -> None:
        """A step in line."""
        self._in_line += 1
        for level, value in ((self.loss, loss), (self.update_norm, update_norm)):
            if math.isfinite(value):
                level.add(value)
        if self.ill and self._in_line >= LEVEL_STEPS:
            self.ill, self.rollbacks = False, 0
        if not self.ill and self.loss.mean <= self._good_loss:
            self._good_loss = math.inf

    def _begin(self, began_at: int) -> None:
        self.ill, self.began_at, self._told = True, began_at, False
        self.due_before = sorted((at for at in self._due if at <= began_at), reverse=True)
        if not self.is_worse:
            self.good_up_to = began_at
            known = self.loss.count >= FIRST_STEPS
            self._good_loss = self.loss.mean + self.loss.deviation if known else math.inf

    @property
    def is_worse(self) -> bool:
        """Whether the smoothed loss of the steps in line has not come back to what it was before an episode."""
        return math.isfinite(self._good_loss)

    def good(self, saved: Sequence[int]) -> int | None:
        """The newest checkpoint from when the run was as good as ever; None where there is none, or no episode was."""
        return _newest(saved, self.good_up_to)

    def keep(self, saved: Sequence[int], most: int) -> set[int]:
        """The checkpoints that must not go.

        Args:
          saved: all of them, in examples.
          most: how many of those that were due while the run was well, and before an episode that goes on.
        """
        due = self.due_before if self.ill else list(self._due)[::-1]
        there = [at for at in due if at in saved][:most]
        return {*there, *filter(None, [self.good(saved), _newest(saved, self.began_at)])}


def _newest(saved: Sequence[int], up_to: int | None) -> int | None:
    return None if up_to is None else max((at for at in saved if at <= up_to), default=None)


def _number(value: Any) -> float:
    """What a record has as null, or as no number, isn't finite, or wasn't measured."""
    return value if isinstance(value, int | float) else math.nan
