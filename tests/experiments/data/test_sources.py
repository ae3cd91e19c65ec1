"""Documents from files and from TFDS, and prepared folders that are there whole or not at all."""

import errno
import glob
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crescendo.experiments.data import documents, manifest
from crescendo.experiments.data.corpus import held_out
from crescendo.experiments.data.preparation import prepared
from crescendo.experiments.data.stdlib_text import stdlib_files, stdlib_identity, stdlib_text
from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.data.text_files import _matches, text_files
from crescendo.experiments.data.tfds import tfds_images
from crescendo.experiments.data.tfds_text import tfds_text
from crescendo.experiments.runtime.errors import UserError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_files_of_all_kinds_are_read_sorted_each_once(tmp_path):
    write(tmp_path / "b.txt", "plain é\n")
    write(tmp_path / "c.jsonl", '{"text": "one", "id": 1}\n\n{"text": "two\\nlines", "id": 2}')
    (tmp_path / "deep" / "er").mkdir(parents=True)
    table = pa.table({"text": pa.array(["x", None, "y\n"], pa.large_string()), "id": [1, 2, 3]})
    pq.write_table(table, tmp_path / "deep" / "er" / "d.parquet")

    paths = [f"{tmp_path}/**/*.parquet", f"{tmp_path}/c.jsonl", f"{tmp_path}/*.txt", f"{tmp_path}/b.txt"]
    expected = ["plain é\n".encode(), b"one", b"two\nlines", b"x", b"y\n"]
    assert list(text_files(paths).read()) == expected
    assert list(text_files(paths[::-1]).read()) == expected
    assert text_files(paths).identity == text_files(paths[::-1]).identity
    assert list(text_files(f"{tmp_path}/b.txt").read()) == expected[:1]


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_is_read_by_the_batch_as_a_stream_or_a_file(tmp_path, new):
    table = pa.table({"id": [1, 2, 3, 4], "text": ["x", None, "é\n", "z"], "raw": [b"\xff", b"", b"", b""]})
    path = tmp_path / "data-00000-of-00001.arrow"
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, 3)
    assert list(text_files(str(path)).read()) == [b"x", "é\n".encode(), b"z"]
    with pytest.raises(UserError, match=r"arrow, row 0: byte 0xff"):
        list(text_files(str(path), field="raw").read())
    with pytest.raises(UserError, match=r'arrow, column "id": Unsupported cast'):
        list(text_files(str(path), field="id").read())
    with pytest.raises(UserError, match=r'arrow has no field "words" \(it has id, text, raw\)'):
        list(text_files(str(path), field="words").read())
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"00001\.arrow"):
        list(text_files(str(path)).read())


def test_a_path_with_glob_characters_that_exists_is_that_file(tmp_path):
    write(tmp_path / "a[1].txt", "brackets")
    assert list(text_files([f"{tmp_path}/a[1].txt"]).read()) == [b"brackets"]


def test_the_text_may_have_another_name(tmp_path):
    write(tmp_path / "a.jsonl", '{"body": "one"}')
    pq.write_table(pa.table({"body": [b"two"]}), tmp_path / "b.parquet")
    assert list(text_files([f"{tmp_path}/*"], field="body").read()) == [b"one", b"two"]


def test_identity_follows_contents_and_settings(tmp_path):
    path = write(tmp_path / "a.txt", "before")
    identities = [text_files(path).identity, text_files(path, document_bytes=999).identity]
    identities.append(text_files(path, errors="replace").identity)
    write(tmp_path / "a.txt", "longer than before")
    identities.append(text_files(path).identity)
    assert len(set(identities)) == 4
    assert text_files(path).identity == identities[-1]
    os.utime(path, ns=(0, 0))
    assert text_files(path).identity == identities[-1]


