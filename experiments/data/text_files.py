"""Documents of local files: .txt, .jsonl, .parquet."""

import glob
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from crescendo.experiments.data.documents import Documents, Utf8, digest, file_digests
from crescendo.experiments.runtime.encoding import BEGIN_BYTES, without_mark
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access

SMALLEST_DOCUMENT_BYTES = 256
FORMAT = 2  # of the documents that are made of files: part of their identity, to be raised when they change


def text_files(
    paths: str | Sequence[str],
    *,
    field: str = "text",
    document_bytes: int = 16384,
    errors: Literal["strict", "replace"] = "strict",
) -> Documents:
    """Local .txt, .jsonl and .parquet files in UTF-8, with or without a byte order mark.

    A line of a .jsonl file, or a row of a .parquet file, is a document, unless its text is null. A .txt file is one
    document if it has at most `document_bytes` bytes; a longer one is cut into documents of about that size, after a
    line's end where it can be, so that a single large file can also be split into training and validation.

    A file is read once however many paths and links lead to it. The order is that of the files' names, and of their
    contents where names are equal: a corpus in another folder is the same corpus.

    Args:
      paths: files or globs ("**" goes into folders), in any order.
      field: the field of a .jsonl line, or the column of a .parquet file, that holds the text.
      document_bytes: the most bytes of a document from a .txt file, at least 256.
      errors: "strict" refuses bytes that are not UTF-8; with "replace" U+FFFD stands for them, and how often is said.

    Raises:
      UserError: here, for a path that does not exist, a glob that matches no file or an unknown suffix; while reading,
        for bytes that are no UTF-8, a line that is no JSON, a field that is missing or no text, or files that change.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = (Path(folder) / "a.jsonl").write_text('{"text": "to be"}\\n{"text": "or not to be"}\\n')
      ...     list(text_files([f"{folder}/*.jsonl"]).read())
      [b'to be', b'or not to be']
    """
    if document_bytes < SMALLEST_DOCUMENT_BYTES:
        raise UserError(f"text_files.document_bytes = {document_bytes} must be at least {SMALLEST_DOCUMENT_BYTES}")
    Utf8("text_files", errors)  # refuses what it doesn't know
    patterns = [paths] if isinstance(paths, str) else list(paths)
    readers: dict[str, Callable[[Path, Utf8], Iterator[bytes]]] = {
        ".txt": lambda path, utf8: _read_txt(path, document_bytes, utf8),
        ".jsonl": lambda path, utf8: _read_jsonl(path, field, utf8),
        ".parquet": lambda path, utf8: _read_parquet(path, field, utf8),
    }
    files = _find_files(patterns)
    for path in files:
        if path.suffix not in readers:
            raise UserError(f"{path}: unknown suffix {path.suffix!r}; text_files reads {', '.join(readers)}")
    digests = _digests(files)
    ordered = sorted(files, key=lambda path: (path.name, digests[path]))
    source = f"text_files {' '.join(patterns)}"

    def read() -> Iterator[bytes]:
        utf8 = Utf8("text_files", errors)
        for path in ordered:
            try:
                yield from readers[path.suffix](path, utf8)
            except OSError as error:
                raise UserError(f"can't read {path}: {error.strerror or error}") from error
        if _digests(files) != digests:
            raise UserError(f"{source}: files changed while they were read; start again")
        utf8.report(source)

    # Of a name only the suffix decides what is read.
    content = [FORMAT, field, document_bytes, errors, [(path.suffix, digests[path]) for path in ordered]]
    return Documents(source, f"text_files {digest(content)}", read, sum(path.stat().st_size for path in files))


def _digests(files: Sequence[Path]) -> dict[Path, str]:
    """A hash of each file's content."""
    try:
        return dict(zip(files, file_digests(files), strict=True))
    except OSError as error:
        raise UserError(f"can't read {error.filename}: {error.strerror or error}") from error


