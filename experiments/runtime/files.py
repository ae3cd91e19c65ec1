"""Files: disks that are full, files that are half written, said and handled in one place."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def local_path(path: str | os.PathLike) -> Path:
    """A path of the file-systems of this machine: runs lock their folder and append to its files.

    Raises:
      UserError: for an address, of an object store say. As a path it would be a folder of the name `gs:`.

    >>> local_path("runs/first")
    PosixPath('runs/first')
    >>> local_path("gs://bucket/first")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: gs://bucket/first is no path of this machine's: ...
    """
    text = os.fspath(path)
    if address := re.match(r"([a-zA-Z][\w+.-]+):/", text):
        raise UserError(
            f"{text} is no path of this machine's: files are read where they lie, and a run locks its folder and "
            f"appends to files, which {address[1]}:// can't: give a path on a disk and copy to or from it, or mount "
            "the bucket as a file-system"
        )
    return Path(text)


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
    """Writes a file of indented JSON in full, or leaves the old one; see `to_json`.

    Raises:
      UserError: if its folder can't be written.
    """
    with file_access("write", path.parent):
        replace_file(path, to_json(content, indent=2))


def to_json(content: object, indent: int | None = None) -> bytes:
    """JSON and a line's end. Null stands for a number that isn't finite, which JSON doesn't have.

    Floats are written with the digits that identify them, NumPy's and JAX's scalars as Python's.

    >>> to_json({"losses": [0.1, math.nan], "steps": 3})
    b'{"losses": [0.1, null], "steps": 3}\\n'
    """
    return (json.dumps(_known(content), indent=indent, allow_nan=False) + "\n").encode()


def _known(content: Any) -> Any:
    """With None for every number that isn't finite."""
    match content:
        case Mapping():
            return {name: _known(value) for name, value in content.items()}
        case list() | tuple():
            return [_known(value) for value in content]
    value = content.item() if hasattr(content, "item") else content
    return None if isinstance(value, float) and not math.isfinite(value) else value
