"""JAX's profiler at work, and the folder for its files."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access


@contextmanager
def traced(folder: Path) -> Iterator[None]:
    """Traces what runs inside; the profiler's files go under the folder (XProf, TensorBoard, Perfetto).

    Raises:
      UserError: the folder can't be written, or the disk fills up.
    """
    check_writable(folder)
    jax.profiler.start_trace(str(folder))
    try:
        yield
    finally:
        try:
            jax.profiler.stop_trace()
        except jax.errors.JaxRuntimeError as error:  # its files are written by C++
            raise UserError(f"cannot write the profile to {folder}: {error}; mend that or choose another") from error


def check_writable(folder: Path) -> None:
    """Makes a folder, or raises a `UserError` where files can't be made in it: the profiler would say so at its end.

    >>> check_writable(Path("/proc/profile"))
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: cannot write /proc/profile: No such file or directory; mend ...
    """
    with file_access("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
