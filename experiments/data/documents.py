"""Documents as `text_data` takes them, and what their sources share."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from crescendo.experiments.runtime.errors import UserError


@dataclass(frozen=True)
class Documents:
    """A corpus to read: what `text_data` takes.

    Attributes:
      source: names it for people, such as "text_files a.txt".
      identity: changes whenever the documents do; names the prepared copy on disk.
      read: gives all documents, as UTF-8, in the same order at every call.
      total_bytes: about how many bytes these are, for the progress bar; None if not known.
    """

    source: str
    identity: str
    read: Callable[[], Iterator[bytes]]
    total_bytes: int | None = None


def files_identity(paths: Iterable[Path]) -> str:
    """A hash of paths, sizes and times of change: changes with the contents, without reading them."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest()


def check_utf8(text: bytes, where: str, offset: int = 0) -> bytes:
    """`text` if it is UTF-8, else a UserError that says where it isn't."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte 0x{text[error.start]:02x} at offset {offset + error.start} is not UTF-8; convert the text, "
            "for example with iconv -t UTF-8"
        ) from error
    return text
