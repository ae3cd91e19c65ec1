"""What ends a run before its length: a held-out loss, training time, tokens."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from crescendo.experiments.runs.state import Clock
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.base import Task

# Several processes agree on the time once in so many steps, as it costs them a wait for each other.
AGREED_EVERY_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Stops:
    """The stops that a run was given; None: not that one.

    All are functions of what a checkpoint and the records hold, so that a run which was stopped and is asked for again
    says that it is done, and goes on where its stop was moved.

    Args:
      at_loss: the validation loss to reach, at an evaluation.
      after_minutes: of training time: without compilation, evaluation and checkpoints, over all resumes.
      after_tokens: seen.

    """

    at_loss: float | None = None
    after_minutes: float | None = None
    after_tokens: int | None = None

    def notes(self, task: Task, total_examples: int) -> list[str]:
        """What a person should hear of tokens that end the run elsewhere than its schedule.

        Raises:
          UserError: for tokens of a task that counts something else.
        """
        if self.after_tokens is None:
            return []
        if task.unit != "token":
            raise UserError(
                f"train.stop_after_tokens = {self.after_tokens}: this task counts {task.unit}s, which "
                "train.total_examples does too"
            )
        if (whole := total_examples * task.units_per_example) <= self.after_tokens:
            return [f"train.stop_after_tokens = {self.after_tokens:,} lies past the run's {whole:,} tokens"]
        return [
            f"train.stop_after_tokens = {self.after_tokens:,} ends the run before its {whole:,} tokens, and before its "
            f"schedule; for a shorter schedule, train.total_examples = {self.after_tokens // task.units_per_example}"
        ]

    def reason(self, task: Task, clock: Clock, seconds: float, validation: Mapping[str, Any]) -> str | None:
        """Why the run ends here; None where it doesn't.

        Args:
          task: what is trained.
          clock: where the run stands.
          seconds: of training.
          validation: the latest record of one.
        """
        tokens = clock.examples_seen * task.units_per_example
        loss = validation["loss"] if validation.get("examples_seen") == clock.examples_seen else math.inf
        if self.at_loss is not None and loss <= self.at_loss:
            return f"validation loss {loss:.6g} reached train.stop_at_loss = {self.at_loss:g}"
        if self.after_minutes is not None and seconds >= 60 * self.after_minutes:
            return f"{seconds / 60:.4g} minutes of training reached train.stop_after_minutes = {self.after_minutes:g}"
        if self.after_tokens is not None and tokens >= self.after_tokens:
            return f"{tokens:,} tokens reached train.stop_after_tokens = {self.after_tokens:,}"
        return None

    def agreed(self, seconds: float, clock: Clock) -> float:
        """The seconds to judge by: of several processes those of the first, and 0 where they don't ask each other."""
        if self.after_minutes is None or jax.process_count() == 1:
            return seconds
        if clock.steps % AGREED_EVERY_STEPS:
            return 0.0
        with jax.transfer_guard("allow"):
            bits = multihost_utils.broadcast_one_to_all(np.array([seconds]).view(np.uint32))
        return float(np.asarray(bits).view(np.float64)[0])
