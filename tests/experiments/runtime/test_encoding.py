"""Bytes as text: UTF-8 with or without its mark, the same under every locale."""

import ast
import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crescendo.experiments.runtime.encoding import check_typed, decoded, read_text
from crescendo.experiments.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
MODULES = sorted(
    path for name in ("experiments", "models", "optim", "parallel") for path in ROOT.glob(f"{name}/**/*.py")
)


@given(st.text().filter(lambda text: "\0" not in text[:4]), st.sampled_from(["utf-8", "utf-8-sig"]))
def test_text_comes_back_without_its_mark(text, encoding):
    text = text.lstrip("\ufeff")
    assert decoded(text.encode(encoding), "a.txt") == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@given(text=st.text(min_size=1).filter(lambda text: text[0] != "\0"))  # UTF-16's mark and a NUL are UTF-32's mark
def test_another_encoding_is_refused(encoding, text):
    with pytest.raises(UserError, match=rf"a\.txt is in {encoding.upper()}, not in UTF-8; convert it, .* -f UTF-"):
        decoded(text.encode(encoding), "a.txt")


LATIN = st.characters(min_codepoint=1, max_codepoint=255)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@given(begin=st.text(LATIN, min_size=2, max_size=2), rest=st.text())
def test_another_encoding_is_refused_without_its_mark_too(encoding, begin, rest):
    told = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(UserError, match=rf"a\.txt is in {told}, not in UTF-8; convert it, .* -f {told} "):
        decoded((begin + rest).encode(encoding), "a.txt")


@given(st.binary().filter(lambda content: b"\0" not in content[:4]))
def test_bytes_are_text_or_one_line_that_says_where_they_are_not(content):
    text = content.removeprefix(codecs.BOM_UTF8).decode(errors="replace")
    if "\ufffd" in text:
        with pytest.raises(UserError, match=r"^a\.txt[^\n]* UTF-8[^\n]*$"):
            decoded(content, "a.txt")
    else:
        assert decoded(content, "a.txt") == text.replace("\r\n", "\n").replace("\r", "\n")


def test_files_and_arguments_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"na\xefve")
    with pytest.raises(UserError, match=r"a\.txt: byte 0xef at offset 2 is not UTF-8; convert the text"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"cannot read .*/b\.txt: No such file"):
        read_text(tmp_path / "b.txt")
    assert check_typed("é", "--prompt") == "é"
    with pytest.raises(UserError, match=r"--prompt: 'na\\udcefve' is not UTF-8"):
        check_typed("na\udcefve", "--prompt")
    typed = "é".encode().decode("ascii", "surrogateescape")  # as Python reads it under a locale of ASCII
    with pytest.raises(UserError, match=r"--prompt: .* is UTF-8, and the locale here is not: set PYTHONUTF8=1"):
        check_typed(typed, "--prompt")


def test_no_text_depends_on_the_locale():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("read_text", "write_text"):
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
