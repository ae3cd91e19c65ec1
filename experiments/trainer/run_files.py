"""A run as it trains in its folder: evaluated, saved, stopped, ended."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crescendo import optim
from crescendo.experiments.runs.checkpoint import Checkpoints
from crescendo.experiments.runs.records import Record
from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import sync
from crescendo.experiments.runtime.interruption import Interrupted, Interruption
from crescendo.experiments.trainer.health import Health
from crescendo.experiments.trainer.recorder import Recorder
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.stopping import Stops
from crescendo.experiments.trainer.watching import Watch
from crescendo.parallel.hosts import is_leader


@dataclasses.dataclass
class RunFiles:
    """What a run keeps in its folder while it trains.

    Attributes:
      folder: the run's.
      session: what trains.
      checkpoints: in the folder.
      recorder: writes its records.
      evaluate: gives the metrics of a state on held-out rows.
      held: raises where the folder is no longer this process's.
      best_loss: the lowest validation loss so far.
      keep_best: whether the checkpoint of the lowest validation loss is kept.
      validation: the latest validation record.
      saved_at: the clock of the newest checkpoint.
      watch: looks after the run, from `begin` on.
    """

    folder: Path
    session: Session
    checkpoints: Checkpoints
    recorder: Recorder
    evaluate: Callable[[TrainState], dict[str, float]]
    held: Callable[[], None]
    saved_at: int
    keep_best: bool = False
    best_loss: float = float("inf")
    validation: dict = dataclasses.field(default_factory=dict)
    watch: Watch = dataclasses.field(init=False)

    def run(
        self,
        loop_run: Callable,
        state: TrainState,
        clock: Clock,
        *,
        end: int,
        stops: Stops,
        interruption: Interruption,
        write: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        """Trains to the end or a stop, evaluates there, and saves.

        Args:
          loop_run: `loop.run` but for these.
          state: at the clock.
          clock: where the run stands.
          end: of its whole length.
          stops: what ends it before.
          interruption: asks it to stop where it can go on.
          write: called at last with the result, or nothing where the run goes on.

        Returns:
          What `run.json` says of a run that has ended: why, and the length that it has come to.

        Raises:
          Interrupted: asked to stop before it had ended and was evaluated; it has saved.
        """
        task = self.session.task
        ended = stops.reason(task, clock, clock.seconds, self.validation)

        def stop(clock: Clock) -> object:
            nonlocal ended
            ended = stops.reason(task, clock, stops.agreed(self.recorder.seconds, clock), self.validation)
            return interruption.requested or ended

        state, clock = loop_run(state, clock, end=clock.examples_seen if ended else end, stop=stop)
        if clock.examples_seen >= end:
            ended = f"{end:,} examples, its whole length"
        asked = interruption.requested
        if ended and not asked and self.validation.get("examples_seen") != clock.examples_seen:
            self.validate(clock, state)
        self.save(clock, state)
        with self.recorder.wall.measure("saving"):
            self.checkpoints.wait()
        self.tell_time(clock)
        if not ended or self.validation.get("examples_seen") != clock.examples_seen:
            write({})
            raise Interrupted(
                f"{asked}: saved {self.folder} at {clock.examples_seen:,} of {end:,} examples; the same command goes "
                "on from there",
                asked,
            )
        units = clock.examples_seen * task.units_per_example
        of_end = {"ended": ended, "total_examples": clock.examples_seen, f"total_{task.unit}s": units}
        write(of_end)
        return of_end

    def validate(self, clock: Clock, state: TrainState) -> None:
        """Evaluates and records; saves a new best state where that is asked for."""
        with self.recorder.wall.measure("evaluation"):
            means = self.evaluate(state)
        self.validation = self.recorder.validation(clock, means)
        self.tell_time(clock)
        if self.keep_best and self.validation["loss"] < self.best_loss:
            self.best_loss = self.validation["loss"]
            self.checkpoints.best = clock.examples_seen
            self.save(clock, state)

    def begin(
        self,
        clock: Clock,
        validation: dict[str, Any],
        records: Sequence[Record],
        due: Callable[[int, int], bool],
    ) -> None:
        """Records where the seconds went; health and the best so far are those that the records tell.

        Args:
          clock: where the run stands.
          validation: the record of its evaluation there; empty where there was none.
          records: of the run so far.
          due: whether a checkpoint is saved after the step from one clock to another.
        """
        self.validation = validation
        health = Health.of(records, clock.examples_seen, due)
        self.watch = Watch(health, self.session, self.checkpoints, self.recorder, self.save)
        self.tell_time(clock)
        if not self.keep_best:
            return
        there = set(self.checkpoints.saved())
        for record in records:
            if record["kind"] == "validation" and record["examples_seen"] in there and record["loss"] < self.best_loss:
                self.best_loss, self.checkpoints.best = record["loss"], record["examples_seen"]

    def save(self, clock: Clock, state: TrainState) -> None:
        """Saves a checkpoint, unless this state's is saved; the records that it covers are on the disk before.

        Raises:
          UserError: a state that isn't finite, which would never recover; a folder or records that have gone.
        """
        if self.saved_at == clock.examples_seen:
            return
        if not self.session.is_finite(state):
            raise UserError(
                f"parameters or what the optimizer keeps of them are not finite at {clock.examples_seen} examples: not "
                f"saved; those in {self.folder / 'checkpoints'} are finite, and {self.watch.way_back}: lower the "
                "learning rate, or begin another run"
            )
        with self.recorder.wall.measure("saving"):
            self.held()
            if is_leader():
                sync(self.folder / "metrics.jsonl")
            averaged = self.session.averaged(state) if optim.has_evaluation_params(state.opt_state) else None
            self.checkpoints.save(state, dataclasses.replace(clock, seconds=self.recorder.seconds), averaged)
        self.saved_at = clock.examples_seen
        self.tell_time(clock)

    def tell_time(self, clock: Clock) -> None:
        """Records where the seconds went."""
        self.recorder.time(clock, self.session.compile_seconds)
