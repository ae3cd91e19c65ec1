"""Files: disks that are full, files that are half written, said and handled in one place."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crescendo.experiments.runtime.errors import UserError


@contextmanager
def file_access(action: str, path: Path) -> Iterator[None]:
    """Turns a full or read-only disk, or a file that isn't ours, into a `UserError` that names the path.

    >>> with file_access("read", Path("nowhere")): open("nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: cannot read nowhere: No such file or directory; mend ...
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot {action} {path}: {reason}; mend that or choose another path") from error


class Appender:
    """Appends bytes to a file, unbuffered."""

    def __init__(self, path: Path):
        self._path = path
        with file_access("write", path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)

    def __call__(self, data: bytes) -> None:
        with file_access("write", self._path):
            while data:  # where the disk fills up, the first write is cut short and the next one raises
                data = data[self._file.write(data) :]

    def close(self) -> None:
        self._file.close()


def replace_file(path: Path, content: bytes) -> None:
    """Writes the whole file, or leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_json(path: Path, content: object) -> None:
    """Writes a file of indented JSON in full, or leaves the old one.

    Raises:
      UserError: if its folder can't be written.
    """
    with file_access("write", path.parent):
        replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
