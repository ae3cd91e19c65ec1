"""The source text of the running interpreter's standard library: real text that is always at hand."""

import contextlib
import hashlib
import io
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.preparation import cache_root, prepared
from crescendo.experiments.data.tfds_text import tfds_text
from crescendo.experiments.runtime.errors import UserError


def stdlib_text(*, cache_directory: str | os.PathLike | None = None) -> Documents:
    """The source text of the running interpreter's standard library (about 10.8 MB), a document a file; no download.

    The TFDS builder of the same name prepares it when it is first read.

    Args:
      cache_directory: where to keep it; None for `crescendo` in $XDG_CACHE_HOME, else in ~/.cache.

    Raises:
      UserError: if this interpreter comes without its library's source; while reading, if the disk is full.

    >>> any(b"import this" in document for document in stdlib_text().read())  # doctest: +SKIP
    True
    """
    root, paths = stdlib_files()
    if not paths:
        raise UserError(f"there are no *.py files in {root}: this interpreter comes without sources; use text_files")
    folder = cache_root(cache_directory) / "stdlib_text" / stdlib_identity()

    def build(folder: Path) -> None:
        import tensorflow_datasets as tfds  # takes a second to import

        from crescendo.experiments.data.builders.stdlib import StdlibText

        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it announces a download, but there is none
                StdlibText(data_dir=folder, file_format="array_record").download_and_prepare()
        except RuntimeError as error:  # what array_record makes of a full disk
            raise OSError(str(error)) from error

    def read() -> Iterator[bytes]:
        return tfds_text("stdlib_text", data_directory=prepared(folder, build)).read()

    total_bytes = sum((root / path).stat().st_size for path in paths)
    return Documents("stdlib_text", f"stdlib_text {stdlib_identity()}", read, total_bytes)


LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages"}


@cache
def stdlib_files() -> tuple[Path, tuple[str, ...]]:
    """(folder, paths): the library's folder and the paths below it of all *.py files, sorted; no tests, no idlelib."""
    folder = Path(sysconfig.get_path("stdlib"))
    below = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return folder, tuple(sorted(path.as_posix() for path in below if LEFT_OUT.isdisjoint(path.parts)))


@cache
def stdlib_identity() -> str:
    """Names this interpreter's library, such as "cpython-3.12.1-1f0c9a7e"; last comes a hash of names and sizes."""
    folder, paths = stdlib_files()
    listing = "".join(f"{path} {(folder / path).stat().st_size}\n" for path in paths)
    digest = hashlib.blake2b(listing.encode(), digest_size=4).hexdigest()
    return f"{sys.implementation.name}-{platform.python_version()}-{digest}"
