"""A list of results, a line of JSON for each, with which an experiment goes on where it stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, replace_json, to_json


class Results[Key: tuple]:
    """The finished parts of an experiment, by key.

    A part is a line of a file, written when it is done, so the work can be cut anywhere. A record holds the fields of
    its key. What fixes the meaning of the results stands in the folder's `run.json`.

    Args:
      folder: the experiment's, which this process holds (`run_folder.locked`).
      name: of the file in it.
      key: the named tuple by which a part is found.

    >>> import tempfile
    >>> from typing import NamedTuple
    >>> class Part(NamedTuple):
    ...     factor: int
    >>> results = Results(Path(tempfile.mkdtemp()), "parts.jsonl", Part)
    >>> _ = results.add({"factor": 2, "loss": 1.5})
    >>> Results(results.folder, "parts.jsonl", Part).records
    {Part(factor=2): {'factor': 2, 'loss': 1.5}}
    """

    def __init__(self, folder: Path, name: str, key: type[Key]):
        self.folder, self.path, self._key = folder, folder / name, key
        self._fields: tuple[str, ...] = key._fields  # type: ignore[attr-defined]
        self.records: dict[Key, dict[str, Any]] = self._read()

    def check_same(self, fixed: Mapping[str, Any]) -> None:
        """That finished parts mean the same as the ones to come; the first time, writes `run.json`.

        Raises:
          UserError: names each setting that differs.
        """
        before = run_folder.read_info(self.folder)
        if before is not None:
            run_folder.check_same(self.folder, before["fixed"], fixed)
            return
        info = run_folder.provenance() | {"fixed": fixed}
        replace_json(self.folder / "run.json", info)

    def add(self, record: dict[str, Any]) -> Key:
        """Keeps a finished part, as it is read back (`to_json`), and returns its key."""
        key, line = self._key_of(record), to_json(record)
        with file_access("write", self.path), open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else b"\n" + line  # one torn by a kill spoils no other
            file.write(line)
        self.records[key] = json.loads(line)
        return key

    def _read(self) -> dict[Key, dict[str, Any]]:
        with file_access("read", self.path):
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        records = {}
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # empty, or torn by a kill: its part is run again
            try:
                records[self._key_of(record)] = record
            except (KeyError, TypeError):
                fields = ", ".join(self._fields)
                raise UserError(f"{self.path} has no {fields} at line {number}: remove that line") from None
        return records

    def _key_of(self, record: Mapping[str, Any]) -> Key:
        return self._key(*(record[field] for field in self._fields))
