"""Reads .npz files that others may have written: arrays of numbers, their sizes compared before anything is read."""

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, open_file
from crescendo.experiments.runtime.text import in_short

MOST_BYTES = 8 << 30  # of all arrays, unpacked
# What `zipfile` raises for archives that are damaged, encrypted or of a kind that it doesn't know.
_BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, struct.error, ValueError)
_BAD_HEADER = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
)  # likewise `numpy.lib.format`


class Expected(NamedTuple):
    """What an array must be.

    Attributes:
      kinds: of the dtype, NumPy's letters, such as "iu".
      rank: how many axes.
    """

    kinds: str
    rank: int


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, by name.

    Raises:
      UserError: for what is no such file, is damaged, or unpacks to more than its own headers or `MOST_BYTES` say, and
        for arrays of objects or of numbers that aren't finite.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez_compressed(Path(folder) / "a.npz", x=np.arange(3))
    ...     read_npz(Path(folder) / "a.npz")["x"].tolist()
    [0, 1, 2]
    """
    with file_access("read", path), open_file(path) as file:
        try:
            return _arrays(file, str(path))
        except _BAD_ARCHIVE as error:
            raise UserError(f"{path} is no .npz file, or is damaged ({in_short(error)})") from error


def check_arrays(arrays: Mapping[str, np.ndarray], expected: Mapping[str, Expected], where: str) -> None:
    """Refuses arrays that are missing, that nobody expects, or that are of another kind or rank.

    >>> check_arrays({"x": np.arange(3)}, {"x": Expected("f", 1)}, "a.npz")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: a.npz: x is int64 of 1 axes: it must have 1, and a type of 'f'
    """
    if missing := sorted(set(expected) - set(arrays)):
        raise UserError(f"{where} has no array {missing[0]!r}: it has {', '.join(sorted(arrays)) or 'none'}")
    if unknown := sorted(set(arrays) - set(expected)):
        raise UserError(f"{where}: the array {unknown[0]!r} isn't understood; there may be {', '.join(expected)}")
    for name, (kinds, rank) in expected.items():
        array = arrays[name]
        if array.dtype.kind not in kinds or array.ndim != rank:
            raise UserError(
                f"{where}: {name} is {array.dtype} of {array.ndim} axes: it must have {rank}, and a type of {kinds!r}"
            )


def _arrays(file: BinaryIO, where: str) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if (total := sum(member.file_size for member in members)) > MOST_BYTES:
            raise UserError(f"{where} unpacks to {total:,} bytes, above the {MOST_BYTES:,} that it may")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays or name == member.filename:
                raise UserError(f"{where}: {member.filename!r} is there twice, or is no .npy file")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{where}: {member.filename!r} is compressed in a way that NumPy doesn't write")
            with archive.open(member) as packed:
                arrays[name] = _array(packed, member.file_size, f"{where}: {name}")
    return arrays


def _array(file: IO[bytes], size_bytes: int, where: str) -> np.ndarray:
    """One .npy file of so many bytes."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, in_fortran_order, dtype = read(file)
    except (*_BAD_HEADER, SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise UserError(f"{where} has no header of an .npy file ({in_short(error)})") from error
    if dtype.hasobject or dtype.kind not in "biufU" or not dtype.itemsize:
        raise UserError(f"{where} is of {dtype}: it must be numbers")
    size, has = math.prod(shape) * dtype.itemsize, size_bytes - file.tell()
    if size != has or min(shape, default=0) < 0 or max(shape, default=0) > MOST_BYTES:
        raise UserError(f"{where} is said to be {dtype} {list(shape)}, of {size:,} bytes, and has {has:,}")
    array = np.frombuffer(bytearray(file.read(size)), dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{where} has numbers that aren't finite")
    return array.reshape(shape, order="F" if in_fortran_order else "C")
