"""What looks at a run now and then and never changes it.

A probe is called with the clock and the state between steps, every so many examples and at the end; what it returns
becomes records of its kind. The state is the loop's own: a probe that keeps arrays must copy them.
A new one is a module here with a function of its name, which configs can then name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from crescendo.experiments.runs.state import Clock, TrainState

Seen = Mapping[str, float] | Sequence[Mapping[str, str]] | None
"""Numbers by name, one record; or several records with texts in them; or nothing to record."""


class Probe(NamedTuple):
    """Something to look at.

    Attributes:
      every_examples: how often.
      call: `(clock, state) -> Seen`.
      kind: of its records.
      prepare: `session -> call`, of a probe that needs the run's task, devices or compiled functions: then there is no
        `call` here.
    """

    every_examples: int
    call: Callable[[Clock, TrainState], Seen] | None
    kind: str = "probe"
    prepare: Callable[[Any], Callable[[Clock, TrainState], Seen]] | None = None
