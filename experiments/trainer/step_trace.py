"""Some steps of a run under JAX's profiler, for XProf, TensorBoard and Perfetto."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from crescendo.experiments.runtime.tracing import traced

BEFORE = 3  # steps that go before, in which much is done for the first time


class StepTrace:
    """Traces some steps, once: a context, around the loop that calls `before_step`.

    Args:
      folder: for the profiler's files.
      steps: how many; None: none.
      say: told where the files are, or why there are none.
    """

    def __init__(self, folder: Path, steps: int | None, say: Callable[[str], None]):
        self._folder, self._steps, self._say = folder, steps, say
        self._begun = 0
        self._tracing: ExitStack | None = None

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *raised: object) -> None:
        """Writes what there is, where the run ended in the middle."""
        self._stop()
        if raised[0] is None and self._steps is not None and self._begun <= BEFORE:
            self._say(f"no profile: it begins after {BEFORE} steps, and there were {self._begun}")

    def before_step(self, finish: Callable[[], object]) -> bool:
        """Starts or stops, or does nothing.

        Args:
          finish: waits until the device is done with all steps before.

        Returns:
          Whether it did something, which takes time of its own.

        Raises:
          UserError: the folder can't be written.
        """
        starts = self._steps is not None and self._begun == BEFORE
        stops = self._steps is not None and self._begun == BEFORE + self._steps
        if starts or stops:
            finish()
        if starts:
            with ExitStack() as tracing:
                tracing.enter_context(traced(self._folder))
                self._tracing = tracing.pop_all()
        elif stops:
            self._stop()
        self._begun += 1
        return starts or stops

    def _stop(self) -> None:
        if self._tracing is None:
            return
        tracing, self._tracing = self._tracing, None
        tracing.close()
        steps = min(self._begun - BEFORE, self._steps or 0)
        self._say(f"profile of {steps} steps: see it with tensorboard --logdir {self._folder}, or xprof")
