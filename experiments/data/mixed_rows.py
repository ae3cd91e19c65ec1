"""Rows of several sources as one array, and the order in which a mixture draws them."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from crescendo.experiments.data.rows import Rows, Shuffled, seed_of
from crescendo.experiments.data.shares import Shares
from crescendo.experiments.runtime.errors import UserError


class Place(NamedTuple):
    """Where a row is from: its source's name, its number there, and how many there are."""

    source: str
    row: int
    of_rows: int


class MixedRows:
    """Packed rows of several sources, numbered one source after the other.

    Args:
      parts: the rows of each source by name, in the order of the shares.
      shares: of the sources.
      most_epochs: of a source that a run may not read more often, by name.
    """

    def __init__(self, parts: Mapping[str, Rows], shares: Shares, most_epochs: Mapping[str, float]):
        self.parts, self._shares, self._most_epochs = parts, shares, most_epochs
        self._begins = np.concatenate([[0], np.cumsum([len(rows) for rows in parts.values()])])

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.take([range(len(self))[i]]).items()}

    @property
    def padding_share(self) -> float:
        """The part of all positions of all sources that is padding, in [0, 1)."""
        return sum(len(rows) * rows.padding_share for rows in self.parts.values()) / len(self)

    def place(self, row_number: int) -> Place:
        """Where a row is from."""
        i = int(np.searchsorted(self._begins, row_number, "right")) - 1
        name = list(self.parts)[i]
        return Place(name, row_number - int(self._begins[i]), len(self.parts[name]))

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """The rows of these numbers, stacked: see `Rows.take`."""
        numbers = np.asarray(row_numbers, np.int64)
        source = np.searchsorted(self._begins, numbers, "right") - 1
        batch: dict[str, np.ndarray] = {}
        for i, rows in enumerate(self.parts.values()):
            mine = np.flatnonzero(source == i)
            for name, array in rows.take(numbers[mine] - self._begins[i]).items():
                batch.setdefault(name, np.empty((len(numbers), *array.shape[1:]), array.dtype))[mine] = array
        return batch

    def order(self, seed: int) -> "MixedOrder":
        """The order of the mixture."""
        return self.order_within(np.arange(len(self)), seed)

    def order_within(self, row_numbers: np.ndarray, seed: int) -> "MixedOrder":
        """The order of the mixture where there are only these rows, increasing; it gives their places among them.

        Raises:
          UserError: where a source has none.
        """
        counts = np.diff(np.searchsorted(row_numbers, self._begins)).tolist()
        rows = dict(zip(self.parts, counts, strict=True))
        if none := [name for name, count in rows.items() if not count]:
            raise UserError(f"train.rows: no row of the source {none[0]} is chosen: choose at least one of each")
        return MixedOrder(rows, self._shares, seed, self._most_epochs)


class MixedOrder:
    """Which row each example is: of the source that `Shares` say, whose epochs are each in an order of its own.

    The order of a source depends on the seed and its name: others come and go without a change.

    Args:
      rows: how many each source has, by name, in the order of the shares.
      shares: of the sources.
      seed: of the orders within sources, in [0, 2**32).
      most_epochs: of a source that a run may not read more often, by name.

    Example:
      >>> from crescendo.experiments.data.shares import Shares
      >>> order = MixedOrder({"a": 3, "b": 2}, Shares([0], [[2048, 2048]], "hold"), seed=0, most_epochs={"b": 1})
      >>> (order(range(8)) // 3).tolist()  # rows 0 to 2 are a's
      [0, 1, 0, 1, 0, 1, 0, 1]
      >>> order.epochs(6)
      {'a': 1.0, 'b': 1.5}
      >>> order.check(4), order.check(6)
      Traceback (most recent call last):
      ...
      crescendo.experiments.runtime.errors.UserError: the weights draw 3 examples of b in 6, and its 2 rows ...
    """

    def __init__(self, rows: Mapping[str, int], shares: Shares, seed: int, most_epochs: Mapping[str, float]):
        self._rows, self._shares, self._most_epochs = rows, shares, most_epochs
        self._begins = np.cumsum([0, *rows.values()])[:-1]
        self._orders = [Shuffled(count, seed_of(name, seed)) for name, count in rows.items()]

    def __call__(self, examples: ArrayLike) -> np.ndarray:
        source, number = self._shares.drawn(examples)
        result = np.empty_like(number)
        for i, order in enumerate(self._orders):
            mine = np.flatnonzero(source == i)
            result[mine] = self._begins[i] + order(number[mine])
        return result

    def epochs(self, examples_seen: int) -> dict[str, float]:
        """How often each source has been read at a clock, by its name."""
        drawn = self._shares.before(examples_seen).tolist()
        return {name: count / rows for (name, rows), count in zip(self._rows.items(), drawn, strict=True)}

    def columns(self, examples_seen: int, batch_size: int) -> dict[str, float]:
        """How often each source has been read, as `epochs_SOURCE`."""
        return {f"epochs_{name}": count for name, count in self.epochs(examples_seen).items()}

    def check(self, total_examples: int) -> None:
        """Raises UserError where a run of this length reads a source more often than it may."""
        drawn = self._shares.before(total_examples).tolist()
        for (name, rows), count in zip(self._rows.items(), drawn, strict=True):
            most = self._most_epochs.get(name)
            if most is not None and count > most * rows:
                raise UserError(
                    f"the weights draw {count:,} examples of {name} in {total_examples:,}, and its {rows:,} rows give "
                    f"{int(most * rows):,} in text_mixture.most_epochs = {most:g}: lower its weight, shorten the run, "
                    "or raise most_epochs"
                )
