"""Files: disks that are full, files that are half written, said and handled in one place."""

import io
import json
import math
import os
import re
import stat
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
    """A path of the file-systems of this machine, `~` expanded: runs lock their folder and append to its files.

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
    if text.startswith("~"):
        try:
            return Path(text).expanduser()
        except RuntimeError:
            raise UserError(f"{text!r}: there is no user of that name: write ./ before it if it is a file's") from None
    return Path(text)


def open_file(path: Path) -> io.BufferedReader:
    """Opens a file that somebody else may have written, to read it.

    Raises:
      UserError: for what has no end, or none yet (a pipe, a device), which isn't waited for, and for a folder.
      OSError: for what can't be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder: give a file in it")
    raise UserError(f"{path} is no file that can be read to its end: give a regular file")


def read_file(path: Path, *, limit_bytes: int = 1 << 30) -> bytes:
    """The content of a file that somebody else may have written.

    Args:
      path: of a file; see `open_file`.
      limit_bytes: more isn't read, since it couldn't be what is asked for and would fill the memory.

    Raises:
      UserError: for what can't be read, is no file, or is too large.

    >>> read_file(Path(os.devnull))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: /dev/null is no file that can be read to its end: ...
    """
    with file_access("read", path), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            raise UserError(f"{path} has {size:,} bytes, above the {limit_bytes:,} that it may have")
        return file.read()


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


def sync(path: Path) -> None:
    """Has what was written to a file on the disk, whatever happens to the machine.

    Raises:
      UserError: if the disk doesn't take it, or the file has gone.
    """
    with file_access("write", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
