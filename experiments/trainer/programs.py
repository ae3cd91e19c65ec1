"""What a run compiles: each program once, whoever asks first, in whatever thread."""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax

from crescendo import parallel
from crescendo.experiments.runtime.errors import UserError
from crescendo.optim.run_length import LengthError, length_warnings
from crescendo.pallas_kernels import op
from crescendo.pallas_kernels.op import choices, target
from crescendo.parallel.layout import SecondDerivativeError


class CompiledStep(NamedTuple):
    """A run's step, and what was found out by compiling it.

    Attributes:
      plan: how batches are cut.
      total_examples: the length of the run, in whole microbatches.
      program: `(state, batch) -> (state, metrics)`; it gives the state's memory back.
      kernels: the implementations that it takes of each kernel, by the kernel's name.
      notes: what a person should hear of the run's length.
    """

    plan: parallel.BatchPlan
    total_examples: int
    program: jax.stages.Compiled
    kernels: Mapping[str, Sequence[str]]
    notes: Sequence[str]


class Programs:
    """Programs by what they are for.

    >>> programs = Programs()
    >>> programs.get("step", lambda: "compiled"), programs.get("step", lambda: "compiled again")
    ('compiled', 'compiled')
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[Hashable, Future] = {}

    def get(self, key: Hashable, compiled: Callable[[], Any]) -> Any:
        """The program of this key: one that another thread compiles is waited for.

        Where that fails, here it is tried again: the error belongs to whoever asks.

        Args:
          key: what it is for.
          compiled: makes it.
        """
        while True:
            with self._lock:
                made = self._made.get(key)
                if made is None:
                    mine = self._made[key] = Future()
            if made is None:
                try:
                    mine.set_result(compiled())
                except BaseException as error:
                    with self._lock:
                        del self._made[key]
                    mine.set_exception(error)
                    raise
                return mine.result()
            if made.exception() is None:
                return made.result()


def trace_step(jitted: Any, arguments: Sequence[Any], device: Any) -> tuple[Any, dict[str, list[str]], list[str]]:
    """A traced step, the implementations that it takes of each kernel, and what its schedules say of the run's length.

    Args:
      jitted: the step.
      arguments: their shapes.
      device: that it is for, by which kernels choose.

    Raises:
      UserError: a schedule whose parts don't fit the run's length, or an optimizer that asks for what isn't there.
    """
    with target(device), choices() as kernels, length_warnings() as said:
        try:
            traced = jitted.trace(*arguments)
        except (LengthError, SecondDerivativeError, op.SecondDerivativeError) as error:
            raise UserError(str(error)) from None
        except TypeError as error:
            if "required" not in str(error):
                raise
            raise UserError(f"train.optimizer asks for what a training step doesn't give: {error}") from None
    return traced, kernels, said