def test_a_file_replaced_by_one_of_equal_size_and_time_is_another_corpus(tmp_path):
    path = write(tmp_path / "a.txt", "".join(f"old {i:03}\n" for i in range(200)))
    options = {"sequence_length": 8, "validation_fraction": 0.5, "cache_directory": tmp_path / "cache"}
    os.utime(path, (1e9, 1e9))
    old = text_data(text_files(path, document_bytes=256), **options)
    assert len(old.train)  # prepares them
    write(tmp_path / "a.txt", "".join(f"new {i:03}\n" for i in range(200)))
    os.utime(path, (1e9, 1e9))
    new = text_data(text_files(path, document_bytes=256), **options)
    assert "old" in old.tokenizer.decode(old.train[0]["tokens"])
    assert "new" in new.tokenizer.decode(new.train[0]["tokens"])
    assert new.fingerprint != old.fingerprint


def test_files_are_hashed_once_and_anew_when_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [Path(write(tmp_path / f"{name}.txt", name)) for name in "ab"]
    first = documents.file_digests(paths)
    assert not (tmp_path / "cache").exists()  # they were changed just now, and may be again within a tick
    monkeypatch.setattr(documents, "SETTLED_SECONDS", -1.0)
    assert documents.file_digests(paths) == first
    with monkeypatch.context() as unreadable:
        unreadable.setattr(hashlib, "file_digest", None)
        assert documents.file_digests(paths) == first
    write(tmp_path / "new", "c")
    os.replace(tmp_path / "new", paths[1])
    again = documents.file_digests(paths)
    assert again[0] == first[0]
    assert again[1] != first[1]


def test_a_corpus_in_another_folder_is_the_same_corpus(tmp_path):
    for folder, names in {"one": "ac", "two": "bd"}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            write(tmp_path / folder / f"{name}.txt", f"{name} text\n" * 100)
    write(tmp_path / "two" / "a.txt", "another a\n" * 100)  # of one name: by content
    options = {"tokenizer": "bpe:300", "sequence_length": 8, "validation_fraction": 0.5}

    def prepare(cache, *patterns):
        corpus = text_files([f"{tmp_path}/{pattern}" for pattern in patterns], document_bytes=256)
        return corpus.identity, text_data(corpus, **options, cache_directory=tmp_path / cache).fingerprint

    before = prepare("before", "one/*.txt", "two/*.txt")
    (tmp_path / "one").rename(tmp_path / "zzz")
    assert prepare("after", "zzz/*.txt", "two/*.txt") == before
    assert prepare("after", "**/?.txt") == before


@pytest.mark.parametrize(
    "links", [{"loop": "."}, {"deep/loop": ".."}, {"deep/one": "../other", "other/two": "../deep"}]
)
def test_a_link_to_its_own_folder_multiplies_nothing(tmp_path, links):
    for folder in ("deep", "other"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / f"{folder}.txt", folder)
    write(tmp_path / "a.txt", "a")
    for place, target in links.items():
        (tmp_path / place).symlink_to(target)
    assert list(text_files(f"{tmp_path}/**/*.txt").read()) == [b"a", b"deep", b"other"]
    assert list(text_files(f"{tmp_path}/**").read()) == [b"a", b"deep", b"other"]


@settings(max_examples=30, deadline=None)
@given(
    files=st.lists(st.lists(st.sampled_from(["a", "b", ".a"]), min_size=1, max_size=3), max_size=5),
    parts=st.lists(st.sampled_from(["**", "*", "a", "b*", "?x"]), min_size=1, max_size=3),
)
def test_where_nothing_goes_in_circles_globs_are_pythons(tmp_path_factory, files, parts):
    root = tmp_path_factory.mktemp("globs")
    for file in files:
        path = root.joinpath("folder", *file[:-1], f"{file[-1]}x")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "folder").mkdir(exist_ok=True)
    (root / "link").symlink_to("folder")
    pattern = str(root / Path(*parts))
    wanted = {Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    assert {path for path in _matches(Path(pattern)) if path.is_file()} == wanted


def test_links_lead_to_files_and_links_to_nothing_are_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    write(tmp_path / "elsewhere" / "blob", "linked")
    (tmp_path / "here" / "a.txt").symlink_to("../elsewhere/blob")
    (tmp_path / "here" / "b.txt").symlink_to("a.txt")
    assert list(text_files(f"{tmp_path}/here/*.txt").read()) == [b"linked"]
    (tmp_path / "elsewhere" / "blob").unlink()
    with pytest.raises(UserError, match=r"[ab]\.txt is a link to nothing"):
        text_files(f"{tmp_path}/here/*.txt")


def test_hard_links_are_names_of_one_file(tmp_path):
    write(tmp_path / "b.txt", "once")
    (tmp_path / "a.txt").hardlink_to(tmp_path / "b.txt")
    assert list(text_files(f"{tmp_path}/*.txt").read()) == [b"once"]


@pytest.mark.parametrize("pattern", ["pipe.txt", "*", "**"])
def test_what_is_no_file_is_refused(tmp_path, pattern):
    write(tmp_path / "a.txt", "text")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt is a pipe or a device: copy"):
        text_files(f"{tmp_path}/{pattern}")


def test_a_folder_that_cannot_be_read_is_refused_and_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    write(tmp_path / "a.txt", "text")
    scandir = os.scandir

    def scan(folder):
        if Path(folder).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)  # a test that runs as root may read everything
    with pytest.raises(UserError, match=r"cannot read .*closed: Permission denied"):
        text_files(f"{tmp_path}/**/*.txt")


