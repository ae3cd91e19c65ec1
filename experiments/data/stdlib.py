"""Finds the source files of the running interpreter's standard library: real text that is always at hand."""

import hashlib
import platform
import sys
import sysconfig
from functools import cache
from pathlib import Path

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
