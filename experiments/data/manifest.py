"""The manifest of prepared data: what a folder holds, with a checksum for every block of every file.

A flipped bit or a zeroed block in a memory-mapped array would be trained on without a word, and a file that is missing
may change what the others mean. Files are compared when their folder is opened; large ones of which little is read then
a block at a time, when it is first read.
"""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
import pydantic

from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import open_file, to_json

NAME = "manifest.json"
BLOCK_BYTES = 256 << 10  # a CRC-32 finds any error of up to 32 bits in a row, and misses one of 2**32 of the others
LARGE_BYTES = 256 << 20  # takes less than a tenth of a second

_Count = Annotated[int, pydantic.Field(ge=0)]


class _File(schemas.Schema):
    """Its size, and the CRC-32 of each block."""

    bytes: _Count
    blocks: list[_Count]


class _Manifest(schemas.Schema):
    """Of a folder: the files by their paths in it, and the digest of what they were made of."""

    version: Literal[1]
    made_of: str
    files: dict[str, _File]


class DamagedDataError(Exception):
    """What is on disk isn't what was written."""


def write(folder: Path, made_of: str = "") -> None:
    """Writes the manifest of all files in a folder.

    Args:
      folder: is complete but for that.
      made_of: a digest of what the files were made of, where the folder's name doesn't say it.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            blocks = [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")]
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "blocks": blocks}
    (folder / NAME).write_bytes(to_json({"version": 1, "made_of": made_of, "files": files}))


def check(folder: Path, made_of: str = "", by_block: str = "") -> None:
    """Compares a folder with its manifest: the files, their sizes, their blocks.

    Args:
      folder: as `write` left it.
      made_of: what its files should be made of.
      by_block: a pattern; of files with such a name and more than `LARGE_BYTES` only the first block is compared, the
        others by `Blocks`.

    Raises:
      DamagedDataError: says what differs.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     _ = (Path(name) / "text").write_text("to be")
    ...     write(Path(name))
    ...     check(Path(name))
    ...     _ = (Path(name) / "text").write_text("to me")
    ...     check(Path(name))
    Traceback (most recent call last):
    ...
    crescendo.experiments.data.manifest.DamagedDataError: text isn't what was written at byte 0
    """
    manifest = _read(folder)
    if manifest.made_of != made_of:
        raise DamagedDataError("it was made of other data")
    for name, about in manifest.files.items():
        with _opened(folder, name, about) as file:
            later = about.bytes > LARGE_BYTES and fnmatch(name, by_block)
            for number, crc in enumerate(about.blocks[: 1 if later else None]):
                _compare(file, name, number, crc)


class Blocks:
    """The blocks of an array's file that were not compared yet.

    Args:
      folder: see `check`.
      name: of an .npy file in it that is compared by block if it is large.
      array: the file, memory-mapped.
    """

    def __init__(self, folder: Path, name: str, array: np.memmap):
        self._folder, self._name = folder, name
        self._header_bytes, self._item_bytes = array.offset, array.itemsize
        self._file = _read(folder).files[name]
        self._right = np.full(len(self._file.blocks), self._file.bytes <= LARGE_BYTES)
        self._right[:1] = True

    def check(self, begins: np.ndarray, ends: np.ndarray) -> None:
        """Compares the blocks that hold the array's entries of some ranges, where that wasn't done.

        Args:
          begins: of the ranges, int64.
          ends: behind them, each larger than its begin.

        Raises:
          UserError: if a block isn't what was written. The manifest is removed, so that the data are prepared anew.
        """
        if self._right.all():
            return
        first = (self._header_bytes + begins * self._item_bytes) // BLOCK_BYTES
        last = (self._header_bytes + ends * self._item_bytes - 1) // BLOCK_BYTES
        needed = np.zeros(len(self._right) + 1, np.int64)
        np.add.at(needed, first, 1)
        np.add.at(needed, last + 1, -1)
        numbers = np.flatnonzero((np.cumsum(needed[:-1]) > 0) & ~self._right)
        if not len(numbers):
            return
        try:
            with _opened(self._folder, self._name, self._file) as file:
                for number in numbers.tolist():
                    _compare(file, self._name, number, self._file.blocks[number])
                    self._right[number] = True
        except DamagedDataError as problem:
            (self._folder / NAME).unlink(missing_ok=True)
            raise UserError(
                f"prepared data in {self._folder} are damaged ({problem}): the same command prepares them anew and "
                "goes on from the last checkpoint"
            ) from None


def _read(folder: Path) -> _Manifest:
    """Of a folder.

    Raises:
      DamagedDataError: if there is none, or it is damaged itself.
    """
    if not os.path.lexists(folder / NAME):
        raise DamagedDataError(f"there is no {NAME}, which tells whether data are whole")
    try:
        return schemas.read(folder / NAME, _Manifest)
    except UserError as error:
        raise DamagedDataError(str(error).removeprefix(f"{folder}/")) from None


@contextmanager
def _opened(folder: Path, name: str, about: _File) -> Iterator[BinaryIO]:
    """A file, if its size is right; what can't be read of it is damaged."""
    try:
        with open_file(folder / name) as file:
            if (size := os.fstat(file.fileno()).st_size) != about.bytes:
                raise DamagedDataError(f"{name} has {size:,} bytes and had {about.bytes:,}")
            yield file
    except FileNotFoundError:
        raise DamagedDataError(f"{name} is missing") from None
    except OSError as error:
        raise DamagedDataError(f"{name} can't be read: {error.strerror or error}") from None
    except UserError as error:
        raise DamagedDataError(str(error).removeprefix(f"{folder}/")) from None


def _compare(file: BinaryIO, name: str, number: int, crc: int) -> None:
    """One block; by a read and not through the memory map, where a bad sector would end the process."""
    if zlib.crc32(os.pread(file.fileno(), BLOCK_BYTES, number * BLOCK_BYTES)) != crc:
        raise DamagedDataError(f"{name} isn't what was written at byte {number * BLOCK_BYTES:,}")
