"""Rows of tokens, read anywhere by one integer, the order of a run's examples, and the endless stream of them."""

import functools
import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from crescendo.experiments.data.packing import PADDING, Packing
from crescendo.experiments.runtime.errors import UserError


class Source(Protocol):
    """An array of examples: any of them is found by its number.

    Where their order isn't `Shuffled`, it has a method `order(seed) -> Order` besides.
    """

    def __len__(self) -> int: ...

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """The rows of these numbers, stacked: `[rows, ...]` each, by name."""
        ...


class Rows:
    """Packed rows of tokens, by number; the arrays behind them are memory-mapped.

    Each row is {"tokens", "labels", "segment_ids", "positions"}, int32 [sequence_length] each: `labels[t]` is the token
    after `tokens[t]` in the same document, `segment_ids` counts the documents of the row from 1 and is 0 on padding,
    `positions` counts from the start of the document's piece in this row. On padding all four are 0.

    Args:
      tokens: integers [corpus tokens].
      packing: where in `tokens` each row's pieces lie.
      sequence_length: tokens in a row.
      bytes_per_token: of the text behind them, a label being a token; None where it isn't known.
      before_reading: called with where the ranges of `tokens` that are about to be read begin and end, int64 [ranges].

    Example:
      >>> from crescendo.experiments.data.packing import pack
      >>> corpus = np.array([9, 1, 2, 3, 9, 5, 9])  # two documents, 9 is the end of text
      >>> rows = Rows(corpus, pack(np.array([0, 4, 6]), capacity=7), sequence_length=7)
      >>> {name: array.tolist() for name, array in rows[0].items()}  # doctest: +NORMALIZE_WHITESPACE
      {'tokens': [9, 1, 2, 3, 9, 5, 0], 'labels': [1, 2, 3, 9, 5, 9, 0],
       'segment_ids': [1, 1, 1, 1, 2, 2, 0], 'positions': [0, 1, 2, 3, 0, 1, 0]}
    """

    def __init__(
        self,
        tokens: np.ndarray,
        packing: Packing,
        sequence_length: int,
        bytes_per_token: float | None = None,
        *,
        before_reading: Callable[[np.ndarray, np.ndarray], None] = lambda begins, ends: None,
    ):
        self.sequence_length, self.bytes_per_token = sequence_length, bytes_per_token
        self._before_reading = before_reading
        self._tokens = np.asarray(tokens)  # a plain view of the memory map: np.memmap's own indexing is slower
        self._packing = Packing(*map(np.asarray, packing))

    def __len__(self) -> int:
        return len(self._packing.row_offsets) - 1

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.take([range(len(self))[i]]).items()}

    @property
    def padding_share(self) -> float:
        """The part of all positions that is padding, in [0, 1)."""
        padding = self._packing.lengths[self._packing.starts == PADDING]
        return int(padding.sum()) / (len(self) * self.sequence_length)

    @property
    def filling(self) -> str:
        """How rows are filled, in words."""
        return f"{self.padding_share:.2%} padding"

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """The rows of these numbers, [rows] in 0..len(self) - 1, stacked: int32 [rows, sequence_length] each."""
        row_numbers = np.asarray(row_numbers, np.int64)
        starts, lengths, row_offsets = self._packing
        pieces = row_offsets[row_numbers + 1] - row_offsets[row_numbers]
        first = np.cumsum(pieces) - pieces
        within_row = np.arange(pieces.sum()) - np.repeat(first, pieces)
        piece = np.repeat(row_offsets[row_numbers], pieces) + within_row
        start, length = starts[piece], lengths[piece]
        text = start != PADDING
        self._before_reading(start[text], start[text] + length[text] + 1)  # labels are a token further

        # Rows are full, padding included, so the pieces cover the batch without gaps.
        begin = np.cumsum(length, dtype=np.int64) - length
        positions = np.arange(len(row_numbers) * self.sequence_length) - np.repeat(begin, length)
        source = np.repeat(start, length) + positions
        segment_ids = np.repeat(np.where(start == PADDING, 0, within_row + 1).astype(np.int32), length)
        padding = np.flatnonzero(segment_ids == 0)
        source[padding] = 0
        batch = {
            "tokens": self._tokens[source].astype(np.int32),
            "labels": self._tokens[source + 1].astype(np.int32),
            "segment_ids": segment_ids,
            "positions": positions.astype(np.int32),
        }
        for array in batch.values():
            array[padding] = 0
        return {name: array.reshape(-1, self.sequence_length) for name, array in batch.items()}


