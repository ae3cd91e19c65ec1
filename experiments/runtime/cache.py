"""Where prepared data and compiled programs are kept between runs."""

import functools
import os
from pathlib import Path

import jax


def folder() -> Path:
    """`$XDG_CACHE_HOME/crescendo`, or `~/.cache/crescendo`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crescendo"


class CompilationCounter:
    """Counts the programs compiled, or read from the cache, since it was made.

    >>> counter = CompilationCounter()
    >>> _ = jax.jit(lambda x: x + 1)(1.0)
    >>> counter.count >= 1
    True
    """

    _total = 0

    def __init__(self) -> None:
        _count_compilations()
        self._start = CompilationCounter._total

    @property
    def count(self) -> int:
        """How many so far."""
        return CompilationCounter._total - self._start


@functools.cache
def _count_compilations() -> None:
    def listener(event: str, duration_secs: float, **_) -> None:
        del duration_secs
        CompilationCounter._total += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listener)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the second start of a run compiles nothing; JAX's own settings win."""
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder() / "xla"))
