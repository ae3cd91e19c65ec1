"""What a model would see: rows of a text, decoded, with the documents' bounds."""

from typing import Any

import numpy as np
from rich.console import Console

from crescendo.experiments.data.mixed_rows import MixedRows
from crescendo.experiments.data.rows import row_order
from crescendo.experiments.data.subset import Subset
from crescendo.experiments.data.tokenizer import Tokenizer
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.text import visible


def preview(console: Console, data: Any, *, seed: int, examples: int) -> None:
    """Prints a run's first examples; nothing is trained.

    A line before each says which row of which source it is, and what is in it. A document's begin and end have a line
    each, and so has the place where one that is longer than a row is cut.

    Args:
      console: where.
      data: of text, as `text_data` gives them.
      seed: of the order.
      examples: how many.

    Raises:
      UserError: for a number below 1, or data that are no text.
    """
    if examples < 1:
        raise UserError(f"--preview {examples} must be at least 1")
    if getattr(data, "tokenizer", None) is None:
        raise UserError("--preview shows text, and train.data has none: use it with @text_data()")

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    say(f"data: {data}")
    order = row_order(data.train, seed)
    for i in range(examples):
        (number,) = order([i]).tolist()
        row = {name: array[0] for name, array in data.train.take([number]).items()}
        pieces, padding = int(row["segment_ids"].max()), int((row["segment_ids"] == 0).sum())
        length = len(row["segment_ids"])
        what = f"{length:,} tokens of {pieces} document{'s' * (pieces != 1)}"
        say(f"\nexample {i}: {_place(data.train, number)}; {what}{f', {padding:,} of padding' * (padding > 0)}")
        for piece in range(1, pieces + 1):
            for line in _shown(row, piece, data.tokenizer):
                say(line)


def _place(rows: Any, number: int) -> str:
    """Which row it is, in words."""
    if isinstance(rows, Subset):
        rows, number = rows.source, int(rows.numbers[number])
    if isinstance(rows, MixedRows):
        source, row, of_rows = rows.place(number)
        return f"{source}, row {row:,} of {of_rows:,}"
    return f"row {number:,} of {len(rows):,}"


def _shown(row: dict[str, np.ndarray], piece: int, tokenizer: Tokenizer) -> list[str]:
    """The lines of one piece of a document: every token and label of its once, between the marks of its ends."""
    here = row["segment_ids"] == piece
    tokens = [*row["tokens"][here].tolist(), int(row["labels"][here][-1])]
    begins, ends = tokens[0] == tokenizer.end_of_text, tokens[-1] == tokenizer.end_of_text
    text = visible(tokenizer.decode(np.array(tokens)))
    return [
        "  +-- a document begins" if begins else "  ... a document goes on",
        *(f"  | {line}" for line in text.splitlines()),
        "  +-- it ends" if ends else "  ... it goes on in another row",
    ]
