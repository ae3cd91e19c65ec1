"""Documents of local files: .txt, .md, .json, .jsonl, as they are or in .gz or .zst, .parquet and .arrow."""

import contextlib
import dataclasses
import glob
import io
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

from annotated_types import Ge, Le

from crescendo.experiments.data.documents import (
    MOST_DOCUMENT_BYTES,
    Documents,
    Utf8,
    digest,
    file_digests,
    refuse_longer,
)
from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.runtime.encoding import BEGIN_BYTES, without_mark
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, local_path
from crescendo.experiments.runtime.text import in_short

SMALLEST_DOCUMENT_BYTES = 256
FORMAT = 2  # of the documents that are made of files: part of their identity, to be raised when they change
MOST_JSON_BYTES = 1 << 30  # of a .json file, unpacked
PARQUET_BATCH_BYTES = 32 << 20  # of text that is decoded at a time
ARROW_ROWS = 1000  # that are decoded at a time, of a batch as a file has it
COLUMNS = (".parquet", ".arrow")  # by suffix: compressed within, if at all
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # by suffix, as Arrow calls them


@checked
def text_files(
    paths: str | Sequence[str],
    *,
    validation_paths: str | Sequence[str] | Mapping[str, str | Sequence[str]] = (),
    field: str = "text",
    document_bytes: Annotated[int, Ge(SMALLEST_DOCUMENT_BYTES), Le(MOST_DOCUMENT_BYTES)] = 16384,
    errors: Literal["strict", "replace"] = "strict",
) -> Documents:
    """Local text files in UTF-8, with or without a byte order mark; .gz and .zst are unpacked as they are read.

    A .txt or .md file is one document if it has at most `document_bytes` bytes; a longer one is cut into documents of
    about that size, after a line's end where it can be, so that a single large file can also be split into training and
    validation. A line of a .jsonl file, or a row of a .parquet or .arrow file (as Hugging Face writes data sets), is
    a document, unless its text is null. A .json file is a list of documents, strings or objects with a text, or an
    object that holds one such list; one with an object a line is read as .jsonl is.

    A file is read once however many paths and links lead to it. The order is that of the files' names, and of their
    contents where names are equal: a corpus in another folder is the same corpus.

    Args:
      paths: files or globs ("**" goes into folders), in any order.
      validation_paths: files to validate on, none of which is trained on even where `paths` name it; or several
        held-out sets by name, such as {"validation": "old/*.txt", "news": "news/*.txt"}. Where none is called
        "validation", that set is split off from the documents as ever.
      field: the field of an object, or the column of a .parquet or .arrow file, that holds the text.
      document_bytes: the most bytes of a document from a .txt or .md file, at least 256; no document of any file may
        have more than 128 MiB, and no .json file more than 1 GiB.
      errors: "strict" refuses bytes that are not UTF-8; with "replace" U+FFFD stands for them, and how often is said.

    Raises:
      UserError: here, for a path that does not exist, a glob that matches no file or an unknown suffix; while reading,
        for bytes that are no UTF-8, damaged archives, what is no JSON, a field that is missing or no text, or files
        that change.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = (Path(folder) / "a.jsonl").write_text('{"text": "to be"}\\n{"text": "or not to be"}\\n')
      ...     list(text_files([f"{folder}/*.jsonl"]).read())
      [b'to be', b'or not to be']
    """
    Utf8("text_files", errors)  # refuses what it doesn't know
    reading = _Reading(field, document_bytes, errors)
    named = validation_paths if isinstance(validation_paths, Mapping) else {"validation": validation_paths}
    sets = {name: _as_list(each) for name, each in named.items() if each or isinstance(validation_paths, Mapping)}
    held_out = {name: _find_files(each, "text_files.validation_paths") for name, each in sets.items()}
    held = {real for files in held_out.values() for real in files}
    found = _find_files(_as_list(paths), "text_files.paths")
    files = {real: file for real, file in found.items() if real not in held}
    if not files:
        raise UserError("text_files.paths: text_files.validation_paths name all of these files: leave some to train on")
    further = {name: _documents(each, sets[name], reading) for name, each in held_out.items()}
    return dataclasses.replace(_documents(files, _as_list(paths), reading), held_out=further)


