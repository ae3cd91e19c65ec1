"""Who looks after a run: keeps the checkpoint from before what went wrong, names it, and goes back to it if asked."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from crescendo import optim
from crescendo.experiments.runs.checkpoint import Checkpoints
from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.health import Health
from crescendo.experiments.trainer.recorder import Recorder
from crescendo.experiments.trainer.session import Session


@dataclasses.dataclass
class Watch:
    """Follows a run's health (`health.Health`) and acts by it.

    Attributes:
      health: by the records so far.
      session: what trains.
      checkpoints: of the run; from here on those that must stay by its health do.
      recorder: writes its records.
      save: saves a state at a clock.
    """

    health: Health
    session: Session
    checkpoints: Checkpoints
    recorder: Recorder
    save: Callable[[Clock, TrainState], None]

    def __post_init__(self) -> None:
        self.checkpoints.keep = lambda saved: self.health.keep(saved, self.checkpoints.keep_last)

    @property
    def patience(self) -> float:
        """After so many steps in a row that changed nothing the run goes back."""
        guard = self.session.guard
        return guard.patience if guard is not None and guard.max_rollbacks else float("inf")

    def step(self, clock: Clock, examples: int, values: dict) -> None:
        """Takes a finished step: warns where something begins to go wrong.

        Args:
          clock: after the step.
          examples: in its batch.
          values: what it returned.
        """
        if wrong := self.health.step(clock.examples_seen, examples, values):
            up_to = f"{self.health.good_up_to:,} examples"
            self.recorder.warning(clock, f"{wrong}; the newest checkpoint up to {up_to} is from before, and is kept")

    @property
    def way_back(self) -> str:
        """The checkpoint from before what went wrong, in words."""
        run, at = self.checkpoints.folder.parent, self.health.good(self.checkpoints.saved())
        if at is None:
            return "there is no checkpoint from before"
        return f"the checkpoint from before is kept (train.start_from = '{run}@{at}' in another folder)"

    def go_back(self, clock: Clock, state: TrainState) -> tuple[TrainState, Clock] | None:
        """To the parameters and the optimizer of a checkpoint from before the latest episode; the clock goes on.

        The first time in an episode to the newest of them, then to the one before, and so on; past one that is damaged,
        which is said. It is saved at once, so that a run which is killed and goes on does the same.

        Args:
          clock: where the run stands; all records up to there are written.
          state: at the clock; its memory is given up.

        Returns:
          The state and the clock to go on from; None where no checkpoint is from before.

        Raises:
          UserError: the run has gone back too often, or all of them are damaged.
        """
        guard = self.session.guard
        assert guard is not None
        self.checkpoints.wait()
        # Those that a run has which is stopped nowhere, so that it goes back to the same.
        saved = self.checkpoints.saved()
        before = [at for at in self.health.due_before if at in saved]
        if not before:
            return None
        if self.health.rollbacks >= guard.max_rollbacks:
            raise UserError(
                f"the guard has gone back {self.health.rollbacks} times (max_rollbacks) and still finds outliers at "
                f"{clock.examples_seen} examples; {self.way_back}: lower the learning rate, look for bad rows in the "
                "data, or raise the guard's threshold"
            )
        skipped = state.skipped_steps
        for array in jax.tree.leaves((state.parameters, state.opt_state)):
            array.delete()
        back = self.checkpoints.restore(
            self.session.abstract_state,
            lambda line: self.recorder.warning(clock, line),
            before[min(self.health.rollbacks, len(before) - 1) :],
        )
        assert back is not None  # there is one at least
        restored, at = back[0], back[1].examples_seen
        state = dataclasses.replace(restored, skipped_steps=skipped, skipped_in_a_row=jnp.zeros_like(skipped))
        size = self.session.fitting(int(jax.device_get(optim.current_batch_size(state.opt_state))))
        self.health.rollbacks += 1
        self.recorder.rollback(
            clock,
            at,
            f"{guard.patience} steps in a row were skipped: parameters and optimizer are those of {at:,} examples "
            f"again, and the steps over examples {at:,} to {clock.examples_seen - 1:,} are without effect",
        )
        if size != clock.batch_size:
            self.recorder.batch_size(clock, clock.batch_size, size, "went back to a checkpoint")
        clock = dataclasses.replace(clock, batch_size=size)
        self.save(clock, state)
        return state, clock


def check_patience(guard: optim.Guard | None, max_bad_steps: int) -> None:
    """That a guard goes back before a run gives up, a step late as the metrics are read.

    Raises:
      UserError: it wouldn't.
    """
    if guard is not None and guard.max_rollbacks and guard.patience + 1 >= max_bad_steps:
        raise UserError(
            f"train.guard goes back after {guard.patience} steps in a row that changed nothing (patience), and "
            f"train.max_bad_steps = {max_bad_steps} ends the run by then: raise that to {guard.patience + 2}"
        )
