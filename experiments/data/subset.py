"""Some rows of some data: the file that says which, and the data with these alone to train on."""

import functools
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from crescendo.experiments.data.documents import digest
from crescendo.experiments.data.npz import Expected, check_arrays, read_npz
from crescendo.experiments.data.rows import Order, Shuffled, Source
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, local_path, replace_file

FORMAT = 1  # of the order of a subset's examples: part of every fingerprint, to be raised when it changes
_ARRAYS = {"rows": Expected("iu", 1), "of_rows": Expected("iu", 0), "data": Expected("U", 0), "by": Expected("U", 0)}


class Subset:
    """Some rows of a source, in an order of their own: they are shuffled as if there were no others.

    Of a source with an order of its own it is that order over these rows, which it says by `order_within(rows, seed)`.

    Args:
      source: of all rows.
      numbers: of the rows, int64 `[rows]`.

    >>> from crescendo.experiments.data.image_data import ImageRows
    >>> every = ImageRows(np.zeros((5, 2, 2, 1), np.uint8), np.arange(5))
    >>> Subset(every, np.array([1, 4])).take([1, 0])["labels"].tolist()
    [4, 1]
    """

    def __init__(self, source: Source, numbers: np.ndarray):
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, row_numbers: ArrayLike) -> dict[str, np.ndarray]:
        """The rows of these numbers, in 0..len(self) - 1, stacked."""
        return self.source.take(self.numbers[np.asarray(row_numbers, np.int64)])

    def order(self, seed: int) -> Order:
        """Of these rows.

        Raises:
          UserError: a source whose order can't leave rows out.
        """
        within = getattr(self.source, "order_within", None)
        if within is not None:
            return within(self.numbers, seed)
        if hasattr(self.source, "order"):
            raise UserError(
                f"train.rows chooses rows of {type(self.source).__name__}, which orders all of its rows itself: "
                "leave train.rows out"
            )
        return Shuffled(len(self), seed)


class Chosen(NamedTuple):
    """What the file of a subset holds.

    Attributes:
      rows: the numbers of the chosen rows, increasing, int64 `[rows]`.
      of_rows: how many rows there are.
      data: the fingerprint of the data.
      by: for people: what chose them.
    """

    rows: np.ndarray
    of_rows: int
    data: str
    by: str


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Writes arrays of numbers and texts as one .npz file, whole or not at all.

    Raises:
      UserError: if its folder can't be written.
    """
    content = io.BytesIO()
    np.savez_compressed(content, **{name: np.asarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    with file_access("write", path):
        replace_file(path, content.getvalue())


def write_subset(path: Path, chosen: Chosen) -> None:
    """Writes the file of a subset; see `write_arrays`."""
    write_arrays(path, {**chosen._asdict(), "rows": chosen.rows.astype(np.int64), "of_rows": np.int64(chosen.of_rows)})


def read_subset(path: Path) -> Chosen:
    """The file of a subset.

    Raises:
      UserError: if it isn't there, isn't such a file, or has rows that aren't increasing numbers of rows.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_subset(Path(folder) / "few.npz", Chosen(np.array([0, 2]), 3, "aa", "hand"))
    ...     read_subset(Path(folder) / "few.npz").rows.tolist()
    [0, 2]
    """
    arrays = read_npz(path)
    check_arrays(arrays, _ARRAYS, str(path))
    rows, of_rows = arrays["rows"].astype(np.int64), int(arrays["of_rows"])
    if not len(rows) or rows[0] < 0 or rows[-1] >= of_rows or (np.diff(rows) < 1).any():
        raise UserError(f"{path}: rows must be increasing numbers from 0 to {of_rows - 1}, at least one of them")
    return Chosen(rows, of_rows, str(arrays["data"]), str(arrays["by"]))


class SubsetData:
    """Data of which some rows are trained on; all else is theirs.

    Args:
      data: as a task takes it.
      path: of the subset's file.

    Raises:
      UserError: by `train` and `fingerprint`, if the file is of other data.
    """

    def __init__(self, data: Any, path: Path):
        self._data, self._path = data, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    @functools.cached_property
    def _chosen(self) -> Chosen:
        chosen, there = read_subset(self._path), len(self._data.train)
        if (chosen.data, chosen.of_rows) != (self._data.fingerprint, there):
            raise UserError(
                f"train.rows: {self._path} chooses of {chosen.of_rows:,} rows of other data (fingerprint "
                f"{chosen.data}; these have {there:,} and {self._data.fingerprint}): select rows of these data"
            )
        return chosen

    @functools.cached_property
    def train(self) -> Subset:
        """The chosen rows."""
        return Subset(self._data.train, self._chosen.rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes whenever the data or the choice do."""
        return digest([FORMAT, self._data.fingerprint, self._chosen.rows.tolist()])

    def __str__(self) -> str:
        chosen = self._chosen
        return f"{self._data}; trained on {len(chosen.rows):,} of {chosen.of_rows:,} rows, by {chosen.by}"


def on_subset(data: Any, rows: str | None) -> Any:
    """Data of which the rows in a subset's file alone are trained on; as they are where there is none.

    Args:
      data: as a task takes it.
      rows: the file's path, or None.
    """
    return data if rows is None else SubsetData(data, local_path(rows))