MARK = "\ufeff".encode()


def test_a_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path / "a.txt", MARK + "é plain\n".encode())
    write(tmp_path / "b.jsonl", MARK + b'{"text": "one"}\r\n' + MARK + b'{"text": "two"}\n' + MARK)
    assert list(text_files(f"{tmp_path}/*").read()) == ["é plain\n".encode(), b"one", b"two"]
    write(tmp_path / "a.txt", MARK + b"x" * 300 + b"\xff")
    with pytest.raises(UserError, match=r"a\.txt: byte 0xff at offset 303 "):
        list(text_files(f"{tmp_path}/a.txt", document_bytes=256).read())


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_another_encodings_mark_is_named(tmp_path, encoding, errors):
    for name in ("a.txt", "b.jsonl"):
        path = write(tmp_path / name, '{"text": "one"}'.encode(encoding))
        with pytest.raises(UserError, match=rf"{name}.* is in {encoding}, not in UTF-8; .*iconv -f {encoding}"):
            list(text_files(path, errors=errors).read())


def test_null_is_no_document(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": null}\n{"text": "x"}\n{"text": null, "id": 1}\n')
    pq.write_table(pa.table({"text": pa.array([None, "x", None], pa.string())}), tmp_path / "a.parquet")
    assert list(text_files(f"{tmp_path}/a.jsonl").read()) == [b"x"]
    assert list(text_files(f"{tmp_path}/a.parquet").read()) == [b"x"]


def test_what_is_not_utf8_can_be_replaced_and_is_counted(tmp_path, capsys):
    write(tmp_path / "a.txt", b"\xef\xbf\xbd to \xff be\n" + b"x" * 300 + b"\xe2\x82")
    write(tmp_path / "b.jsonl", b'{"text": "\\ud800 \xff"}\n')
    pq.write_table(pa.table({"text": [b"ok", b"\xff!"]}), tmp_path / "c.parquet")
    documents = text_files(f"{tmp_path}/*", document_bytes=256, errors="replace")
    read = list(documents.read())
    assert "".join(document.decode() for document in read) == (
        "\ufffd to \ufffd be\n" + "x" * 300 + "\ufffd" + "\ufffd \ufffd" + "ok" + "\ufffd!"
    )
    assert list(documents.read()) == read
    said = capsys.readouterr().err
    assert said.count("note: ") == 1
    assert "U+FFFD stands 5 times for what is not UTF-8, first in" in said
    with pytest.raises(UserError, match=r"offset 7 is not UTF-8; .*set text_files\.errors = 'replace'"):
        list(text_files(f"{tmp_path}/*").read())
    with pytest.raises(UserError, match=r"text_files\.errors = 'ignore' must be 'strict' or 'replace'"):
        text_files(f"{tmp_path}/*", errors="ignore")


def test_files_that_change_while_they_are_read_are_refused(tmp_path):
    documents = text_files(write(tmp_path / "a.jsonl", '{"text": "x"}\n' * 3))
    reading = documents.read()
    next(reading)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "y"}\n')
    with pytest.raises(UserError, match=r"files changed while they were read; start again"):
        list(reading)


