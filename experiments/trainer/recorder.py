"""From the arrays that a step returns to the records that observers see."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import jax

from crescendo.experiments.runs.records import Record
from crescendo.experiments.runs.state import Clock
from crescendo.experiments.trainer.wall_clock import WallClock

# The metrics of a step that every training record has; norms are of the mean gradient, before clipping, and of the
# update. What else the step returns (a task's extra sums, what transforms and policies report) stands behind them, null
# where not finite.
REPORTED = ("loss", "learning_rate", "gradient_norm", "gradient_l1_norm", "update_norm", "skipped_steps")
# What steers the loop and is no column.
INTERNAL = ("next_batch_size", "skipped_in_a_row")
# A call can last as long as its step, or not wait at all, so that about an evaluation the time between two readings is
# that of no step or of two: the throughput is a mean over as many steps as these.
THROUGHPUT_STEPS = 16


@dataclasses.dataclass
class Recorder:
    """Reads the metrics of finished steps and keeps the training time.

    Attributes:
      observe: who sees the records.
      unit: what is counted beside examples, such as "token".
      units_per_example: how many an example has.
      flops_per_example: of the model.
      peak_flops_per_second: of all devices together, or None.
      wall: all of the run's time, by part.
      columns: what there is to say of the examples of a batch, by the clock at its end and its size.
      seconds: training time so far, without compilation, evaluation and checkpoints.
    """

    observe: Callable[[Record], None]
    unit: str
    units_per_example: int
    flops_per_example: float
    peak_flops_per_second: float | None
    wall: WallClock
    columns: Callable[[int, int], Mapping[str, float]] = lambda examples_seen, batch_size: {}
    seconds: float = 0.0
    _mark: float = dataclasses.field(default_factory=time.perf_counter)
    _recent: collections.deque[tuple[int, float]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=THROUGHPUT_STEPS)
    )

    def restart_timer(self) -> None:
        """Leaves the time since the last record out of the training time."""
        self._mark = time.perf_counter()

    def step(self, clock: Clock, examples: int, microbatches: int, metrics: dict) -> dict:
        """Waits for a step's metrics, reports them, and returns them as Python numbers.

        Args:
          clock: after the step.
          examples: in its batch.
          microbatches: in its batch.
          metrics: the scalars that the step returned.
        """
        values = {name: x.item() for name, x in jax.device_get(metrics).items()}
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        self.seconds += elapsed
        self._recent.append((examples, elapsed))
        examples_per_second = sum(n for n, _ in self._recent) / sum(seconds for _, seconds in self._recent)
        peak = self.peak_flops_per_second
        further = {name: _finite(x) for name, x in values.items() if name not in (*REPORTED, *INTERNAL)}
        self.observe(
            {
                "kind": "train",
                **self._place(clock),
                **{name: values.get(name) for name in REPORTED},
                **further,
                **self.columns(clock.examples_seen, examples),
                "batch_size": examples,
                "microbatches": microbatches,
                "seconds": self.seconds,
                f"{self.unit}s_per_second": examples_per_second * self.units_per_example,
                "mfu": examples_per_second * self.flops_per_example / peak if peak else None,
            }
        )
        if values["skipped_in_a_row"]:
            first, last = clock.examples_seen - examples, clock.examples_seen - 1
            message = f"{_why_skipped(values)}: step {clock.steps} was skipped, examples {first:,} to {last:,}"
            self.warning(clock, message, first_example=first, last_example=last)
        return values

    def warning(self, clock: Clock, message: str, **further: int) -> None:
        """Reports what a person should look at."""
        self.observe({"kind": "warning", **self._place(clock), **further, "message": message})

    def rollback(self, clock: Clock, checkpoint: int, message: str) -> None:
        """Reports that parameters and optimizer are those of a checkpoint again, and the clock goes on."""
        first, last = checkpoint, clock.examples_seen - 1
        place = self._place(clock) | {"to": checkpoint, "first_example": first, "last_example": last}
        self.observe({"kind": "rollback", **place, "message": message})

    def validation(self, clock: Clock, means: dict[str, float]) -> dict:
        """Reports the means on held-out rows; returns the record."""
        record = {"kind": "validation", **self._place(clock), **means, "seconds": self.seconds}
        self.observe(record)
        return record

    def time(self, clock: Clock, compile_seconds: float) -> None:
        """Reports where the run's seconds went so far."""
        spent = {"seconds": self.seconds, **self.wall.record(compile_seconds)}
        self.observe({"kind": "time", **self._place(clock), **spent})

    def probe(self, clock: Clock, seen: Mapping[str, float | str], kind: str = "probe") -> None:
        """Reports what a probe saw."""
        self.observe({"kind": kind, **self._place(clock), **seen})

    def batch_size(self, clock: Clock, before: int, after: int, reason: str) -> None:
        """Reports a change of the batch size, from the next batch on."""
        self.observe({"kind": "batch_size", **self._place(clock), "from": before, "to": after, "reason": reason})

    def settings(self, clock: Clock, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        """Reports what is set otherwise from here on, by name."""
        for name, value in now.items():
            self.observe({"kind": "setting", **self._place(clock), "name": name, "from": before[name], "to": value})

    def _place(self, clock: Clock) -> dict:
        return {
            "step": clock.steps,
            "examples_seen": clock.examples_seen,
            f"{self.unit}s_seen": clock.examples_seen * self.units_per_example,
        }


def _why_skipped(values: Mapping[str, float]) -> str:
    """What was wrong with a step that changed nothing."""
    losses = f"loss {values['loss']}, gradient norm {values['gradient_norm']}"
    if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
        return losses
    if math.isfinite(values["update_norm"]):
        return f"the guard found an outlier, {losses}"
    return "the optimizer's update is not finite"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
