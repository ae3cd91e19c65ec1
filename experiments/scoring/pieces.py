"""Arrays that are computed a piece of rows at a time, and kept by piece until all of it is there."""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from crescendo.experiments.runtime.files import file_access, replace_file
from crescendo.experiments.runtime.interruption import Interrupted, Interruption
from crescendo.experiments.runtime.text import duration

SECONDS_BETWEEN_LINES = 10.0


def by_piece(
    compute: Callable[[np.ndarray], np.ndarray],
    rows: int,
    piece_rows: int,
    folder: Path,
    say: Callable[[str], None],
) -> np.ndarray:
    """`compute(numbers of rows)`, of all rows, one piece after the other; says now and then how far it is.

    Args:
      compute: row numbers, int64 `[piece]`, to an array `[piece, ...]`.
      rows: how many.
      piece_rows: in a piece.
      folder: gets a file for each piece; those that are there are read, and what is damaged is computed again.
      say: prints a line.

    Raises:
      Interrupted: after the piece in which the process is asked to stop.
      UserError: if the folder can't be written.

    >>> import tempfile
    >>> by_piece(lambda numbers: numbers**2, 5, 2, Path(tempfile.mkdtemp()), print).tolist()
    [0, 1, 4, 9, 16]
    """
    with file_access("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    pieces: list[np.ndarray] = []
    begin = said = time.monotonic()
    computed = 0
    with Interruption() as interruption:
        for numbers in _pieces(rows, piece_rows):
            path = folder / f"{numbers[0]}.npy"
            piece = _read(path, len(numbers))
            if piece is None:
                piece, computed = compute(numbers), computed + len(numbers)
                content = io.BytesIO()
                np.save(content, piece)
                with file_access("write", folder):
                    replace_file(path, content.getvalue())
            pieces.append(piece)
            done, now = int(numbers[-1]) + 1, time.monotonic()
            if interruption.requested and done < rows:
                raise Interrupted(
                    f"{done:,} of {rows:,} rows are done; the same command goes on", interruption.requested
                )
            if now - said > SECONDS_BETWEEN_LINES and done < rows:
                said = now
                left = (rows - done) * (now - begin) / max(1, computed)
                say(f"{done:,} of {rows:,} rows, about {duration(left)} left")
    return np.concatenate(pieces)


def _pieces(rows: int, piece_rows: int) -> Iterator[np.ndarray]:
    for begin in range(0, rows, piece_rows):
        yield np.arange(begin, min(begin + piece_rows, rows))


def _read(path: Path, rows: int) -> np.ndarray | None:
    """A piece; None where it isn't there, or isn't one."""
    try:
        piece = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return piece if isinstance(piece, np.ndarray) and piece.ndim and len(piece) == rows else None