@settings(max_examples=50)
@given(st.text(alphabet="ab \né€🙂", max_size=300), st.sampled_from([256, 300]))
def test_a_long_file_is_cut_between_characters_and_nothing_is_lost(tmp_path_factory, text, document_bytes):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    content = (text * 4).encode()
    documents = list(text_files(write(path, content), document_bytes=document_bytes).read())
    assert b"".join(documents) == content
    assert all(len(document) <= document_bytes for document in documents)
    if len(content) <= document_bytes:
        assert len(documents) == 1
    for document in documents:
        document.decode()
    for document in documents[:-1]:
        assert document.endswith(b"\n") or b"\n" not in document
        assert document.endswith((b"\n", b" ")) or b" " not in document


BAD_FILES = {
    "bad UTF-8": ("a.txt", b"x" * 700 + b"\xff", r"a\.txt: byte 0xff at offset 700 is not UTF-8; .*iconv"),
    "only continuation bytes": ("a.txt", b"\x80" * 700, r"a\.txt: byte 0x80 at offset 0 is not UTF-8"),
    "bad UTF-8 in JSON": ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl, line 1: byte 0xff at offset 10"),
    "no JSON": ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl, line 2 is not JSON: .* at column 8"),
    "no object": ("a.jsonl", b'["text"]', r'line 1 is not an object such as {"text": "\.\.\."}'),
    "no field": (
        "a.jsonl",
        b'{"body": "x", "id": 1}',
        r'line 1 has no field "text" \(it has body, id\).*text_files\.field',
    ),
    "no text": ("a.jsonl", b'{"text": 5}', r'line 1: field "text" is int, not text'),
    "NULs": ("a.jsonl", b'{"text": "x"}\n\0\0\0\0\n', r"a\.jsonl, line 2 is not JSON: .* at column 1"),
    "a number too long": (
        "a.jsonl",
        b'{"text": "x", "id": %s}' % (b"1" * 5000),
        r"line 1 can't be read as JSON: .*4300",
    ),
    "too deep": ("a.jsonl", b"[" * 200_000, r"line 1 can't be read as JSON: .*recursion"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: .*surrogate"),
    "no parquet": ("a.parquet", b"PAR1 not really", r"a\.parquet"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_when_read(tmp_path, name, content, message):
    documents = text_files(write(tmp_path / name, content), document_bytes=256)
    with pytest.raises(UserError, match=message) as raised:
        list(documents.read())
    assert "\n" not in str(raised.value)


def test_a_bad_column_is_refused(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": [1], "raw": [b"\xff"]}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'a\.parquet has no field "text" \(it has body, id, raw\)'):
        list(text_files(path).read())
    with pytest.raises(UserError, match=r'a\.parquet, column "id"'):
        list(text_files(path, field="id").read())
    with pytest.raises(UserError, match=r"a\.parquet, row 0: byte 0xff"):
        list(text_files(path, field="raw").read())


def test_a_file_that_disappears_is_named(tmp_path):
    documents = text_files(write(tmp_path / "a.txt", "x"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"can't read .*a\.txt: No such file"):
        list(documents.read())


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["nowhere.txt"], r'"nowhere\.txt" does not exist'),
        (["*.nothing"], r'"\*\.nothing" matches no file'),
        ([], r"text_files\.paths is empty"),
        (["."], r'"\." is a folder; name its files, as in "\./\*\*/\*\.txt"'),
        (
            ["table.csv"],
            r"table\.csv: unknown suffix '\.csv'; text_files reads \.txt, \.md, \.json, \.jsonl, \.parquet",
        ),
    ],
)
def test_bad_paths_are_refused_at_once(tmp_path, monkeypatch, paths, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "table.csv", "a,b")
    with pytest.raises(UserError, match=message):
        text_files(paths)


def test_tiny_documents_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"document_bytes = 10 must be at least 256"):
        text_files(write(tmp_path / "a.txt", "x"), document_bytes=10)


class CrescendoToy(tfds.core.GeneratorBasedBuilder):
    """Five grey pictures with a caption each."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = Path(__file__)

    def _info(self):
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(4, 6, 3)),
            "label": tfds.features.ClassLabel(num_classes=3),
            "text": tfds.features.Text(),
        })  # fmt: skip
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            png = io.BytesIO()
            Image.fromarray(np.full((4, 6, 3), 10 * i, np.uint8)).save(png, "PNG")
            png.seek(0)
            yield i, {"image": png, "label": i % 3, "text": f"picture {i}"}


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    CrescendoToy(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def test_tfds_texts_are_documents(toy_directory):
    documents = tfds_text("crescendo_toy", data_directory=toy_directory)
    assert sorted(documents.read()) == [b"picture %d" % i for i in range(5)]
    assert list(documents.read()) == list(documents.read())
    part = tfds_text("crescendo_toy:1.0.0", split="train[:40%]", data_directory=toy_directory)
    assert list(part.read()) == list(documents.read())[:2]
    assert part.identity != documents.identity


def test_tfds_splits_are_held_out_by_name(toy_directory):
    def captions(documents) -> list[bytes]:
        return list(documents.read())

    every = captions(tfds_text("crescendo_toy", data_directory=toy_directory))
    one = tfds_text("crescendo_toy", split="train[:60%]", validation_split="train[60%:]", data_directory=toy_directory)
    assert (captions(one), captions(one.held_out["validation"])) == (every[:3], every[3:])
    sets = {"validation": "train[3:4]", "test": "train[4:]"}
    several = tfds_text("crescendo_toy", validation_split=sets, data_directory=toy_directory)
    assert {name: captions(each) for name, each in several.held_out.items()} == {
        "validation": every[3:4],
        "test": every[4:],
    }


def test_tfds_images_are_arrays_with_labels(toy_directory):
    images = tfds_images("crescendo_toy", data_directory=toy_directory)
    assert len(images) == 5
    for i in range(5):
        example = images[i]
        assert example["image"].dtype == np.uint8
        assert example["image"].shape == (4, 6, 3)
        assert np.unique(example["image"]).tolist() in [[10 * n] for n in range(5) if n % 3 == example["label"]]
        assert type(example["label"]) is int
    np.testing.assert_array_equal(images[-1]["image"], images[4]["image"])
    with pytest.raises(IndexError):
        images[5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "crescendo_toi"}, r'no TFDS data set "crescendo_toi": did you mean crescendo_toy'),
        ({"name": "mnist"}, r'"mnist" is not prepared in .*mnist.*--set .tfds_text\.download = True'),
        ({"name": "crescendo_toy/other"}, r'"crescendo_toy/other"'),
        ({"name": "crescendo_toy:9.9.9"}, r"cannot be loaded at version 9\.9\.9"),
        ({"name": "huggingface:toy"}, r'"huggingface:toy": names with a namespace'),
        ({"name": "no such name"}, r'"no such name"'),
        ({"name": "crescendo_toy", "split": "test"}, r"Unknown split 'test'.*train"),
        ({"name": "crescendo_toy", "feature": "body"}, r'no feature "body": it has image, label, text'),
        ({"name": "crescendo_toy", "feature": "label"}, r'feature "label" is int, not text'),
    ],
)
def test_bad_tfds_names_are_refused_once(toy_directory, arguments, message, caplog):
    with pytest.raises(UserError, match=message) as raised:
        list(tfds_text(**arguments, data_directory=toy_directory).read())
    assert "\n" not in str(raised.value)
    assert "has no dataset_info.json" not in caplog.text


def test_data_prepared_without_random_access_are_refused(tmp_path):
    info = tmp_path / "crescendo_toy" / "1.0.0" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text(json.dumps({"name": "crescendo_toy", "version": "1.0.0", "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"file format.*not supported.*array_record"):
        tfds_text("crescendo_toy", data_directory=tmp_path)


def test_a_data_set_is_prepared_where_that_is_allowed(tmp_path):
    documents = tfds_text("crescendo_toy", data_directory=tmp_path, download=True)
    assert len(list(documents.read())) == 5


def test_stdlib_text_is_this_interpreters_library_without_tests(tmp_path):
    documents = list(stdlib_text(cache_directory=tmp_path).read())
    folder, paths = stdlib_files()
    assert sorted(documents) == sorted((folder / path).read_bytes() for path in paths)
    assert Path(os.__file__).read_bytes() in documents
    assert 8e6 < sum(map(len, documents)) < 16e6
    assert not any(part in ("test", "tests", "idlelib", "site-packages") for path in paths for part in path.split("/"))
    assert ".".join(map(str, sys.version_info[:3])) in stdlib_identity()
    assert stdlib_identity() in stdlib_text().identity
    assert [path.name for path in (tmp_path / "stdlib_text").glob("[!.]*")] == [stdlib_identity()]


def test_held_out_documents_are_the_same_whatever_the_fraction_grows_to():
    documents = [f"document {i}".encode() for i in range(4000)]
    small, large = ({d for d in documents if held_out(d, fraction)} for fraction in (0.05, 0.2))
    assert small < large
    assert len(small) == pytest.approx(0.05 * 4000, abs=4 * (0.05 * 0.95 * 4000) ** 0.5)  # four standard deviations


def test_a_failed_preparation_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("done")
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        prepared(tmp_path / "data", fail)
    assert not list(tmp_path.glob("**/half"))
    assert not (tmp_path / "data").exists()


def test_a_folder_is_built_once(tmp_path):
    for content in ("first", "second"):
        folder = prepared(tmp_path / "data", lambda folder, content=content: (folder / "text").write_text(content))
        assert (folder / "text").read_text() == "first"


def test_one_of_two_processes_builds_and_the_other_waits(tmp_path, capfd):
    begun, go_on = threading.Event(), threading.Event()
    built = []

    def build(folder):
        begun.set()
        assert go_on.wait(timeout=60)
        built.append(folder)

    threads = [threading.Thread(target=prepared, args=(tmp_path / "data", build)) for _ in range(2)]
    threads[0].start()
    assert begun.wait(timeout=60)
    threads[1].start()
    threads[1].join(timeout=0.3)
    assert threads[1].is_alive()
    assert not (tmp_path / "data").exists()
    go_on.set()
    for thread in threads:
        thread.join(timeout=60)
    assert len(built) == 1
    assert (tmp_path / "data").is_dir()
    assert "waiting for another process" in capfd.readouterr().err


def test_a_process_whose_lock_is_removed_does_not_take_anothers_half_for_whole(tmp_path):
    begun, go_on = (threading.Event(), threading.Event()), (threading.Event(), threading.Event())
    ended = [None, None]

    def build(number, folder):
        (folder / "half").write_text(str(number))
        begun[number].set()
        assert go_on[number].wait(timeout=60)
        if number == 1:
            (folder / "whole").write_text("done")

    def prepare(number):
        try:
            ended[number] = prepared(tmp_path / "data", lambda folder: build(number, folder))
        except UserError as error:
            ended[number] = str(error)

    threads = [threading.Thread(target=prepare, args=(number,)) for number in range(2)]
    threads[0].start()
    assert begun[0].wait(timeout=60)
    (tmp_path / ".data.lock").unlink()
    threads[1].start()
    assert begun[1].wait(timeout=60)
    for number in range(2):
        go_on[number].set()
        threads[number].join(timeout=60)
    assert ended[0].startswith("another process prepares the same data in")
    assert ended[1] == tmp_path / "data"
    assert {path.name for path in ended[1].iterdir()} == {"half", "whole", manifest.NAME}
    assert (ended[1] / "half").read_text() == "1"


def test_a_killed_preparation_is_started_anew(tmp_path):
    script = """
import sys, time, pathlib
from crescendo.experiments.data.preparation import prepared
def build(folder):
    (folder / "half").write_text("done")
    print("building", flush=True)
    time.sleep(600)
prepared(pathlib.Path(sys.argv[1]), build)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "building\n"
        process.kill()
    assert not (tmp_path / "data").exists()
    folder = prepared(tmp_path / "data", lambda folder: (folder / "whole").write_text("done"))
    assert sorted(path.name for path in folder.iterdir()) == [manifest.NAME, "whole"]
    assert not list(tmp_path.glob("**/half"))
