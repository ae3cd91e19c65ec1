"""What text files hold: archives of them, JSON in its shapes, and files to validate on."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.data.text_files import COMPRESSIONS, text_files
from crescendo.experiments.runtime.errors import UserError


def packed(path: Path, content: bytes) -> Path:
    """Writes a file as its suffix says."""
    with pa.output_stream(str(path), compression=COMPRESSIONS.get(path.suffix)) as file:
        file.write(content)
    return path


def read(path: Path | str, **options) -> list[bytes]:
    return list(text_files(str(path), **options).read())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=700), max_size=4), st.sampled_from([".txt", ".md", ".jsonl", ".json"]))
def test_an_archive_is_read_as_what_is_in_it(tmp_path_factory, texts, kind):
    folder = tmp_path_factory.mktemp("archives")
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    content = (lines if kind in (".jsonl", ".json") else "\n".join(texts)).encode()
    plain = read(packed(folder / f"a{kind}", content), document_bytes=256)
    for suffix in COMPRESSIONS:
        assert read(packed(folder / f"a{kind}{suffix}", content), document_bytes=256) == plain


def test_archives_put_together_are_read_to_their_end(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"to be ") + gzip.compress(b"or not"))
    assert read(tmp_path / "a.txt.gz") == [b"to be or not"]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("damage", ["cut", "changed", "something else"])
def test_a_damaged_archive_is_named_in_one_line(tmp_path, suffix, damage):
    path = packed(tmp_path / f"a.txt{suffix}", b" ".join(b"%d" % (i * i) for i in range(9999)))
    content = path.read_bytes()
    middle = len(content) // 2
    at = {".gz": middle, ".zst": 4}[suffix]  # of zstd the frame's header: not every writer adds a checksum
    changed = content[:at] + bytes(255 - byte for byte in content[at : at + 9]) + content[at + 9 :]
    path.write_bytes({"cut": content[:middle], "changed": changed, "something else": b"to be"}[damage])
    with pytest.raises(UserError, match=rf"a\.txt\{suffix} can't be decompressed \(.*\): get the file again") as raised:
        read(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "content",
    [
        '["one", null, {"text": "two"}, {"text": null}]',
        '[\n "one",\n {"text": "two", "id": 2}\n]\n',
        '{"version": 1, "rows": ["one", {"text": "two"}]}',
        '{"text": "one", "labels": []}\n\n{"text": "two"}\n',
    ],
)
def test_json_is_a_list_or_an_object_with_one_or_an_object_a_line(tmp_path, content, mark):
    (tmp_path / "a.json").write_bytes(mark + content.encode())
    assert read(tmp_path / "a.json") == [b"one", b"two"]


def test_json_may_be_one_document_or_none(tmp_path):
    (tmp_path / "a.json").write_text('{\n"text": "one",\n"labels": ["x"]}')
    (tmp_path / "b.json").write_text(" \n")
    assert read(tmp_path / "*.json") == [b"one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n"a",\n b]', r"a\.json is not JSON: Expecting value at line 3, column 2"),
        (b'{"a": [], "b": []}', r"an object with 2 lists, which doesn't say where the documents are"),
        (b'{"body": "x"}', r'has no field "text" \(it has body\)'),
        (b"[1]", r"document 1 is not an object"),
        (b"5", r"document 1 is not an object"),
        (b'["x", "\xff"]', r"a\.json: byte 0xff at offset 7 is not UTF-8"),
        (b'{"text": "x"}\n{"text": 5}', r'line 2: field "text" is int, not text'),
    ],
)
def test_json_that_holds_no_documents_says_so(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path / "a.json")
    assert "\n" not in str(raised.value)


def test_parquet_is_not_unpacked_and_an_unknown_archive_is_refused(tmp_path):
    for name, suffix in (("a.parquet.gz", r"\.parquet\.gz"), ("a.gz", r"\.gz"), ("a.txt.bz2", r"\.txt\.bz2")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match=rf"unknown suffix '{suffix}'; .*\.jsonl in \.gz or \.zst"):
            text_files(str(tmp_path / name))


def test_files_to_validate_on_are_not_trained_on(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    one = text_files(f"{tmp_path}/*.txt", validation_paths=f"{tmp_path}/b.txt")
    assert list(one.read()) == [b"a", b"c"]
    assert {name: list(each.read()) for name, each in one.held_out.items()} == {"validation": [b"b"]}
    several = text_files(
        [f"{tmp_path}/*.txt"], validation_paths={"news": f"{tmp_path}/a.txt", "old": [f"{tmp_path}/b*"]}
    )
    assert list(several.read()) == [b"c"]
    assert {name: list(each.read()) for name, each in several.held_out.items()} == {"news": [b"a"], "old": [b"b"]}
    assert not text_files(f"{tmp_path}/*.txt").held_out
    with pytest.raises(UserError, match=r"validation_paths name all of these files"):
        text_files(f"{tmp_path}/*.txt", validation_paths=f"{tmp_path}/?.txt")
    with pytest.raises(UserError, match=r'validation_paths: "nowhere.txt" does not exist'):
        text_files(f"{tmp_path}/*.txt", validation_paths="nowhere.txt")


def test_an_object_stores_address_is_refused_as_such():
    with pytest.raises(UserError, match=r"^text_files.paths: gs://b/x.txt is no path of this machine"):
        text_files(["gs://b/x.txt"])


def test_a_path_may_have_bytes_that_are_no_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/a.txt", "wb") as file:
        file.write(b"".join(b"line %d of a text\n" % i for i in range(200)))
    corpus = text_files(os.fsdecode(folder) + "/a.txt", document_bytes=256)
    arguments = {"sequence_length": 16, "validation_fraction": 0.3, "cache_directory": tmp_path / "cache"}
    first, second = (text_data(corpus, **arguments) for _ in range(2))
    assert first.fingerprint == second.fingerprint