class Order(Protocol):
    """Which row each example of a run is: a function of the example's number on the clock, and of nothing before it."""

    def __call__(self, examples: ArrayLike) -> np.ndarray:
        """The numbers of the rows, int64 `[examples]`."""
        ...

    def epochs(self, examples_seen: int) -> Mapping[str, float]:
        """How often each source has been read at a clock, by its name; of no source where there is but one."""
        ...

    def columns(self, examples_seen: int, batch_size: int) -> Mapping[str, float]:
        """What the training record of the batch that ends at a clock says of its examples, by column."""
        ...

    def check(self, total_examples: int) -> None:
        """Raises UserError for a run of a length that the data don't serve."""
        ...


class Shuffled:
    """All rows in an order of its own every epoch, without end.

    Args:
      rows: how many, at least one.
      seed: of the permutations, in [0, 2**32).

    Raises:
      UserError: if the seed is out of its range.

    >>> order = Shuffled(4, seed=0)
    >>> sorted(order(range(4)).tolist()), sorted(order(range(4, 8)).tolist())
    ([0, 1, 2, 3], [0, 1, 2, 3])
    """

    def __init__(self, rows: int, seed: int):
        if not 0 <= seed < 2**32:
            raise UserError(f"the data seed = {seed} must lie in 0..{2**32 - 1}")
        self._rows, self._seed = rows, seed

    @functools.cached_property
    def _row_numbers(self) -> Any:
        from grain import MapDataset  # takes a second to import

        return MapDataset.range(self._rows).seed(self._seed).shuffle().repeat()

    def __call__(self, examples: ArrayLike) -> np.ndarray:
        numbers = np.asarray(examples, np.int64)
        return np.fromiter((self._row_numbers[i] for i in numbers.tolist()), np.int64, len(numbers))

    def epochs(self, examples_seen: int) -> Mapping[str, float]:
        return {}

    def columns(self, examples_seen: int, batch_size: int) -> Mapping[str, float]:
        return {}

    def check(self, total_examples: int) -> None: ...


def seed_of(name: str, seed: int) -> int:
    """A seed of its own for one part of the rows, in [0, 2**32).

    Raises:
      UserError: if the run's is out of its range.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"the data seed = {seed} must lie in 0..{2**32 - 1}")
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest())


def row_order(source: Source, seed: int) -> Order:
    """The order of a source's rows: its own, or `Shuffled`."""
    own: Callable[[int], Order] | None = getattr(source, "order", None)
    return Shuffled(len(source), seed) if own is None else own(seed)


class Stream:
    """An endless stream of rows in their order, whose whole position is one integer.

    Args:
      rows: an array of examples, at least one.
      seed: of the order, in [0, 2**32).

    Raises:
      UserError: if the seed is out of its range.

    Example:
      >>> from crescendo.experiments.data.packing import pack
      >>> corpus = np.array([9, 1, 2, 3, 9, 5, 9])
      >>> stream = Stream(Rows(corpus, pack(np.array([0, 4, 6]), capacity=2), sequence_length=2), seed=0)
      >>> stream.read(examples_seen=6, count=3)["tokens"].shape
      (3, 2)
    """

    def __init__(self, rows: Source, seed: int):
        self._rows, self._order = rows, row_order(rows, seed)

    def __len__(self) -> int:
        return sys.maxsize

    def read(self, examples_seen: int, count: int) -> dict[str, np.ndarray]:
        """The global examples examples_seen to examples_seen + count - 1: see `take`."""
        return self.take(range(examples_seen, examples_seen + count))

    def take(self, examples: ArrayLike) -> dict[str, np.ndarray]:
        """The examples of these numbers, counted from the stream's begin: any process can read any share of a batch.

        Returns:
          The arrays of the rows, `[examples, ...]` each.
        """
        return self._rows.take(self._order(examples))
