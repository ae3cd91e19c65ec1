"""The training loop.

Step n is dispatched before the metrics of step n - 1 are read, and the batch-size decision lags by one step by
definition (`batch_sizes`), so the device never idles for the host.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.batch_sizes import DecidedBatchSizes
from crescendo.experiments.trainer.feed import Feed
from crescendo.experiments.trainer.recorder import Recorder
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.step_trace import StepTrace
from crescendo.experiments.trainer.watching import Watch


class Event(NamedTuple):
    """Something that happens between steps.

    Attributes:
      call: `(clock, state)`; all records up to the clock are written before it.
      every_examples: at the first step that reaches each multiple, and at the end; None: not so.
      at_examples: also at the first step that reaches each of these.
    """

    call: Callable[[Clock, TrainState], None]
    every_examples: int | None = None
    at_examples: Sequence[int] = ()

    def due(self, start: int, end: int, last: int) -> bool:
        """Whether it happens after the step from `start` to `end` of a run that ends at `last`."""
        if self.every_examples is not None and (
            end == last or end // self.every_examples > start // self.every_examples
        ):
            return True
        return any(start < at <= end for at in self.at_examples)


def run(
    session: Session,
    state: TrainState,
    clock: Clock,
    *,
    end: int,
    recorder: Recorder,
    feed: Feed | None = None,
    batch_sizes: DecidedBatchSizes | None = None,
    events: Sequence[Event] = (),
    stop: Callable[[Clock], object] = lambda clock: None,
    max_bad_steps: int = 10,
    watch: Watch | None = None,
    trace: StepTrace | None = None,
) -> tuple[TrainState, Clock]:
    """Trains from the clock to `end` examples, or until asked to stop.

    Args:
      session: the compiled step and the rows.
      state: at the clock; its memory is given to the step.
      clock: where the run stands; a batch size that is another plan's gives way to one that the session serves.
      end: where it ends, whole microbatches from there (`Session.end_from`).
      recorder: reads the metrics of finished steps.
      feed: gives the batches; None: the session's.
      batch_sizes: which batch comes next; None: what the policy in the state decides.
      events: what happens between steps, in this order.
      stop: asked before every step.
      max_bad_steps: give up after so many steps in a row that changed nothing.
      watch: looks at every step, and goes back where the run's guard asks for it; None: nobody.
      trace: asked before every step, as `stop`; None: no step is traced.

    Returns:
      The state and the clock at the end.

    Raises:
      UserError: too many bad steps in a row.
    """
    batch_sizes = DecidedBatchSizes.of(session, state) if batch_sizes is None else batch_sizes
    clock = dataclasses.replace(clock, batch_size=session.fitting(clock.batch_size))
    feed, plan = session.feed() if feed is None else feed, session.plan
    pending: tuple[Clock, int, int, dict] | None = None
    skipped_in_a_row = 0

    def drain() -> None:
        """Reads the metrics of the step before."""
        nonlocal pending, skipped_in_a_row
        if pending is None:
            return
        (at, examples, *_), values, pending = pending, recorder.step(*pending), None
        batch_sizes.read(values)
        if watch is not None:
            watch.step(at, examples, values)
        skipped_in_a_row = values["skipped_in_a_row"]
        if skipped_in_a_row >= max_bad_steps:
            way_back = "what was saved before is good" if watch is None else watch.way_back
            raise UserError(
                f"no finite loss, gradient and update in {max_bad_steps} steps in a row (train.max_bad_steps): stopped "
                f"at {at.examples_seen} examples; {way_back}: lower the learning rate and begin another run, or look "
                "for bad rows in the data"
            )

    recorder.restart_timer()
    with jax.transfer_guard("disallow"):
        while clock.examples_seen < end and not stop(clock):
            if trace is not None and trace.before_step(drain):
                recorder.restart_timer()
            start = clock.examples_seen
            examples = min(clock.batch_size, end - start)
            state, metrics = session.step(state, feed.read(start, examples))
            clock = clock.after(examples)
            drain()
            pending = (clock, examples, plan.microbatches(examples), metrics)
            if watch is not None and skipped_in_a_row >= watch.patience:
                drain()
                with jax.transfer_guard("allow"):
                    back = watch.go_back(clock, state) if skipped_in_a_row >= watch.patience else None
                if back is not None:
                    (state, clock), skipped_in_a_row = back, 0
                    batch_sizes.decided = clock.batch_size
                recorder.restart_timer()
            if batch_sizes.decided != clock.batch_size:
                recorder.batch_size(clock, clock.batch_size, batch_sizes.decided, session.policy.reason)
                clock = dataclasses.replace(clock, batch_size=batch_sizes.decided)
            for event in events:
                if event.due(start, clock.examples_seen, end):
                    drain()
                    with jax.transfer_guard("allow"):
                        event.call(clock, state)
                    recorder.restart_timer()
        drain()
    return state, clock
