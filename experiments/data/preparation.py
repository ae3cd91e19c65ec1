"""Prepared data on disk: built once, by one process, and there only when complete."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from crescendo.experiments.runtime import cache
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import local_path
from crescendo.pallas_kernels.console import plain_console

PROGRESS_AFTER_SECONDS = 1.0


def cache_root(directory: str | os.PathLike | None = None) -> Path:
    """The folder for prepared data: `directory`, or where None the project's own."""
    return cache.folder() if directory is None else local_path(directory).expanduser().absolute()


def prepared(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, first built if it is not there.

    `build` fills a temporary folder that is then renamed, so a process killed meanwhile leaves nothing that counts; of
    several processes one builds and the others wait for it. The lock is the kernel's and ends with its holder.

    Args:
      folder: where the result shall be; its name must say all that the result depends on.
      build: writes the result into the folder that it is given.

    Raises:
      UserError: if the disk is full or can't be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as root:
      ...     folder = prepared(Path(root) / "greeting", lambda folder: (folder / "text").write_text("hello"))
      ...     (folder / "text").read_text()
      'hello'
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    build(partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"can't prepare data in {folder.parent}: {reason}; free some space there, or name another folder with "
            "text_data.cache_directory or $XDG_CACHE_HOME"
        ) from error
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the file lock `path`, and says so if it must wait."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            plain_console(stderr=True).print(
                "waiting for another process that prepares the same data ...", highlight=False
            )
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
    began = time.monotonic()

    def advance(done_bytes: int) -> None:
        bar.advance(task, done_bytes)
        if time.monotonic() - began > PROGRESS_AFTER_SECONDS:
            bar.start()  # does nothing if already started

    try:
        yield advance
    finally:
        bar.stop()
