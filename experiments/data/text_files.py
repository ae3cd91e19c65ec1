"""Documents of local files: .txt, .jsonl, .parquet."""

import glob
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from crescendo.experiments.data.documents import Documents, check_utf8, files_identity
from crescendo.experiments.runtime.errors import UserError

SMALLEST_DOCUMENT_BYTES = 256


def text_files(paths: str | Sequence[str], *, field: str = "text", document_bytes: int = 16384) -> Documents:
    """Local .txt, .jsonl and .parquet files in UTF-8.

    A line of a .jsonl file, or a row of a .parquet file, is a document. A .txt file is one document if it has at most
    `document_bytes` bytes; a longer one is cut into documents of about that size, after a line's end where it can be,
    so that a single large file can also be split into training and validation.

    Args:
      paths: files or globs ("**" goes into folders), in any order; they are read sorted.
      field: the field of a .jsonl line, or the column of a .parquet file, that holds the text.
      document_bytes: the most bytes of a document from a .txt file, at least 256.

    Raises:
      UserError: here, for a path that does not exist, a glob that matches no file or an unknown suffix; while reading,
        for bytes that are no UTF-8, a line that is no JSON, or a field that is missing or no text.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = (Path(folder) / "a.jsonl").write_text('{"text": "to be"}\\n{"text": "or not to be"}\\n')
      ...     list(text_files([f"{folder}/*.jsonl"]).read())
      [b'to be', b'or not to be']
    """
    if document_bytes < SMALLEST_DOCUMENT_BYTES:
        raise UserError(f"text_files.document_bytes = {document_bytes} must be at least {SMALLEST_DOCUMENT_BYTES}")
    patterns = [paths] if isinstance(paths, str) else list(paths)
    files = _find_files(patterns)
    readers: dict[str, Callable[[Path], Iterator[bytes]]] = {
        ".txt": lambda path: _read_txt(path, document_bytes),
        ".jsonl": lambda path: _read_jsonl(path, field),
        ".parquet": lambda path: _read_parquet(path, field),
    }
    for path in files:
        if path.suffix not in readers:
            raise UserError(f"{path}: unknown suffix {path.suffix!r}; text_files reads {', '.join(readers)}")

    def read() -> Iterator[bytes]:
        for path in files:
            try:
                yield from readers[path.suffix](path)
            except OSError as error:
                raise UserError(f"can't read {path}: {error.strerror or error}") from error

    identity = f"text_files {field} {document_bytes} {files_identity(files)}"
    return Documents(f"text_files {' '.join(patterns)}", identity, read, sum(path.stat().st_size for path in files))


def _find_files(patterns: Iterable[str]) -> list[Path]:
    """All files that paths and globs name, absolute, each once, sorted."""
    every: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UserError(f'text_files.paths: "{pattern}" is a folder; name its files, as in "{path}/**/*.txt"')
        matches = [path] if path.is_file() else [Path(p) for p in glob.glob(str(path), recursive=True)]
        files = {match.absolute() for match in matches if match.is_file()}
        if not files:
            problem = "matches no file" if glob.escape(pattern) != pattern else "does not exist"
            raise UserError(f'text_files.paths: "{pattern}" {problem} (looked in {Path.cwd()})')
        every |= files
    if not every:
        raise UserError("text_files.paths is empty: name at least one .txt, .jsonl or .parquet file")
    return sorted(every)


def _read_txt(path: Path, document_bytes: int) -> Iterator[bytes]:
    offset = 0
    with open(path, "rb") as file:
        for document in _cut(file, document_bytes):
            yield check_utf8(document, str(path), offset)
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


def _read_jsonl(path: Path, field: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _text_of_record(line, field, f"{path}, line {number}")


def _text_of_record(line: bytes, field: str, where: str) -> bytes:
    try:
        record = json.loads(check_utf8(line, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise UserError(f'{where} is not an object such as {{"{field}": "..."}}')
    if field not in record:
        raise UserError(_no_field(where, field, record))
    if not isinstance(record[field], str):
        raise UserError(f'{where}: field "{field}" is {type(record[field]).__name__}, not text')
    try:
        return record[field].encode()
    except UnicodeEncodeError as error:
        raise UserError(f'{where}: field "{field}" has half of a surrogate pair, which is no text') from error


def _read_parquet(path: Path, field: str) -> Iterator[bytes]:
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
                        yield check_utf8(text, f"{path}, row {row}")
                    row += 1
    except pa.ArrowException as error:
        raise UserError(f'{path}, column "{field}": {error}') from error


def _no_field(where: str, field: str, fields: Iterable[str]) -> str:
    return f'{where} has no field "{field}" (it has {", ".join(fields) or "none"}): name the text with text_files.field'
