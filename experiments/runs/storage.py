"""What stands between checkpoints and the disk: names that orbax takes for patterns, and errors by their cause."""

import errno
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from crescendo.experiments.runs.metadata import DamagedError
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import sync

# Absolute paths that epath takes for an object store's.
_STORES = ("gs", "s3", "az", "hf")
_WAYS_ON = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "it was moved or removed: put it back"),
}


class LiteralPath(type(epath.Path("/"))):  # type: ignore[misc]
    """A path in which no character has a meaning: epath's own `glob` takes the brackets of `lr[1e-3]` for a pattern.

    >>> import tempfile
    >>> folder = LiteralPath(tempfile.mkdtemp()) / "lr[1e-3]"
    >>> (folder / "a1").mkdir(parents=True)
    >>> [path.name for path in folder.glob("a*")], list(epath.Path(str(folder)).glob("a*"))
    (['a1'], [])
    """

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        """The files of a pattern below this path."""
        for found in glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern)):
            yield type(self)(found)


def check_name(folder: Path) -> None:
    """That checkpoints can be kept in a folder of this name.

    Raises:
      UserError: a name that isn't UTF-8, or a path that is taken for an object store's.
    """
    path = os.path.abspath(folder)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path!r}: the name is no UTF-8, in which checkpoints are kept: give another one") from None
    top = path.split(os.sep)[1]
    if top in _STORES:
        raise UserError(
            f"{path}: checkpoints can't be kept below /{top}, which their library takes for an object store {top}://: "
            "give a folder elsewhere, such as a link to this one, or mount the bucket elsewhere"
        )


def os_error(error: BaseException | None) -> int | None:
    """The operating system's number of what went wrong, out of what a library raised; None where it has none.

    Versions of tensorstore say it in different words; of a file that has gone some say only that.

    >>> said = "[OS error 13: EACCES Permission denied]", "[os_error_code='28']", "NOT_FOUND: Error opening"
    >>> [errno.errorcode[os_error(ValueError(text))] for text in said]
    ['EACCES', 'ENOSPC', 'ENOENT']
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"\[(?:OS error |os_error_code=')(\d+)", str(error)):
            return int(found[1])
        if str(error).startswith("NOT_FOUND: "):
            return errno.ENOENT
        error = error.__cause__ or error.__context__
    return None


def cannot_save(folder: Path, error: Exception) -> UserError | None:
    """What to say of a save that failed, with the way on that belongs to its cause; None where it isn't the disk's."""
    number = os_error(error)
    if number is None:
        return None
    way_on = _WAYS_ON.get(number, "mend that")
    return UserError(
        f"cannot save a checkpoint in {folder}: {os.strerror(number)}; {way_on}, and the same command goes on from the "
        "last one saved"
    )


def check_regular(checkpoint: Path) -> None:
    """That there are but files and folders in a checkpoint: orbax would wait for a pipe to say something.

    Raises:
      DamagedError: names what is something else.
    """
    for folder, folders, files in os.walk(checkpoint):
        for path in (Path(folder, name) for name in files):
            if path.exists() and not path.is_file():
                raise DamagedError(f"its {path.relative_to(checkpoint)} is no file")
        folders[:] = [name for name in folders if not os.path.islink(os.path.join(folder, name))]


def check_readable(checkpoint: Path, error: Exception) -> None:
    """That a checkpoint which couldn't be read is there and can be opened, so that what is in its files is the cause.

    Args:
      checkpoint: its folder.
      error: what reading it raised.

    Raises:
      UserError: names the file, and what keeps it from being read.
    """

    def refuse(cause: OSError) -> None:
        raise UserError(
            f"cannot read {cause.filename or checkpoint}: {cause.strerror or cause}; mend that, and the same command "
            "goes on"
        ) from None

    try:
        checkpoint.stat()
        for folder, _, files in os.walk(checkpoint, onerror=refuse):
            for name in files:
                os.close(os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK))
    except OSError as cause:
        refuse(cause)
    number = os_error(error)
    if number not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL):
        refuse(OSError(number, os.strerror(number), str(checkpoint)))


def sync_folder(folder: Path) -> None:
    """Has everything in a folder on the disk, whatever happens to the machine."""
    for inner, _, files in os.walk(folder):
        for name in (*files, "."):
            sync(Path(inner, name))
