"""Documents cut into pieces whose lengths are powers of two, and the order of the lengths along a run."""

import dataclasses
from typing import Annotated, Any

from annotated_types import Ge, Le

from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.runtime.errors import UserError
from crescendo.ranges import Count

FORMAT = 1  # of the rows and of their order: part of the data's identity, to be raised when one changes


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """How documents are cut by length and in which order the lengths come: what `text_data` takes; see `decomposed`."""

    shortest: int
    odds: float
    cycle: int | None
    group: int

    @property
    def identity(self) -> list[Any]:
        """What fixes which rows there are and when each is drawn."""
        return [FORMAT, self.shortest, self.odds, self.cycle, self.group]

    def lengths(self, sequence_length: int) -> list[int]:
        """The lengths of pieces, the shortest first.

        Raises:
          UserError: for rows whose length is no power of two, or below the shortest piece.

        >>> decomposed(shortest=32).lengths(128)
        [32, 64, 128]
        >>> decomposed(shortest=32).lengths(100)
        Traceback (most recent call last):
        ...
        crescendo.experiments.runtime.errors.UserError: text_data.sequence_length = 100 must be a power of two, as ...
        """
        if not _is_power_of_two(sequence_length):
            raise UserError(
                f"text_data.sequence_length = {sequence_length} must be a power of two, as the lengths of pieces are "
                f"that text_data.packing = @decomposed() fills rows with: use {_neighbours(sequence_length)}"
            )
        if self.shortest > sequence_length:
            raise UserError(
                f"decomposed.shortest = {self.shortest} is longer than a row of text_data.sequence_length = "
                f"{sequence_length}: lower it"
            )
        first, last = self.shortest.bit_length() - 1, sequence_length.bit_length() - 1
        return [1 << digit for digit in range(first, last + 1)]


@checked
def decomposed(
    shortest: Count = 64,
    *,
    odds: Annotated[float, Ge(0.001), Le(1000)] = 2.0,
    cycle: Count | None = None,
    group: Count = 32,
) -> Decomposition:
    """Cuts every document by the binary digits of its length, and trains on short pieces before long ones.

    A document of n (token, label) pairs gives floor(n / T) pieces of the row's length T and, of the rest, a piece of
    2^i pairs for each binary digit i that is 1, the longest first; what is shorter than `shortest` is left out. A row
    holds T / 2^i pieces of one length, of different documents, so that it has no padding and always T tokens: batch
    sizes, clocks and shapes are those of packed rows. Held-out documents are packed as they are otherwise.

    A run goes through cycles, each of which has rows of every length in the shares that they have in the text. Lengths
    are drawn in proportion to share(l) w(l), w(l) = odds^(number of longer lengths), until one after the other is used
    up: with odds 2 this is the paper's Grow-P2, with 1 all lengths come evenly, below 1 long ones first. No draw is
    random: which row an example is follows from its number, the seed and these arguments, in any batch, on any host.

    Args:
      shortest: the length of the shortest pieces in tokens, a power of two.
      odds: how many times likelier a length is drawn than the next longer one, in proportion to what there is of both.
      cycle: its length in examples, whole groups; None: an eighth of the rows, so that a pass has eight cycles.
      group: so many examples in a row have one length, counted from the run's begin: where it is a multiple of the
        batch size, or the batch size itself, so has every batch.

    Raises:
      UserError: for lengths that aren't powers of two, and cycles that aren't whole groups.

    Example:
      >>> import tempfile
      >>> from crescendo.experiments.data.documents import Documents
      >>> from crescendo.experiments.data.text_data import text_data
      >>> poem = Documents("poem", "poem", lambda: (b"la " * (i % 40) + str(i).encode() for i in range(999)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     packing = decomposed(shortest=16, cycle=64, group=4)
      ...     data = text_data(poem, sequence_length=64, packing=packing, cache_directory=folder)
      ...     print(data.train.filling)
      ...     rows = data.train.take(data.train.order(seed=0)(range(64)))
      ...     pieces = rows["segment_ids"].max(axis=1)
      pieces of 16 to 64, 11.79% left out
      >>> (64 // pieces[::4]).tolist()  # the lengths of the groups' pieces
      [32, 64, 16, 32, 64, 16, 32, 64, 32, 64, 32, 64, 64, 64, 64, 64]

    References:
      Pouransari et al., "Dataset Decomposition: Faster LLM Training with Variable Sequence Length Curriculum", 2024
      (https://arxiv.org/abs/2405.13226).
    """
    if not _is_power_of_two(shortest):
        raise UserError(f"decomposed.shortest = {shortest} must be a power of two: use {_neighbours(shortest)}")
    if cycle is not None and cycle % group:
        near = [n for n in (cycle - cycle % group, cycle - cycle % group + group) if n]
        raise UserError(
            f"decomposed.cycle = {cycle} must be whole groups of decomposed.group = {group} examples: use "
            f"{' or '.join(map(str, near))}"
        )
    return Decomposition(shortest, odds, cycle, group)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _neighbours(number: int) -> str:
    """The powers of two around a number that is none."""
    below = 1 << (number.bit_length() - 1)
    return f"{below} or {2 * below}"
