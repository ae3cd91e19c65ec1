"""Where a run's seconds go, by the clock on the wall and over all processes that worked on it."""

import contextlib
import time
from collections.abc import Iterator, Sequence

from crescendo.experiments.runs.records import Record


class StartClock:
    """Where the seconds of a start go, part after part, up to the first step.

    Args:
      before: seconds that went by already, since the command was given.
      now: seconds, of a clock that never goes back.

    >>> seconds = iter([0.0, 8.0, 22.25])
    >>> start = StartClock(2.5, now=lambda: next(seconds))
    >>> start.done("data"); start.done("compiling"); print(start)
    24.8 s to the first step: imports and configuration 2.5, data 8.0, compiling 14.2
    """

    def __init__(self, before: float = 0.0, now=time.perf_counter):
        self._now, self._last = now, now()
        self.seconds = {"imports and configuration": before} if before else {}

    def done(self, part: str) -> None:
        """Counts the time since the part before as this one's."""
        last, self._last = self._last, self._now()
        self.seconds[part] = self.seconds.get(part, 0.0) + self._last - last

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s to the first step: {parts}"


class WallClock:
    """Seconds of a run since its data were there, by part; what earlier processes needed is added.

    Args:
      now: seconds, of a clock that never goes back.

    >>> seconds = iter([0.0, 1.0, 3.0, 4.0])
    >>> wall = WallClock(now=lambda: next(seconds))
    >>> with wall.measure("saving"):
    ...     pass
    >>> wall.record(compile_seconds=0.5)
    {'wall_seconds': 4.0, 'compile_seconds': 0.5, 'evaluation_seconds': 0.0, 'saving_seconds': 2.0, 'lost_seconds': 0.0}
    """

    def __init__(self, now=time.perf_counter):
        self._now, self._begin = now, now()
        self._seconds = dict.fromkeys(("wall", "compile", "evaluation", "saving", "lost"), 0.0)

    def go_on(self, records: Sequence[Record], seconds: float) -> None:
        """Adds what the run's processes before this one needed.

        Steps that were recorded and not saved are done again: the time they took is lost.

        Args:
          records: of the run so far, those past its newest checkpoint too.
          seconds: of training, up to that checkpoint.
        """
        before = next((record for record in reversed(records) if record["kind"] == "time"), {})
        trained = max((r.get("seconds") or 0.0 for r in records if r["kind"] == "train"), default=0.0)
        for part in self._seconds:
            self._seconds[part] += before.get(f"{part}_seconds", 0.0)
        self._seconds["wall"] += max(0.0, trained - before.get("seconds", 0.0))
        # Another run's checkpoint, or a run of before this was recorded, brings its training along.
        self._seconds["wall"] = max(self._seconds["wall"], seconds)
        self._seconds["lost"] += max(0.0, trained - seconds)

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Counts the time of a block as "evaluation" or "saving"."""
        begin = self._now()
        yield
        self._seconds[part] += self._now() - begin

    def record(self, compile_seconds: float) -> dict[str, float]:
        """The seconds so far, for the record of kind `time`; those of compilation are this process's."""
        spent = self._seconds | {"wall": self._seconds["wall"] + self._now() - self._begin}
        spent["compile"] += compile_seconds
        return {f"{part}_seconds": value for part, value in spent.items()}
