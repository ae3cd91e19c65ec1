"""Rows of pieces of one length each, and the order in which a run draws the lengths."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from crescendo.experiments.data.decomposed import Decomposition
from crescendo.experiments.data.packing import Packing, split_documents
from crescendo.experiments.data.rows import Rows, Shuffled, seed_of
from crescendo.experiments.runtime.errors import UserError

CYCLES = 8  # of a pass over the rows, where nothing else is said


def decompose(offsets: np.ndarray, lengths: Sequence[int]) -> Packing:
    """Cuts documents by the binary digits of their lengths and fills rows with pieces of one length.

    Rows of the shortest pieces come first. Pieces of one length are shuffled, so that those of a row are not of
    neighbouring documents; those that don't fill a row are left out.

    Args:
      offsets: int64 [documents + 1]; document i has the pairs offsets[i] to offsets[i + 1] - 1.
      lengths: of pieces in pairs: successive powers of two, the last one the row's.

    Returns:
      Rows without padding.

    Example:
      Documents of 7 and 13 pairs in rows of 4: 7 = 4 + 2 + 1, 13 = 3 * 4 + 1.

      >>> packing = decompose(np.array([0, 7, 20]), [1, 2, 4])
      >>> packing.lengths.tolist(), sorted(packing.starts.tolist())  # 1 + 1 and 2 fill no row
      ([4, 4, 4, 4], [0, 7, 11, 15])
    """
    capacity = lengths[-1]
    counts = np.diff(offsets)
    full, of_full = split_documents(offsets, capacity)
    by_length = [_pieces(offsets, counts, length) for length in lengths[:-1]] + [full[of_full == capacity]]
    kept = []
    for length, starts in zip(lengths, by_length, strict=True):
        each = capacity // length
        rows = len(starts) // each
        kept.append(starts[np.argsort(_mixed(starts), kind="stable")][: rows * each])
    pieces = [len(starts) for starts in kept]
    per_row = np.repeat(
        [capacity // length for length in lengths],
        [n * length // capacity for n, length in zip(pieces, lengths, strict=True)],
    )
    return Packing(
        starts=np.concatenate(kept),
        lengths=np.repeat(np.asarray(lengths, np.int32), pieces),
        row_offsets=np.concatenate([[0], np.cumsum(per_row, dtype=np.int64)]),
    )


def _pieces(offsets: np.ndarray, counts: np.ndarray, length: int) -> np.ndarray:
    """Where the pieces of a length begin: one in each document whose count of pairs has this binary digit.

    Behind it come the smaller digits alone.
    """
    having = np.flatnonzero(counts & length)
    return offsets[having] + (counts - counts % (2 * length))[having]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """A hash of each number, uint64: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class DecomposedRows(Rows):
    """Rows of pieces of one length each: see `Rows`.

    Args:
      tokens: integers [corpus tokens].
      packing: as `decompose` makes it.
      sequence_length: tokens in a row.
      decomposition: the lengths and their order.
      before_reading: see `Rows`.

    Attributes:
      rows_of: how many rows there are of pieces of each length, the shortest first.

    Raises:
      UserError: for a length of which there is no row.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        packing: Packing,
        sequence_length: int,
        decomposition: Decomposition,
        *,
        before_reading: Callable[[np.ndarray, np.ndarray], None] = lambda begins, ends: None,
    ):
        super().__init__(tokens, packing, sequence_length, before_reading=before_reading)
        self._decomposition = decomposition
        lengths = np.asarray(decomposition.lengths(sequence_length), packing.lengths.dtype)
        ends = np.searchsorted(packing.lengths, lengths, "right")
        rows = np.diff(ends, prepend=0) * lengths // sequence_length
        self.rows_of: Mapping[int, int] = dict(zip(lengths.tolist(), rows.tolist(), strict=True))
        if not self.rows_of[sequence_length]:
            raise UserError(
                f"no document has the {sequence_length} tokens of text_data.sequence_length, and "
                "text_data.packing = @decomposed() wants pieces of that length: lower it"
            )
        if none := [length for length, count in self.rows_of.items() if not count]:
            raise UserError(
                f"the documents have too few pieces of {none[-1]} tokens for a row of text_data.sequence_length = "
                f"{sequence_length}: set decomposed.shortest = {2 * none[-1]}, or add text"
            )

    @property
    def filling(self) -> str:
        """How rows are filled, in words."""
        shortest, longest = next(iter(self.rows_of)), self.sequence_length
        left_out = 1 - len(self) * self.sequence_length / (len(self._tokens) - 1)
        return f"pieces of {shortest:,} to {longest:,}, {left_out:.2%} left out"

    def order(self, seed: int) -> "LengthOrder":
        """The order of a run."""
        return LengthOrder(self.rows_of, self.sequence_length, self._decomposition, seed)


class LengthOrder:
    """Which row each example is: groups of examples of one length, in cycles that have every length in its share.

    With n(l) groups of length l in a cycle, the j-th of them comes at (j + 1/2) / (n(l) w(l)), w(l) = odds^(number of
    longer lengths); the shorter ones first where several come at once. Every length's rows are read in passes of their
    own, each in another order.

    Args:
      rows_of: how many rows there are of pieces of each length, the shortest first.
      sequence_length: tokens in a row.
      decomposition: odds, cycle and group.
      seed: of the orders within lengths, in [0, 2**32).

    Raises:
      UserError: for a cycle that has no room for a length.

    Example:
      >>> from crescendo.experiments.data.decomposed import decomposed
      >>> order = LengthOrder({32: 20, 64: 40, 128: 40}, 128, decomposed(cycle=20, group=2), seed=0)
      >>> order.lengths(range(20)).tolist()[::2]
      [32, 64, 128, 32, 64, 64, 128, 64, 128, 128]
      >>> order.columns(examples_seen=8, batch_size=4)  # 2 rows of 1 piece and 2 of 4: 512 tokens in 10 pieces
      {'piece_length': 51.2}
    """

    def __init__(self, rows_of: Mapping[int, int], sequence_length: int, decomposition: Decomposition, seed: int):
        group = decomposition.group
        self._lengths, self._rows = np.array([*rows_of]), np.array([*rows_of.values()])
        self._sequence_length, self._group, self._odds = sequence_length, group, decomposition.odds
        self._begins = np.cumsum(self._rows) - self._rows
        self._orders = [Shuffled(count, seed_of(str(length), seed)) for length, count in rows_of.items()]
        rows = int(self._rows.sum())
        groups = (rows // CYCLES if decomposition.cycle is None else decomposition.cycle) // group
        if not groups:
            raise UserError(
                f"an eighth of the {rows:,} rows is less than decomposed.group = {group} examples of one length: lower "
                "it, or add text"
            )
        self._cycle = groups * group
        self._groups_of = _apportioned(groups, self._rows)
        if none := self._lengths[self._groups_of == 0].tolist():
            share = rows_of[none[0]] / rows
            raise UserError(
                f"pieces of {none[0]} tokens are {share:.2%} of all, and a cycle of {self._cycle:,} examples in groups "
                f"of {group} has no room for them: lengthen decomposed.cycle, lower decomposed.group, or raise "
                "decomposed.shortest"
            )

    @functools.cached_property
    def _of_cycle(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each group of a cycle its length's number, and which of the groups of this length it is."""
        numbers = [np.arange(count) for count in self._groups_of.tolist()]
        weights = [1.0]
        for _ in numbers[1:]:
            weights.append(weights[-1] * self._odds)  # every machine rounds a product alike, but not a power
        at = [(j + 0.5) / (len(j) * weight) for j, weight in zip(numbers, reversed(weights), strict=True)]
        in_order = np.argsort(np.concatenate(at), kind="stable")
        of = np.repeat(np.arange(len(numbers)), self._groups_of)
        return of[in_order], np.concatenate(numbers)[in_order]

    def _drawn(self, examples: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """`(length's number, which of its draws)` of each example, int64."""
        examples = np.asarray(examples, np.int64)
        number, within = np.divmod(examples, self._group)
        cycle, place = np.divmod(number, self._cycle // self._group)
        of, rank = (array[place] for array in self._of_cycle)
        return of, (cycle * self._groups_of[of] + rank) * self._group + within

    def __call__(self, examples: ArrayLike) -> np.ndarray:
        of, draw = self._drawn(examples)
        result = np.empty_like(draw)
        for i, order in enumerate(self._orders):
            mine = np.flatnonzero(of == i)
            result[mine] = self._begins[i] + order(draw[mine])
        return result

    def lengths(self, examples: ArrayLike) -> np.ndarray:
        """The length of each example's pieces."""
        return self._lengths[self._drawn(examples)[0]]

    def epochs(self, examples_seen: int) -> Mapping[str, float]:
        return {}

    def columns(self, examples_seen: int, batch_size: int) -> Mapping[str, float]:
        lengths = self.lengths(range(examples_seen - batch_size, examples_seen))
        return {"piece_length": batch_size / float((1 / lengths).sum())}

    def check(self, total_examples: int) -> None:
        """Raises UserError where a run has less than one cycle."""
        if total_examples < self._cycle:
            eighth = max(1, total_examples // CYCLES // self._group) * self._group
            raise UserError(
                f"the run's {total_examples:,} examples are less than one cycle of {self._cycle:,}, whose last ones "
                f"are the longest: set decomposed.cycle = {eighth}, or raise train.total_examples"
            )


def _apportioned(groups: int, rows: np.ndarray) -> np.ndarray:
    """As many groups in the shares of the rows: by the largest remainders, of equal ones the first.

    >>> _apportioned(10, np.array([1, 1, 1])).tolist()
    [4, 3, 3]
    """
    whole, rest = np.divmod(groups * rows, rows.sum())
    whole[np.argsort(-rest, kind="stable")[: groups - whole.sum()]] += 1
    return whole
