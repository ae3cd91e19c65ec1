"""From the arrays that a step returns to the records that observers see."""

import collections
import dataclasses
import math
import time

import jax

from crescendo.experiments.metrics import Observer
from crescendo.experiments.state import NOISE_SCALES, TRUST_RATIOS, Clock

# The metrics of a step that become columns of `metrics.jsonl`; norms are of the mean gradient, before clipping.
REPORTED = ("loss", "learning_rate", "gradient_norm", "gradient_l1_norm", "skipped_steps")
# Those that only some runs have, null where nothing is known yet.
OPTIONAL = (*(f"{name}{suffix}" for name in NOISE_SCALES.values() for suffix in ("", "_error")), *TRUST_RATIOS)
# A call can last as long as its step, or not wait at all, so that about an evaluation the time between two readings is
# that of no step or of two: the throughput is a mean over as many steps as these.
THROUGHPUT_STEPS = 16


@dataclasses.dataclass
class Recorder:
    """Reads the metrics of finished steps and keeps the training time.

    Attributes:
      observe: who sees the records.
      sequence_length: tokens in an example.
      flops_per_token: of the model.
      peak_flops_per_second: of all devices together, or None.
      seconds: training time so far, without compilation, evaluation and checkpoints.
      evaluated_at: the clock of the latest validation.
    """

    observe: Observer
    sequence_length: int
    flops_per_token: float
    peak_flops_per_second: float | None
    seconds: float = 0.0
    evaluated_at: int = 0
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
        self._recent.append((examples * self.sequence_length, elapsed))
        tokens_per_second = sum(tokens for tokens, _ in self._recent) / sum(seconds for _, seconds in self._recent)
        peak = self.peak_flops_per_second
        self.observe(
            {
                "kind": "train",
                **self._place(clock),
                **{name: values[name] for name in REPORTED},
                **{name: _finite(values[name]) for name in OPTIONAL if name in values},
                "batch_size": examples,
                "microbatches": microbatches,
                "seconds": self.seconds,
                "tokens_per_second": tokens_per_second,
                "mfu": tokens_per_second * self.flops_per_token / peak if peak else None,
            }
        )
        if values["skipped_in_a_row"]:
            message = f"loss {values['loss']}, gradient norm {values['gradient_norm']}: step {clock.steps} was skipped"
            self.observe({"kind": "warning", **self._place(clock), "message": message})
        return values

    def validation(self, clock: Clock, loss: float) -> dict:
        """Reports the loss on held-out rows; returns the record."""
        record = {"kind": "validation", **self._place(clock), "loss": loss, "seconds": self.seconds}
        self.observe(record)
        self.evaluated_at = clock.examples_seen
        self.restart_timer()
        return record

    def batch_size(self, clock: Clock, before: int, after: int, reason: str) -> None:
        """Reports a change of the batch size, from the next batch on."""
        self.observe({"kind": "batch_size", **self._place(clock), "from": before, "to": after, "reason": reason})

    def _place(self, clock: Clock) -> dict:
        return {
            "step": clock.steps,
            "examples_seen": clock.examples_seen,
            "tokens_seen": clock.examples_seen * self.sequence_length,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
