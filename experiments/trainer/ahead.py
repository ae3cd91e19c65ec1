"""A run's programs, compiled at once, and while its data are prepared.

A program depends on the shape of the data alone, which may be known before: `data.expected()` then stands in for them.
What isn't as was expected is compiled when it is needed, as if nothing had been done ahead.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from crescendo import parallel
from crescendo.experiments.runtime.errors import user_values
from crescendo.experiments.runtime.start import no_collection
from crescendo.experiments.trainer.optimizer_checks import check_derivatives
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.wall_clock import StartClock


def prepared_session(options: Mapping[str, Any], evaluation_examples: int, start: StartClock) -> Session:
    """The session with its data, which are prepared here; meanwhile a thread compiles for what is expected of them.

    Args:
      options: the session's.
      evaluation_examples: as `Session.evaluation` takes it.
      start: counts the seconds that the data take.

    Raises:
      UserError: of the data, or of the session.
    """
    data = options["data"]
    _refuse_second_derivatives(options)
    expected = getattr(data, "expected", lambda: None)()
    if expected is None:
        session = Session(**options)
        start.done("data")
        return session

    def begin() -> Session:
        early = Session(**{**options, "data": expected, "rows": None})
        begin_compiling(early, evaluation_examples)
        return early

    begun = _in_thread(begin)
    fits = expected.fits(data)
    start.done("data")
    session = Session(**options)
    # Where the early one failed this one says why, unless it was for the rows that weren't there.
    if fits and begun.exception() is None:
        session.programs = begun.result().programs
    return session


def _refuse_second_derivatives(options: Mapping[str, Any]) -> None:
    """Before the data are prepared: what a mesh may not have, and an optimizer asks for whatever the data are."""
    if (mesh := options.get("mesh")) is None:
        return
    with contextlib.suppress(ValueError):  # an optimizer of parameters of certain names: the session says it then
        opt_state = jax.eval_shape(options["optimizer"].init, {"w": np.zeros((2, 2), np.float32)})
        with user_values():
            check_derivatives(opt_state, parallel.Layout(mesh, options.get("strategy", "fsdp")))


def _wake(session: Session) -> None:
    """What takes seconds once, and needn't wait for the step: a GPU's first use, the import behind the first batch."""
    jax.device_put(np.zeros(1, np.float32), session.layout.mesh.devices.flat[0]).block_until_ready()
    import grain  # noqa: F401 (takes a second)


def begin_compiling(session: Session, evaluation_examples: int) -> None:
    """Has threads compile all that a run needs before its first step; the session waits for what it needs.

    What goes wrong there goes wrong again where the session asks. Of several processes none has threads: they compile
    in one order.

    Args:
      session: as it was made.
      evaluation_examples: as `Session.evaluation` takes it.
    """
    if jax.process_count() > 1:
        return
    _ = session.abstract_state  # before two threads would make it
    for work in (session.compile_step, lambda: session.compile_others(evaluation_examples), lambda: _wake(session)):
        _in_thread(no_collection()(work))


def _in_thread(work: Callable[[], Any]) -> Future:
    """What a thread makes of `work`; nothing where this thread has settings of JAX that others don't have.

    A `with jax.default_matmul_precision("highest")` around `train`, say, is part of its programs, and known here alone.
    """
    done: Future = Future()
    settings = _settings()

    def run() -> None:
        try:
            if _settings() != settings:
                raise _OtherSettingsError
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="ahead").start()
    return done


class _OtherSettingsError(Exception):
    """A thread would compile something else than who started it."""


def _settings() -> tuple[Any, ...]:
    """What a program depends on beside its arguments, as this thread has it."""
    return dict(jax.config.values), jax.sharding.get_abstract_mesh()