class _Reading(NamedTuple):
    """How files are read: see `text_files`."""

    field: str
    document_bytes: int
    errors: Literal["strict", "replace"]


def _as_list(paths: str | Sequence[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)


def _documents(found: Mapping[tuple[int, int], Path], patterns: Sequence[str], reading: _Reading) -> Documents:
    """The documents of files that were found by the patterns, by what they really are."""
    files = [*found.values()]
    for path in files:
        if _kind(path) not in _READERS:
            unpacked = [kind for kind in _READERS if kind not in COLUMNS]
            raise UserError(
                f"{path}: unknown suffix {''.join(path.suffixes[-2:])!r}; text_files reads {', '.join(_READERS)}, and "
                f"{', '.join(unpacked)} in {' or '.join(COMPRESSIONS)}"
            )
    digests = _digests(files)
    ordered = sorted(files, key=lambda path: (path.name, digests[path]))
    source = f"text_files {' '.join(patterns)}"

    def read() -> Iterator[bytes]:
        utf8 = Utf8("text_files", reading.errors)
        for path in ordered:
            try:
                yield from _READERS[_kind(path)](path, reading, utf8)
            except OSError as error:
                if path.suffix in COMPRESSIONS and error.errno is None:
                    raise UserError(
                        f"{path} can't be decompressed ({in_short(error)}): get the file again, or unpack it yourself"
                    ) from error
                raise UserError(f"can't read {path}: {error.strerror or in_short(error)}") from error
        if _digests(files) != digests:
            raise UserError(f"{source}: files changed while they were read; start again")
        utf8.report(source)

    # Of a name only the suffixes decide what is read.
    kinds = [(_kind(path) + path.suffix * (path.suffix in COMPRESSIONS), digests[path]) for path in ordered]
    content = [FORMAT, reading.field, reading.document_bytes, reading.errors, kinds]
    packed = any(path.suffix in COMPRESSIONS for path in files)
    total_bytes = None if packed else sum(path.stat().st_size for path in files)
    return Documents(source, f"text_files {digest(content)}", read, total_bytes, files=found)


def _kind(path: Path) -> str:
    """The suffix that says what is in a file, unpacked; those of `COLUMNS` aren't packed."""
    if path.suffix not in COMPRESSIONS:
        return path.suffix
    unpacked = path.with_suffix("").suffix
    return unpacked if unpacked not in COLUMNS else "".join(path.suffixes[-2:])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's content, unpacked; what is wrong with an archive is an OSError without a number."""
    if path.suffix not in COMPRESSIONS:
        with open(path, "rb") as file:
            yield file
        return
    import pyarrow as pa  # takes a second to import

    with io.BufferedReader(pa.input_stream(str(path), compression=COMPRESSIONS[path.suffix])) as file:
        yield file


def _digests(files: Sequence[Path]) -> dict[Path, str]:
    """A hash of each file's content."""
    try:
        return dict(zip(files, file_digests(files), strict=True))
    except OSError as error:
        raise UserError(f"can't read {error.filename}: {error.strerror or error}") from error


def _find_files(patterns: Iterable[str], setting: str) -> dict[tuple[int, int], Path]:
    """All files that the paths and globs of a setting name, absolute, by what they really are, sorted.

    Raises:
      UserError: what isn't there, can't be read, or is no file.
    """
    every: dict[tuple[int, int], Path] = {}  # whatever links lead there
    for pattern in patterns:
        try:
            path = local_path(pattern)
        except UserError as error:
            raise UserError(f"{setting}: {error}") from None
        if os.path.isdir(path):
            raise UserError(f'{setting}: "{pattern}" is a folder; name its files, as in "{path}/**/*.txt"')
        files = []
        for match in [path] if os.path.lexists(path) else _matches(path):
            try:
                about = match.stat()
            except OSError as error:
                problem = "is a link to nothing" if match.is_symlink() else f"can't be read ({error.strerror})"
                raise UserError(f"{setting}: {match} {problem}: mend it, or remove it") from None
            if stat.S_ISDIR(about.st_mode):
                continue
            if not stat.S_ISREG(about.st_mode):
                raise UserError(f"{setting}: {match} is a pipe or a device: copy what it gives to a file")
            files.append(match)
            real, file = (about.st_dev, about.st_ino), match.absolute()
            every[real] = min(every.get(real, file), file, key=lambda path: (path.name, path))
        if not files:
            problem = "matches no file" if glob.escape(pattern) != pattern else "does not exist"
            raise UserError(f'{setting}: "{pattern}" {problem} (looked in {Path.cwd()})')
    if not every:
        raise UserError(f"{setting} is empty: name at least one {', '.join(_READERS)} file")
    return dict(sorted(every.items(), key=lambda item: item[1]))


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


def _read_text(path: Path, reading: _Reading, utf8: Utf8) -> Iterator[bytes]:
    with _opened(path) as file:
        begin = file.read(BEGIN_BYTES)
        rest = without_mark(begin, str(path))
        offset = len(begin) - len(rest)
        for document in _cut(rest, file, reading.document_bytes):
            yield utf8(document, str(path), offset)
            offset += len(document)


def _cut(rest: bytes, file: BinaryIO, most_bytes: int) -> Iterator[bytes]:
    """Consecutive parts of a file, each ending after its last line end, else its last space, else a whole character.

    Args:
      rest: the begin, which was read already.
      file: what follows.
      most_bytes: of a part.
    """
    rest += file.read(most_bytes + 1 - len(rest))  # a byte more than fits tells whether the file goes on
    while len(rest) > most_bytes:
        cut = rest.rfind(b"\n", 0, most_bytes) + 1 or rest.rfind(b" ", 0, most_bytes) + 1
        if not cut:  # a UTF-8 character has at most three continuation bytes, 0b10xxxxxx
            cut = next((at for at in range(most_bytes, most_bytes - 4, -1) if rest[at] & 0xC0 != 0x80), most_bytes)
        yield rest[:cut]
        rest = rest[cut:] + file.read(cut)
    yield rest


def _lines(path: Path, file: BinaryIO, utf8: Utf8) -> Iterator[tuple[str, str]]:
    """`(where, text)` of every line that isn't blank; of a line that is too long no more is read."""
    for number, line in enumerate(iter(lambda: file.readline(MOST_DOCUMENT_BYTES + 1), b""), start=1):
        where = f"{path}, line {number}"
        text = utf8(without_mark(line, where), where).decode()  # files put together have marks inside
        if text.strip():
            yield where, text


def _read_jsonl(path: Path, reading: _Reading, utf8: Utf8) -> Iterator[bytes]:
    with _opened(path) as file:
        for where, line in _lines(path, file, utf8):
            yield from _document(_parsed(line, where), reading.field, where, utf8)


def _read_json(path: Path, reading: _Reading, utf8: Utf8) -> Iterator[bytes]:
    if _begins_with_an_object_a_line(path):
        yield from _read_jsonl(path, reading, utf8)
        return
    with _opened(path) as file:
        chunks, size = [], 0
        while chunk := file.read(1 << 20):
            chunks.append(chunk)
            size += len(chunk)
            if size > MOST_JSON_BYTES:
                raise UserError(
                    f"{path} has more than the {MOST_JSON_BYTES:,} bytes that a .json file may have, since it is read "
                    "as a whole: write an object a line, as .jsonl"
                )
    text = utf8.mended(without_mark(b"".join(chunks), str(path)), str(path)).decode()
    yield from _documents_in(_parsed(text, str(path)) if text.strip() else [], path, reading.field, utf8)


def _begins_with_an_object_a_line(path: Path) -> bool:
    """Whether a .json file is one of lines, as .jsonl is: its first two that aren't blank tell."""
    try:
        with _opened(path) as file:
            lines = _lines(path, file, Utf8("text_files", "replace"))
            begin = [line for _, line in itertools.islice(lines, 2)]
    except UserError:  # a line that is too long, for one
        return False
    return len(begin) == 2 and _is_object(begin[0])


def _is_object(line: str) -> bool:
    with contextlib.suppress(UserError):
        return isinstance(_parsed(line, ""), dict)
    return False


def _documents_in(content: Any, path: Path, field: str, utf8: Utf8) -> Iterator[bytes]:
    """Those of a whole JSON file."""
    if isinstance(content, dict) and field not in content:
        lists = [entry for entry in content.values() if isinstance(entry, list)]
        if not lists:
            raise UserError(_no_field(str(path), field, content))
        if len(lists) > 1:
            raise UserError(
                f"{path} is an object with {len(lists)} lists, which doesn't say where the documents are: write them "
                "as a list, or an object a line"
            )
        content = lists[0]
    for number, record in enumerate(content if isinstance(content, list) else [content], start=1):
        where = f"{path}, document {number}"
        if isinstance(record, str):
            yield utf8.encoded(record, where)
        elif record is not None:
            yield from _document(record, field, where, utf8)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where} is not JSON: {error.msg} at {line}column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number, or a nesting, beyond what Python reads
        raise UserError(f"{where} can't be read as JSON: {error}") from error


