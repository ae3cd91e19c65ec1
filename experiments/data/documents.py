"""Documents as `text_data` takes them, and what their sources share."""

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from crescendo.experiments.data.preparation import progress, say
from crescendo.experiments.runtime import cache, schemas
from crescendo.experiments.runtime.encoding import check_utf8
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import open_file, replace_file, to_json

REPLACEMENT = "\ufffd"
MOST_DOCUMENT_BYTES = 128 << 20  # of a document, and of a line of JSON: a few times as much memory is needed at once
SETTLED_SECONDS = 2.0  # a file changed more lately may change again within a tick of its file system's clock


@dataclass(frozen=True)
class Documents:
    """A corpus to read: what `text_data` takes.

    Attributes:
      source: names it for people, such as "text_files a.txt".
      identity: changes whenever the documents do; names the prepared copy on disk.
      read: gives all documents, as UTF-8, in the same order at every call.
      total_bytes: about how many bytes these are, for the progress bar; None if not known.
      held_out: corpora to evaluate on, by name; where "validation" is one, none of the documents is held out for it.
      files: that are read whole, by device and inode, so that no two sources of a mixture read the same.
    """

    source: str
    identity: str
    read: Callable[[], Iterator[bytes]]
    total_bytes: int | None = None
    held_out: Mapping[str, "Documents"] | None = None
    files: Mapping[tuple[int, int], Path] = MappingProxyType({})


def file_digests(paths: Sequence[Path]) -> list[str]:
    """A hash of each file's content, wherever the file lies.

    To read a large corpus at every start would take minutes, so hashes are kept in the project's cache for as long as
    the file system says the same of all these files: which they are, their sizes, and their times, of which that of the
    inode (ctime) can't be set back.

    Raises:
      UserError: for what is no file.
      OSError: for a file that can't be read.
    """
    stats = [(os.path.realpath(path), path.stat()) for path in paths]
    facts = [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]
    known = cache.folder() / "digests" / f"{digest(facts)}.json"
    with contextlib.suppress(UserError):  # not there, or damaged
        kept = schemas.read(known, _Digests)
        if kept.digest == digest(kept.files) and len(kept.files) == len(paths):
            return kept.files
    digests = []
    now = time.time()
    with progress(f"hashing {len(paths)} files", sum(s.st_size for _, s in stats)) as advance:
        for path, (_, stat) in zip(paths, stats, strict=True):
            with open_file(path) as file:
                digests.append(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest())
            advance(stat.st_size)
    if all(s.st_ctime < now - SETTLED_SECONDS for _, s in stats):
        with contextlib.suppress(OSError):  # a cache that can't be written only costs time
            known.parent.mkdir(parents=True, exist_ok=True)
            replace_file(known, to_json({"files": digests, "digest": digest(digests)}))
    return digests


class _Digests(schemas.Schema):
    """Kept hashes of files, and a hash of these."""

    files: list[str]
    digest: str


def digest(content: object) -> str:
    """A hash of what JSON can hold."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def refuse_longer(size_bytes: int, where: str) -> None:
    """Raises a UserError for more than `MOST_DOCUMENT_BYTES`.

    >>> refuse_longer(2**31, "a.jsonl, line 2")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: a.jsonl, line 2 has more than the 134,217,728 bytes that a ...
    """
    if size_bytes > MOST_DOCUMENT_BYTES:
        raise UserError(
            f"{where} has more than the {MOST_DOCUMENT_BYTES:,} bytes that a document may have: split it, or write it "
            "as a .txt file, which is cut into documents"
        )


class Utf8:
    """Holds documents to UTF-8: what isn't is an error that says where, or is replaced and counted.

    Args:
      source: the function that configs name, such as "text_files".
      errors: "strict" or "replace"; of the latter U+FFFD stands for what isn't UTF-8.

    Attributes:
      replaced: how often something was.

    >>> utf8 = Utf8("text_files", "replace")
    >>> utf8(b"to \\xff be", "a.txt").decode(), utf8.replaced
    ('to \ufffd be', 1)
    """

    def __init__(self, source: str, errors: Literal["strict", "replace"]):
        if errors not in ("strict", "replace"):
            raise UserError(f"{source}.errors = {errors!r} must be 'strict' or 'replace'")
        self._strict, self._way_on = errors == "strict", f", or set {source}.errors = 'replace'"
        self.replaced = 0
        self._first = ""

    def __call__(self, content: bytes, where: str, offset: int = 0) -> bytes:
        """The document.

        Args:
          content: its bytes.
          where: names what holds it.
          offset: of the content there.

        Raises:
          UserError: what isn't UTF-8, where errors are strict, and what is longer than a document may be.
        """
        refuse_longer(len(content), where)
        return self.mended(content, where, offset)

    def mended(self, content: bytes, where: str, offset: int = 0) -> bytes:
        """The same of what is no document, but holds some."""
        if self._strict:
            return check_utf8(content, where, offset=offset, way_on=self._way_on)
        text = content.decode(errors="replace").encode()
        self._count(text.count(REPLACEMENT.encode()) - content.count(REPLACEMENT.encode()), where)
        return text

    def encoded(self, text: str, where: str) -> bytes:
        """A text that is decoded already, such as JSON's, in which there may be half of a surrogate pair."""
        try:
            content = text.encode()
            refuse_longer(len(content), where)
            return content
        except UnicodeEncodeError as error:
            if self._strict:
                raise UserError(f"{where} has half of a surrogate pair, which is no text{self._way_on}") from error
        mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        self._count(mended.count(REPLACEMENT) - text.count(REPLACEMENT), where)
        return mended.encode()

    def report(self, source: str) -> None:
        """Says how much was replaced, once for each source."""
        if self.replaced:
            times = f"{self.replaced:,} time{'s' * (self.replaced > 1)}"
            _say_once(f"note: {source}: U+FFFD stands {times} for what is not UTF-8, first in {self._first}")

    def _count(self, number: int, where: str) -> None:
        self.replaced += number
        if number and not self._first:
            self._first = where


_say_once = functools.cache(say)
