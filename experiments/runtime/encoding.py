"""Bytes as text: UTF-8, whatever the machine's locale, decoded in one place."""

import codecs
import os
import re
from pathlib import Path

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import read_file

# What files in other encodings begin with; UTF-32's little-endian mark begins with UTF-16's.
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


# How a text in them begins without a mark, where its first characters are ASCII: in UTF-8 that would be NULs between
# letters, which no text has.
WITHOUT_MARK = {
    rb"[^\0]\0\0\0": "UTF-32LE",
    rb"\0\0\0[^\0]": "UTF-32BE",
    rb"[^\0]\0[^\0]\0": "UTF-16LE",
    rb"\0[^\0]\0[^\0]": "UTF-16BE",
}
BEGIN_BYTES = 4  # tell whether a text is in another encoding


def without_mark(content: bytes, where: str) -> bytes:
    """A file's content, or its begin, without the byte order mark that some programs put before UTF-8.

    Raises:
      UserError: for what begins as text in another encoding does, with its mark or without.

    >>> without_mark(b"\\xef\\xbb\\xbfto be", "a.txt")
    b'to be'
    """
    found = [encoding for mark, encoding in OTHER_MARKS.items() if content.startswith(mark)]
    if b"\0" in content[:BEGIN_BYTES]:
        found += [encoding for begin, encoding in WITHOUT_MARK.items() if re.match(begin, content)]
    if found:
        raise UserError(
            f"{where} is in {found[0]}, not in UTF-8; convert it, for example with iconv -f {found[0]} -t UTF-8"
        )
    return content.removeprefix(codecs.BOM_UTF8)


def check_utf8(content: bytes, where: str, *, offset: int = 0, way_on: str = "") -> bytes:
    """`content` if it is UTF-8, else a UserError that says where it isn't.

    Args:
      content: bytes of a text.
      where: names the text.
      offset: of the content in it.
      way_on: what else can be done, for the message's end.
    """
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte 0x{content[error.start]:02x} at offset {offset + error.start} is not UTF-8; convert the "
            f"text, for example with iconv -t UTF-8{way_on}"
        ) from error
    return content


def decoded(content: bytes, where: str) -> str:
    """The text of a file's content, each line's end as a newline.

    Raises:
      UserError: for what is not UTF-8.

    >>> decoded(b"\\xef\\xbb\\xbfto be\\r\\nor not", "a.txt")
    'to be\\nor not'
    """
    text = check_utf8(without_mark(content, where), where).decode()
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_typed(text: str, where: str) -> str:
    """An argument of a command, in which Python leaves halves of surrogate pairs for bytes that its locale can't read.

    Raises:
      UserError: if there are any: says whether it is the text or the locale that isn't UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            os.fsencode(text).decode()
        except UnicodeError:
            raise UserError(f"{where}: {text!r} is not UTF-8") from None
        raise UserError(f"{where}: {text!r} is UTF-8, and the locale here is not: set PYTHONUTF8=1") from None
    return text


def read_text(path: Path) -> str:
    """The text of a file; see `decoded`.

    Raises:
      UserError: for a file that can't be read or is not UTF-8.
    """
    return decoded(read_file(path), str(path))
