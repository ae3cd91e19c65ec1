"""Rows of random tokens: text for what needs none, such as timing a step or planning a run."""

import numpy as np
from numpy.typing import ArrayLike

ROWS = 2**31 - 1


class RandomText:
    """Endless rows whose tokens are as skewed as a text's (Zipf and Mandelbrot), each a function of its number.

    The skew matters to a device: the gradient of the embedding adds up where tokens coincide.

    Args:
      vocab_size: how many kinds of token.
      sequence_length: tokens in a row.
      documents_in_row: packed documents of equal length.

    >>> text = RandomText(vocab_size=50, sequence_length=8, documents_in_row=2)
    >>> text.train.take([3])["segment_ids"].tolist()
    [[1, 1, 1, 1, 2, 2, 2, 2]]
    """

    fingerprint = "random"
    tokenizer = None

    def __init__(self, vocab_size: int, sequence_length: int, documents_in_row: int = 1):
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.train, self.held_out = self, {"validation": self}
        weights = 1 / (np.arange(vocab_size) + 2.7)
        self._cumulative = np.cumsum(weights / weights.sum())
        index = np.arange(sequence_length)
        length = -(-sequence_length // documents_in_row)
        self._segment_ids = (index // length + 1).astype(np.int32)
        self._positions = (index % length).astype(np.int32)

    def __len__(self) -> int:
        return ROWS

    def __str__(self) -> str:
        return f"random tokens of {self.vocab_size:,} kinds, in rows of {self.sequence_length:,}"

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """The rows of these numbers, stacked: int32 [rows, sequence_length] each."""
        numbers = np.asarray(row_numbers).tolist()
        uniform = [np.random.default_rng(number).random(self.sequence_length) for number in numbers]
        last = self.vocab_size - 1
        tokens = np.minimum(np.searchsorted(self._cumulative, np.stack(uniform)), last).astype(np.int32)
        return {
            "tokens": tokens,
            "labels": np.roll(tokens, -1, axis=-1),
            "segment_ids": np.broadcast_to(self._segment_ids, tokens.shape),
            "positions": np.broadcast_to(self._positions, tokens.shape),
        }
