"""Prepared data on disk: built once, by one process, there only when complete, and anew when damaged."""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from crescendo.experiments.data import manifest
from crescendo.experiments.runtime import cache
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import local_path
from crescendo.pallas_kernels.console import plain_console

PROGRESS_AFTER_SECONDS = 1.0
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHOWN_EVERY_SECONDS = 0.1


def cache_root(directory: str | os.PathLike | None = None) -> Path:
    """The folder for prepared data: `directory`, or where None the project's own."""
    return cache.folder() if directory is None else local_path(directory).absolute()


def prepared(folder: Path, build: Callable[[Path], None], *, made_of: str = "", by_block: str = "") -> Path:
    """Returns `folder`, first built if it is not there, and anew if it isn't as it was built.

    `build` fills a temporary folder that is then renamed, so a process killed meanwhile leaves nothing that counts; of
    several processes one builds and the others wait for it. The lock is the kernel's and ends with its holder. What was
    built has a manifest, with which the folder is compared at every use; one without (an older version made it, or it
    was lost) can't be told from a damaged one, and is built anew too.

    Args:
      folder: where the result shall be; its name must say all that the result depends on, but for `made_of`.
      build: writes the result into the folder that it is given.
      made_of: a digest of other prepared data that the result depends on.
      by_block: see `manifest.check`.

    Raises:
      UserError: if the disk is full or can't be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as root:
      ...     folder = prepared(Path(root) / "greeting", lambda folder: (folder / "text").write_text("hello"))
      ...     (folder / "text").read_text()
      'hello'
    """
    if _problem(folder, made_of, by_block) is None:
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock")):
            if (problem := _problem(folder, made_of, by_block)) is not None:
                if problem:
                    say(f"{folder} is not as it was prepared ({problem}): preparing it anew")
                _remove(partial)
                with _own_folder(partial) as check_own:
                    build(partial)
                    check_own()
                    manifest.write(partial, made_of)
                    check_own()
                    _replace(folder, partial)
    except OSError as error:
        # Libraries that say no number have run out of room.
        way_on = "free some space there" if error.errno in (None, *NO_ROOM) else "mend that"
        raise UserError(
            f"can't prepare data in {folder.parent}: {error.strerror or error}; {way_on}, or name another folder with "
            "text_data.cache_directory or $XDG_CACHE_HOME"
        ) from error
    return folder


def _problem(folder: Path, made_of: str, by_block: str) -> str | None:
    """Why a folder can't be used; empty if it isn't there, None if it can."""
    if not os.path.lexists(folder):
        return ""
    try:
        manifest.check(folder, made_of, by_block)
    except manifest.DamagedDataError as problem:
        return str(problem)
    return None


@contextmanager
def _own_folder(path: Path) -> Iterator[Callable[[], None]]:
    """Makes a folder and gives what raises when it isn't this one any more; at the end it is gone.

    Where somebody removes the lock of a process that builds, another one begins anew in its place. While a folder is
    open its inode is nobody else's.
    """
    path.mkdir()
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def is_own() -> bool:
        return path.is_dir() and os.path.samestat(os.fstat(opened), os.stat(path))

    def check_own() -> None:
        if not is_own():
            raise UserError(
                f"another process prepares the same data in {path.parent}, since a lock there was removed: start again"
            )

    try:
        yield check_own
    finally:
        if is_own():
            _remove(path)
        os.close(opened)


def _replace(folder: Path, by: Path) -> None:
    """Another process may have the old files mapped: they are renamed and unlinked, never written."""
    old = folder.with_name(f".{folder.name}.old")
    _remove(old)
    if os.path.lexists(folder):
        folder.rename(old)
    by.rename(folder)
    _remove(old)


def _remove(path: Path) -> None:
    """A folder, or whatever stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def say(message: str) -> None:
    """A line for people, as it is."""
    plain_console(stderr=True).print(message, highlight=False, soft_wrap=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the file lock `path`, and says so if it must wait."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that prepares the same data ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def progress(description: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with each count of bytes done; on a terminal a bar appears if it takes over a second.

    >>> with progress("counting", total_bytes=10) as advance:
    ...     advance(10)
    """
    console = plain_console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(description, total=total_bytes)
    began = shown = time.monotonic()
    since = 0

    def advance(done_bytes: int) -> None:
        nonlocal shown, since
        since += done_bytes
        now = time.monotonic()
        if now - shown > SHOWN_EVERY_SECONDS:  # a bar takes longer than a small document
            bar.advance(task, since)
            shown, since = now, 0
            if now - began > PROGRESS_AFTER_SECONDS:
                bar.start()  # does nothing if already started

    try:
        yield advance
    finally:
        bar.stop()
