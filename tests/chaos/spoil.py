"""Spoils a valid file, as disks, transfers and people do; what is done is a function of the random numbers given."""

import contextlib
import gzip
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

NUMBERS = (
    "0",
    "-1",
    "1.5",
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "9223372036854775808",
    "2147483648",
    "1e-320",
    "-0.0",
)
WORDS = (
    "null",
    "true",
    '""',
    "[]",
    "{}",
    '"\\ud800"',
    "'",
    '"',
    "[",
    "(",
    "@",
    "%",
    "\\",
    "\x00",
    "é",
    "[/b]",
    "import os",
)


class _Raw(str):
    """A piece of JSON, written as it is."""

    __slots__ = ()


class _Pairs(list):
    """An object as `(name, value)`, some of whose names may be the same."""


def spoil(path: Path, choose: Random) -> str:
    """Spoils the file, or a file of the folder, and says how."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        file = choose.choice(files)
        return f"{file.relative_to(path)}: {spoil(file, choose)}"
    if choose.random() < 0.03:
        how = choose.choice((_gone, _folder, _pipe, _itself))
        how(path)
        return how.__name__.strip("_")
    before = path.read_bytes()
    for _ in range(10):
        content, how = _spoilt(before, path.suffix, choose)
        if content != before:
            break
    path.write_bytes(content)
    return how


def _spoilt(content: bytes, suffix: str, choose: Random) -> tuple[bytes, str]:
    """A file's content spoilt, by its format most of the time."""
    if choose.random() < 0.7 and (of_format := FORMATS.get(suffix)):
        with contextlib.suppress(ValueError, zipfile.BadZipFile, OSError):
            return of_format(content, choose)
    how = choose.choice(BYTES)
    return how(content, choose), how.__name__


# The file itself.


