"""A loss in the parts that stages of a pipeline share: what is before the layers, the layers, what is behind."""

import dataclasses
from collections.abc import Callable
from typing import Any

Tree = Any


def _plain(sums: Any, told: Any) -> Any:
    del told
    return sums


@dataclasses.dataclass(frozen=True)
class Parts:
    """`finish(leave(stream), told)` of `layers(enter)`; called with `(parameters, rows)` it is that of a batch.

    A stage has some layers of `parameters`, and None in place of all that isn't stacked in layers; before and behind
    the layers the stacked ones are None. A stream is `(x, added)`, the residual stream being their sum; a stage hands
    `(sum, None)` on. What its layers say besides it keeps.

    Attributes:
      enter: `(parameters, rows) -> stream`.
      layers: `(parameters, stream, rows, first) -> (stream, told)`, `first` being the number of the first layer among
        those that are stacked; told are float32 sums over the batch, stacked in layers too, or None.
      leave: `(parameters, stream, rows) -> sums`: `(loss_sum, weight, ...)`, or scores.
      finish: `(sums, told) -> sums`, of a microbatch or of all that were added up; the loss is linear in what is told.
    """

    enter: Callable[[Tree, Tree], Any]
    layers: Callable[[Tree, Any, Tree, Any], tuple[Any, Any]]
    leave: Callable[[Tree, Any, Tree], Any]
    finish: Callable[[Any, Any], Any] = _plain

    def __call__(self, parameters: Tree, rows: Tree) -> Any:
        stream, told = self.layers(parameters, self.enter(parameters, rows), rows, 0)
        return self.finish(self.leave(parameters, stream, rows), told)

    def of(self, take: Callable[[Tree], Tree]) -> "Parts":
        """The parts as functions of what `take` makes parameters of."""
        return Parts(
            lambda parameters, rows: self.enter(take(parameters), rows),
            lambda parameters, stream, rows, first: self.layers(take(parameters), stream, rows, first),
            lambda parameters, stream, rows: self.leave(take(parameters), stream, rows),
            self.finish,
        )

    def giving(self, change: Callable[[Any], Any]) -> "Parts":
        """The parts with what `change` makes of the sums."""
        return dataclasses.replace(self, finish=lambda sums, told: change(self.finish(sums, told)))