def _document(record: Any, field: str, where: str, utf8: Utf8) -> Iterator[bytes]:
    """The text of an object, if it isn't null."""
    if not isinstance(record, dict):
        raise UserError(f'{where} is not an object such as {{"{field}": "..."}}')
    if field not in record:
        raise UserError(_no_field(where, field, record))
    if record[field] is None:
        return
    if not isinstance(record[field], str):
        raise UserError(f'{where}: field "{field}" is {type(record[field]).__name__}, not text')
    yield utf8.encoded(record[field], f'{where}: field "{field}"')


def _read_parquet(path: Path, reading: _Reading, utf8: Utf8) -> Iterator[bytes]:
    import pyarrow as pa  # takes a second to import
    import pyarrow.parquet as pq

    field = reading.field
    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(_no_field(str(path), field, file.schema_arrow.names))
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_rows_at_a_time(file, group, path, field), [group], [field]):
                    for text in batch.column(0).cast(pa.large_binary()):
                        if text.is_valid:
                            yield utf8(text.as_py(), f"{path}, row {row}")
                        row += 1
    except pa.ArrowException as error:
        raise UserError(f'{path}, column "{field}": {in_short(error)}') from error


def _rows_at_a_time(file: Any, group: int, path: Path, field: str) -> int:
    """How many rows of a group have about `PARQUET_BATCH_BYTES` of text, by the file's own account.

    Raises:
      UserError: where a row must be longer than a document may be.
    """
    about = file.metadata.row_group(group)
    columns = (about.column(number) for number in range(about.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
    each = size // max(1, about.num_rows)
    refuse_longer(each // 2, f"{path}, row group {group}, by its mean a row")  # what isn't text counts too
    return min(max(PARQUET_BATCH_BYTES // max(1, each), 1), 65536)


def _read_arrow(path: Path, reading: _Reading, utf8: Utf8) -> Iterator[bytes]:
    """Arrow's format for streams or for files: rows in batches, none of which is read whole."""
    import pyarrow as pa  # takes a second to import

    field = reading.field
    try:
        with pa.memory_map(str(path)) as file:
            in_stream = file.read(6) != b"ARROW1"
            file.seek(0)
            source: Any = pa.ipc.open_stream(file) if in_stream else pa.ipc.open_file(file)
            if field not in (names := source.schema.names):
                raise UserError(_no_field(str(path), field, names))
            batches = source if in_stream else map(source.get_batch, range(source.num_record_batches))
            row = 0
            for batch in batches:
                column = batch.column(names.index(field))
                column.validate(full=True)  # what a file says of its own offsets needn't be so
                for begin in range(0, len(column), ARROW_ROWS):
                    for text in column.slice(begin, ARROW_ROWS).cast(pa.large_binary()):
                        if text.is_valid:
                            yield utf8(text.as_py(), f"{path}, row {row}")
                        row += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter of a column's name
        raise UserError(f'{path}, column "{field}": {in_short(error)}') from error


_READERS: dict[str, Callable[[Path, _Reading, Utf8], Iterator[bytes]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _no_field(where: str, field: str, fields: Iterable[str]) -> str:
    return f'{where} has no field "{field}" (it has {", ".join(fields) or "none"}): name the text with text_files.field'
