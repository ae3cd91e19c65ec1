"""Some steps of a run under JAX's profiler, for XProf, TensorBoard and Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from crescendo.experiments.runtime.files import file_access

BEFORE = 3  # steps that go before, in which much is done for the first time


class StepTrace:
    """Traces some steps, once: a context, around the loop that calls `before_step`.

    Args:
      folder: for the profiler's files.
      steps: how many; None: none.
      say: told where the files are.
    """

    def __init__(self, folder: Path, steps: int | None, say: Callable[[str], None]):
        self._folder, self._steps, self._say = folder, steps, say
        self._begun = 0
        self._tracing = False

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *raised: object) -> None:
        """Writes what there is, where the run ended in the middle."""
        self._stop()

    def before_step(self, state: Any) -> None:
        """Starts or stops, once the device is done with all steps before.

        Args:
          state: after them.

        Raises:
          UserError: the folder can't be written.
        """
        if self._steps is None:
            return
        if self._begun == BEFORE:
            jax.block_until_ready(state)
            with file_access("write", self._folder):
                jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif self._begun == BEFORE + self._steps:
            jax.block_until_ready(state)
            self._stop()
        self._begun += 1

    def _stop(self) -> None:
        if not self._tracing:
            return
        self._tracing = False
        with file_access("write", self._folder):
            jax.profiler.stop_trace()
        steps = min(self._begun - BEFORE, self._steps or 0)
        self._say(f"profile of {steps} steps in {self._folder}: see it with tensorboard --logdir or xprof")