def _gone(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


# Its bytes.


def bits_flipped(content: bytes, choose: Random) -> bytes:
    """One to eight bits."""
    return _flipped(content, choose, len(content))


def bits_flipped_in_front(content: bytes, choose: Random) -> bytes:
    """One to eight bits of the first 64 bytes, where many formats say what follows."""
    return _flipped(content, choose, 64)


def _flipped(content: bytes, choose: Random, within: int) -> bytes:
    result = bytearray(content)
    for _ in range(choose.randint(1, 8)) if content else ():
        result[choose.randrange(min(within, len(result)))] ^= 1 << choose.randrange(8)
    return bytes(result)


def cut(content: bytes, choose: Random) -> bytes:
    """The end is missing."""
    return content[: choose.randrange(len(content) + 1)]


def block_zeroed(content: bytes, choose: Random) -> bytes:
    """As a disk leaves it that lost its power."""
    start, end = _block(content, choose)
    return content[:start] + bytes(end - start) + content[end:]


def block_twice(content: bytes, choose: Random) -> bytes:
    """A block stands there twice."""
    start, end = _block(content, choose)
    return content[:end] + content[start:]


def block_missing(content: bytes, choose: Random) -> bytes:
    """A block is left out."""
    start, end = _block(content, choose)
    return content[:start] + content[end:]


def nulls_inserted(content: bytes, choose: Random) -> bytes:
    """NULs somewhere, or a tail of them."""
    start = choose.choice((len(content), choose.randrange(len(content) + 1)))
    return content[:start] + bytes(choose.choice((1, 16, 4096))) + content[start:]


def noise_inserted(content: bytes, choose: Random) -> bytes:
    """Random bytes, no text."""
    start = choose.randrange(len(content) + 1)
    return content[:start] + choose.randbytes(choose.randint(1, 64)) + content[start:]


def _block(content: bytes, choose: Random) -> tuple[int, int]:
    start = choose.randrange(len(content) + 1)
    return start, min(len(content), start + choose.choice((1, 16, 512, 4096)))


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (
    bits_flipped,
    bits_flipped_in_front,
    cut,
    block_zeroed,
    block_twice,
    block_missing,
    nulls_inserted,
    noise_inserted,
)


# Text.


def _text(content: bytes, choose: Random) -> tuple[bytes, str]:
    """A number, a word or a line is another one."""
    text = content.decode()
    lines = text.splitlines(keepends=True)
    kind = choose.choice(("number", "word", "line missing", "line twice", "lines swapped", "inserted"))
    if kind == "inserted":
        at = choose.randrange(len(text) + 1)
        return (text[:at] + choose.choice(NUMBERS + WORDS) + text[at:]).encode("utf-8", "replace"), kind
    if kind in ("number", "word"):
        pattern = r"\d[\d_.e+-]*" if kind == "number" else r"\w+"
        if places := list(re.finditer(pattern, text)):
            place, new = choose.choice(places), choose.choice(NUMBERS + WORDS)
            text = text[: place.start()] + new + text[place.end() :]
            return text.encode("utf-8", "replace"), f"{kind} {place[0][:20]!r} is {new!r}"
        return content, kind
    if lines:
        first, second = choose.randrange(len(lines)), choose.randrange(len(lines))
        match kind:
            case "line missing":
                del lines[first]
            case "line twice":
                lines.insert(second, lines[first])
            case _:
                lines[first], lines[second] = lines[second], lines[first]
    return "".join(lines).encode(), kind


# JSON.


def _json(content: bytes, choose: Random) -> tuple[bytes, str]:
    """A value, a name or a structure is another one; still JSON, but for numbers that it doesn't have."""
    tree = json.loads(content, object_pairs_hook=_Pairs)
    places = list(_places(tree))
    objects = [node for node in _nodes(tree) if isinstance(node, _Pairs)]
    kind = choose.choice(("value", "value", "value", "dropped", "added", "twice", "nested", "long", "renamed"))
    if kind in ("added", "twice", "renamed") and (with_names := [node for node in objects if node]):
        node = choose.choice(with_names)
        at = choose.randrange(len(node))
        name, value = node[at]
        if kind == "renamed":
            node[at] = (name + choose.choice(("s", " ", "\u0000", "_")), value)
        else:
            node.append((f"{name}_2" if kind == "added" else name, _other(value, choose)))
        return _dumped(tree), f"{kind}: {name}"
    if not places:
        return _dumped(_other(tree, choose)), "another value altogether"
    node, at = choose.choice(places)
    name, value = node[at] if isinstance(node, _Pairs) else (str(at), node[at])
    if kind == "dropped":
        del node[at]
        return _dumped(tree), f"dropped: {name}"
    if kind == "nested":
        depth = choose.choice((10, 1_000, 100_000))
        new: Any = _Raw("[" * depth + "]" * depth)
    elif kind == "long":
        new = _Raw('"' + "x" * choose.choice((1_000, 1_000_000)) + '"')
    else:
        new = _other(value, choose)
    node[at] = (name, new) if isinstance(node, _Pairs) else new
    return _dumped(tree), f"{name} = {str(new)[:30]}"


def _nodes(tree: Any) -> list[Any]:
    """Every object and list, the outermost among them."""
    inner = [value for _, value in tree] if isinstance(tree, _Pairs) else tree if isinstance(tree, list) else []
    own = [tree] if isinstance(tree, list) else []
    return own + [node for value in inner for node in _nodes(value)]


def _places(tree: Any) -> list[tuple[Any, int]]:
    """Every value within, as its list and index."""
    return [(node, at) for node in _nodes(tree) for at in range(len(node))]


def _other(value: Any, choose: Random) -> Any:
    """A value of another kind, or a nasty one of the same."""
    if isinstance(value, bool) or value is None or choose.random() < 0.4:
        return choose.choice(
            (None, True, False, [], _Pairs(), "", "x", "../../etc", _Raw(choose.choice(NUMBERS)), [value])
        )
    if isinstance(value, int | float):
        near = (value + 1, -value, value * 2, float(value), str(value))
        return choose.choice((*near, *map(_Raw, NUMBERS)))
    if isinstance(value, str):
        return choose.choice(
            (value + "x", value[:-1], "", value.upper(), 0, [value], _Raw('"\\ud800"'), "\u0000", "é\n[x]")
        )
    return choose.choice(([], _Pairs(), 0, "x", [value, value]))


def _dumped(tree: Any) -> bytes:
    pieces: list[str] = []

    def write(value: Any) -> None:
        if isinstance(value, _Raw):
            pieces.append(str(value))
        elif isinstance(value, _Pairs):
            pieces.append("{")
            for at, (name, inner) in enumerate(value):
                pieces.append(f"{', ' if at else ''}{json.dumps(name)}: ")
                write(inner)
            pieces.append("}")
        elif isinstance(value, list):
            pieces.append("[")
            for at, inner in enumerate(value):
                pieces.append(", " if at else "")
                write(inner)
            pieces.append("]")
        else:
            pieces.append(json.dumps(value))

    write(tree)
    return "".join(pieces).encode()


def _json_lines(content: bytes, choose: Random) -> tuple[bytes, str]:
    lines = content.splitlines(keepends=True)
    if not lines or choose.random() < 0.3:
        return _text(content, choose)
    at = choose.randrange(len(lines))
    spoilt, how = _json(lines[at], choose)
    return b"".join((*lines[:at], spoilt + b"\n", *lines[at + 1 :])), f"line {at + 1}: {how}"


# Containers: what is within is spoilt, and the container is whole.


def _zip(content: bytes, choose: Random) -> tuple[bytes, str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = choose.choice(sorted(members))
    kind = choose.choice(("missing", "renamed", "spoilt", "spoilt", "spoilt"))
    member = members.pop(name)
    how = kind
    if kind == "renamed":
        members["x" + name] = member
    elif kind == "spoilt":
        members[name], how = _spoilt(member, Path(name).suffix, choose)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for each, data in members.items():
            archive.writestr(zipfile.ZipInfo(each), data)
    return written.getvalue(), f"{name} {how}"


def _gzip(content: bytes, choose: Random) -> tuple[bytes, str]:
    spoilt, how = _spoilt(gzip.decompress(content), "", choose)
    return gzip.compress(spoilt, mtime=0), how


def _npy(content: bytes, choose: Random) -> tuple[bytes, str]:
    """The header's text: dtype, order, shape."""
    size = 10 + int.from_bytes(content[8:10], "little")
    header, how = _text(content[10:size].rstrip(), choose)
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return content[:8] + len(header).to_bytes(4, "little")[:2] + header + content[size:], f"header: {how}"


def _safetensors(content: bytes, choose: Random) -> tuple[bytes, str]:
    size = int.from_bytes(content[:8], "little")
    header, how = _json(content[8 : 8 + size], choose)
    return len(header).to_bytes(8, "little") + header + content[8 + size :], f"header: {how}"


FORMATS: dict[str, Callable[[bytes, Random], tuple[bytes, str]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".gin": _text,
    ".txt": _text,
    ".md": _text,
    ".npz": _zip,
    ".zip": _zip,
    ".npy": _npy,
    ".gz": _gzip,
    ".safetensors": _safetensors,
}
