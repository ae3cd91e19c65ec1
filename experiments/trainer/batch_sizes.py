"""Which batch comes next: the size decided by the update of step n is that of step n + 2."""

import dataclasses
from collections.abc import Callable

import jax

from crescendo import optim
from crescendo.experiments.runs.state import TrainState
from crescendo.experiments.trainer.session import Session


@dataclasses.dataclass
class DecidedBatchSizes:
    """The sizes that a policy decides, one step late by definition.

    So the device never idles for the host, and a resumed run decides the same: `Clock.batch_size` is the next batch's,
    and the state holds what its latest update decided.

    Attributes:
      decided: by the latest step whose metrics were read.
      fitting: makes of a size one that the plan serves. What the state holds may be another plan's: before the first
        step, and for as long as steps are skipped, which decide nothing.
    """

    decided: int
    fitting: Callable[[int], int] = lambda size: size

    @classmethod
    def of(cls, session: Session, state: TrainState) -> "DecidedBatchSizes":
        """Before the first step this is the policy's start; after a restart, what the last step decided."""
        decided = int(jax.device_get(optim.current_batch_size(state.opt_state)))
        return cls(session.fitting(decided), session.fitting)

    def read(self, metrics: dict) -> None:
        """Takes the decision out of a finished step's metrics."""
        self.decided = self.fitting(metrics["next_batch_size"])


class FixedBatchSizes(DecidedBatchSizes):
    """The same size whatever the state's own policy decides."""

    def read(self, metrics: dict) -> None:
        """Decides nothing."""
