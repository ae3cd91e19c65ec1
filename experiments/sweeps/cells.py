"""Cells: the parts of an experiment, each run once, in a folder that can be gone on with."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crescendo.experiments.runs.results import Results
from crescendo.experiments.runtime.interruption import Interrupted, Interruption


class Cells[Key: tuple](Results[Key]):
    """All cells of an experiment, and the records of the finished ones, a line each of a file.

    Args:
      folder: the experiment's, which this process holds (`runs.folder.locked`).
      name: of the file in it: what cells are called, with `.jsonl`.
      cells: all of them, named tuples of one kind; records hold their fields. More may be asked for later on.
      fixed: what finished cells and those to come must have in common.
      record: the schema of a line, as `Results` takes it.

    Raises:
      UserError: names each of `fixed` that differs from before.

    >>> import tempfile
    >>> from typing import NamedTuple
    >>> class Part(NamedTuple):
    ...     factor: int
    >>> cells = Cells(Path(tempfile.mkdtemp()), "parts.jsonl", [Part(1), Part(2)], {"data": "toy"})
    >>> cells.run(({**cell._asdict(), "loss": 1.5 / cell.factor} for cell in cells.left), deadline=0.0)
    >>> cells.left, cells.finished
    ([Part(factor=2)], [{'factor': 1, 'loss': 1.5}])
    >>> cells.check_finished()
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.interruption.Interrupted: 1 of 2 parts are left in ...
    """

    def __init__(
        self, folder: Path, name: str, cells: Sequence[Key], fixed: Mapping[str, Any], record: Any = dict[str, Any]
    ):
        super().__init__(folder, name, type(cells[0]), record)
        self.check_same(fixed)
        self.cells = list(cells)
        self._stopped_by: str | None = None

    @property
    def left(self) -> list[Key]:
        """The unfinished cells, in order."""
        return [cell for cell in self.cells if cell not in self.records]

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The records of those finished, in the cells' order; not those of cells that aren't asked for now."""
        return [self.records[cell] for cell in self.cells if cell in self.records]

    def run(self, records: Iterable[dict[str, Any]], deadline: float) -> None:
        """Adds records as they come, until the deadline (of `time.monotonic()`) has passed or a signal asks to stop."""
        with Interruption() as interruption:
            for record in records:
                self.add(record)
                self._stopped_by = interruption.requested
                if self._stopped_by or time.monotonic() > deadline:
                    break

    def check_finished(self) -> None:
        """That no cell is left.

        Raises:
          Interrupted: says how many are.
        """
        if left := len(self.left):
            raise Interrupted(
                f"{left} of {len(self.cells)} {self.path.stem} are left in {self.folder}; the same command goes on",
                self._stopped_by,
            )
