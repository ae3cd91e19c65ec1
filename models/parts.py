"""A loss in the three parts that stages of a pipeline share: what is before the layers, the layers, what is behind."""

import dataclasses
from collections.abc import Callable
from typing import Any

Tree = Any


@dataclasses.dataclass(frozen=True)
class Parts:
    """`leave(layers(enter))`; called with `(parameters, rows)` it is that of a batch.

    A stage has some layers of `parameters`, and None in place of all that isn't stacked in layers; before and behind
    the layers the stacked ones are None. A stream is `(x, added)`, the residual stream being their sum, or with what
    layers say besides `(x, added, told)`: a tree of float32 sums over the batch. A stage hands on `(sum, None)`.

    Attributes:
      enter: `(parameters, rows) -> stream`.
      layers: `(parameters, stream, rows, first) -> stream`, `first` being the number of the first layer.
      leave: `(parameters, stream, rows) -> sums`: what the batch's microbatches are added up to.
    """

    enter: Callable[[Tree, Tree], Any]
    layers: Callable[[Tree, Any, Tree, Any], Any]
    leave: Callable[[Tree, Any, Tree], Any]

    def __call__(self, parameters: Tree, rows: Tree) -> Any:
        stream = self.layers(parameters, self.enter(parameters, rows), rows, 0)
        return self.leave(parameters, stream, rows)

    def of(self, take: Callable[[Tree], Tree]) -> "Parts":
        """The parts as functions of what `take` makes parameters of."""
        return Parts(
            lambda parameters, rows: self.enter(take(parameters), rows),
            lambda parameters, stream, rows, first: self.layers(take(parameters), stream, rows, first),
            lambda parameters, stream, rows: self.leave(take(parameters), stream, rows),
        )

    def giving(self, change: Callable[[Any], Any]) -> "Parts":
        """The parts with what `change` makes of the sums."""
        return dataclasses.replace(
            self, leave=lambda parameters, stream, rows: change(self.leave(parameters, stream, rows))
        )