def _find_files(patterns: Iterable[str]) -> list[Path]:
    """All files that paths and globs name, absolute, each once, sorted.

    Raises:
      UserError: what isn't there, can't be read, or is no file.
    """
    every: dict[tuple[int, int], Path] = {}  # by what they really are, whatever links lead there
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if os.path.isdir(path):
            raise UserError(f'text_files.paths: "{pattern}" is a folder; name its files, as in "{path}/**/*.txt"')
        files = []
        for match in [path] if os.path.lexists(path) else _matches(path):
            try:
                about = match.stat()
            except OSError as error:
                problem = "is a link to nothing" if match.is_symlink() else f"can't be read ({error.strerror})"
                raise UserError(f"text_files.paths: {match} {problem}: mend it, or remove it") from None
            if stat.S_ISDIR(about.st_mode):
                continue
            if not stat.S_ISREG(about.st_mode):
                raise UserError(f"text_files.paths: {match} is a pipe or a device: copy what it gives to a file")
            files.append(match)
            real, file = (about.st_dev, about.st_ino), match.absolute()
            every[real] = min(every.get(real, file), file, key=lambda path: (path.name, path))
        if not files:
            problem = "matches no file" if glob.escape(pattern) != pattern else "does not exist"
            raise UserError(f'text_files.paths: "{pattern}" {problem} (looked in {Path.cwd()})')
    if not every:
        raise UserError("text_files.paths is empty: name at least one .txt, .jsonl or .parquet file")
    return sorted(every.values())


def _matches(pattern: Path) -> Iterator[Path]:
    """What a glob names, but that "**" doesn't go in circles: a link to a folder that it is in leads nowhere."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    at = pattern.parts.index("**")
    for base in glob.glob(str(Path(*pattern.parts[:at]))):
        for folder in _folders(Path(base)):
            yield from _matches(Path(glob.escape(str(folder)), *(pattern.parts[at + 1 :] or "*")))


def _folders(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """A folder and those below it that aren't hidden.

    Args:
      folder: where to begin.
      above: what the folders that it is in really are.

    Raises:
      UserError: for one that can't be read, which would leave out documents.
    """
    real = os.path.realpath(folder)
    if real in above or not os.path.isdir(folder):
        return
    yield folder
    with file_access("read", folder):
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    for name in names:
        yield from _folders(folder / name, above | {real})


def _read_txt(path: Path, document_bytes: int, utf8: Utf8) -> Iterator[bytes]:
    with open(path, "rb") as file:
        begin = file.read(BEGIN_BYTES)
        offset = len(begin) - len(without_mark(begin, str(path)))
        file.seek(offset)
        for document in _cut(file, document_bytes):
            yield utf8(document, str(path), offset)
            offset += len(document)


def _cut(file: BinaryIO, most_bytes: int) -> Iterator[bytes]:
    """Consecutive parts of a file, each ending after its last line end, else its last space, else a whole character."""
    rest = file.read(most_bytes + 1)  # a byte more than fits tells whether the file goes on
    while len(rest) > most_bytes:
        cut = rest.rfind(b"\n", 0, most_bytes) + 1 or rest.rfind(b" ", 0, most_bytes) + 1
        if not cut:  # a UTF-8 character has at most three continuation bytes, 0b10xxxxxx
            cut = next((at for at in range(most_bytes, most_bytes - 4, -1) if rest[at] & 0xC0 != 0x80), most_bytes)
        yield rest[:cut]
        rest = rest[cut:] + file.read(cut)
    yield rest


def _read_jsonl(path: Path, field: str, utf8: Utf8) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            text = utf8(without_mark(line, where), where).decode()  # files put together have marks inside
            if text.strip():
                document = _text_of_record(text, field, where, utf8)
                if document is not None:
                    yield document


def _text_of_record(line: str, field: str, where: str, utf8: Utf8) -> bytes | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number, or a nesting, beyond what Python reads
        raise UserError(f"{where} can't be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f'{where} is not an object such as {{"{field}": "..."}}')
    if field not in record:
        raise UserError(_no_field(where, field, record))
    if record[field] is None:
        return None
    if not isinstance(record[field], str):
        raise UserError(f'{where}: field "{field}" is {type(record[field]).__name__}, not text')
    return utf8.encoded(record[field], f'{where}: field "{field}"')


def _read_parquet(path: Path, field: str, utf8: Utf8) -> Iterator[bytes]:
    import pyarrow as pa  # takes a second to import
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(_no_field(str(path), field, file.schema_arrow.names))
            row = 0
            for batch in file.iter_batches(columns=[field]):
                for text in batch.column(0).cast(pa.binary()).to_pylist():
                    if text is not None:
                        yield utf8(text, f"{path}, row {row}")
                    row += 1
    except pa.ArrowException as error:
        raise UserError(f'{path}, column "{field}": {error}') from error


def _no_field(where: str, field: str, fields: Iterable[str]) -> str:
    return f'{where} has no field "{field}" (it has {", ".join(fields) or "none"}): name the text with text_files.field'
