"""A list of results, a line of JSON for each, with which an experiment goes on where it stopped."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic_core

from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, read_file, replace_json, to_json


class Results[Key: tuple]:
    """The finished parts of an experiment, by key.

    A part is a line of a file, written when it is done, so the work can be cut anywhere. A record holds the fields of
    its key. What fixes the meaning of the results stands in the folder's `run.json`.

    Args:
      folder: the experiment's, which this process holds (`run_folder.locked`).
      name: of the file in it.
      key: the named tuple by which a part is found.
      record: the schema of a line, a `TypedDict` say (`runtime.schemas`).

    >>> import tempfile
    >>> from typing import NamedTuple
    >>> class Part(NamedTuple):
    ...     factor: int
    >>> results = Results(Path(tempfile.mkdtemp()), "parts.jsonl", Part)
    >>> _ = results.add({"factor": 2, "loss": 1.5})
    >>> Results(results.folder, "parts.jsonl", Part).records
    {Part(factor=2): {'factor': 2, 'loss': 1.5}}
    """

    def __init__(self, folder: Path, name: str, key: type[Key], record: Any = dict[str, Any]):
        self.folder, self.path, self._key, self._record = folder, folder / name, key, record
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
        self.records[key] = pydantic_core.from_json(line)
        return key

    def _read(self) -> dict[Key, dict[str, Any]]:
        lines = read_file(self.path).splitlines() if self.path.exists() else []
        records: dict[Key, dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            try:
                content = pydantic_core.from_json(line)
            except ValueError:
                continue  # empty, or torn by a kill: its part is run again
            key, record = self._checked(line, content, number)
            if records.setdefault(key, record) != record:
                shown = ", ".join(f"{name} = {value}" for name, value in zip(self._fields, key, strict=True))
                raise UserError(f"{self.path}: line {number} is the second of {shown}, and another: remove one of them")
        return records

    def _checked(self, line: bytes, content: Any, number: int) -> tuple[Key, dict[str, Any]]:
        """The key and the record of a line, whose content is given too."""
        if not isinstance(content, dict) or not content.keys() >= set(self._fields):
            raise UserError(f"{self.path} has no {', '.join(self._fields)} at line {number}: remove that line")
        where, way_on = f"{self.path}: line {number}", "remove that line, and its part is run again"
        record = schemas.parse(line, self._record, where, way_on=way_on)
        fields = {name: content[name] for name in self._fields}
        return schemas.checked(fields, self._key, where, way_on=way_on), record

    def _key_of(self, record: Mapping[str, Any]) -> Key:
        return self._key(*(record[field] for field in self._fields))
