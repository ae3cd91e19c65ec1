"""What looks at a run now and then and never changes it.

A probe is called with the clock and the state between steps, every so many examples and at the end; the numbers that it
returns become a record of kind `probe`. The state is the loop's own: a probe that keeps arrays must copy them.
A new one is a module here with a function of its name, which configs can then name.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from crescendo.experiments.runs.state import Clock, TrainState


class Probe(NamedTuple):
    """Something to look at.

    Attributes:
      every_examples: how often.
      call: `(clock, state) -> numbers by name`; None or an empty mapping: nothing to record.
    """

    every_examples: int
    call: Callable[[Clock, TrainState], Mapping[str, float] | None]
