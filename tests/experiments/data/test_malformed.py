"""Data from elsewhere that are malformed: refused in one line that names the file and what is wrong with it."""

import gzip
import io
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from crescendo.experiments.data.fashion_mnist import read_fashion_mnist, read_idx
from crescendo.experiments.data.image_data import image_data
from crescendo.experiments.data.npz import read_npz
from crescendo.experiments.data.tfds_text import tfds_text
from crescendo.experiments.data.tokenizer import SubwordTokenizer, train_bpe
from crescendo.experiments.papers.large_batch.recipes import TASKS, load_prepared, refuse_outside, save_prepared
from crescendo.experiments.runtime.errors import UserError


class CrescendoTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Known by its folder alone, as a data set of somebody else's is."""

    name = "crescendo_texts"
    VERSION = tfds.core.Version("1.0.0")
    code_path = Path(__file__)
    pkg_dir_path = Path(__file__).parent

    def _info(self):
        picture = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.float32)
        features = {"text": tfds.features.Text(), "image": picture, "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield i, {"text": f"text {i}", "image": np.full((2, 2, 1), np.nan, np.float32), "label": 0}


@pytest.fixture(scope="module")
def whole_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    CrescendoTexts(data_dir=folder, file_format="array_record").download_and_prepare()
    assert len(list(tfds_text("crescendo_texts", data_directory=folder).read())) == 3
    return folder


@pytest.fixture
def texts(whole_texts, tmp_path):
    return shutil.copytree(whole_texts, tmp_path / "tfds")


def metadata(folder, name):
    path = folder / "crescendo_texts" / "1.0.0" / name
    return path, json.loads(path.read_text())


def refused(folder, match, name="crescendo_texts"):
    with pytest.raises(UserError, match=match) as raised:
        list(tfds_text(name, data_directory=folder).read())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("place", ["a feature", "all features", "legacy", "dataset_info.json", "another module"])
def test_a_data_sets_folder_imports_nothing(texts, place, tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "crescendo_evil.py").write_text("open('ran', 'w')")
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    evil = "crescendo_evil.Text"
    path, features = metadata(texts, "features.json")
    if place == "a feature":
        features["featuresDict"]["features"]["text"]["pythonClassName"] = evil
    elif place == "all features":
        features["pythonClassName"] = evil
    elif place == "legacy":
        features = {"type": evil, "content": {}}
    elif place == "dataset_info.json":
        path, info = metadata(texts, "dataset_info.json")
        features = info | {"features": features | {"pythonClassName": evil}}
    else:
        path, features = metadata(texts, "dataset_info.json")
        features["moduleName"] = "crescendo_evil"
    path.write_text(json.dumps(features))
    if place == "another module":  # of which TFDS takes the name alone
        assert len(list(tfds_text("crescendo_texts", data_directory=texts).read())) == 3
    else:
        refused(texts, r"names the feature 'crescendo_evil\.Text', which isn't TFDS' own")
    assert "crescendo_evil" not in sys.modules
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("features.json", lambda path: path.write_text("[1]"), "crescendo_texts"),
        ("features.json", lambda path: path.write_text('{"featuresDict": 5}'), "crescendo_texts"),
        ("features.json", lambda path: (path.unlink(), os.mkfifo(path)), "no file that can be read to its end"),
        ("dataset_info.json", lambda path: path.write_text("{"), "crescendo_texts"),
        ("dataset_info.json", lambda path: os.truncate(path, 1 << 30), "above the 67,108,864 that it may have"),
        ("dataset_info.json", lambda path: path.write_text('{"name": 5}'), "crescendo_texts"),
        ("*.array_record*", lambda path: path.unlink(), r"crescendo_texts/1\.0\.0|No such file"),
        ("*.array_record*", lambda path: os.truncate(path, 99), "crescendo_texts"),
    ],
)
def test_a_damaged_tfds_folder_is_refused(texts, name, damage, match):
    damage(next((texts / "crescendo_texts" / "1.0.0").glob(name)))
    refused(texts, match)


def test_another_file_format_and_pixels_that_are_no_bytes_are_refused(texts):
    with pytest.raises(UserError, match=r'the feature "image" is .*float32.*pictures must be uint8'):
        image_data("crescendo_texts", data_directory=texts, validation_examples=1)
    path, info = metadata(texts, "dataset_info.json")
    path.write_text(json.dumps(info | {"fileFormat": "pickle"}))
    refused(texts, "pickle")
    path.write_text(json.dumps(info | {"splits": []}))
    refused(texts, "train")


def test_a_folder_whose_name_is_a_pattern_is_that_folder(whole_texts, tmp_path, monkeypatch):
    folder = shutil.copytree(whole_texts, tmp_path / "lr[1e-3]*")
    (tmp_path / "lr1").mkdir()
    assert len(list(tfds_text("crescendo_texts", data_directory=folder).read())) == 3
    with pytest.raises(UserError, match=rf"is not prepared in {re.escape(str(folder))}/mnist"):
        tfds_text("mnist", data_directory=folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    assert len(list(tfds_text("crescendo_texts").read())) == 3


# IDX.


def idx(content, *sizes, begin=b"\0\0\x08"):
    return gzip.compress(begin + bytes([len(sizes)]) + np.array(sizes, ">i4").tobytes() + content)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (idx(b"abc", 3, begin=b"\0\0\x0d"), "not an IDX file of bytes of rank 1: it begins with 00 00 0d 01"),
        (idx(b"abc", 3, 1), "of rank 1: it begins with 00 00 08 02"),
        (idx(b"abc", -3), r"sizes \[-3\]"),
        (idx(b"", 0), r"sizes \[0\]"),
        (idx(b"abc", 2**31 - 1), r"sizes \[2147483647\]"),
        (idx(b"abc", 4), r"its sizes \[4\] aren't those of what follows"),
        (idx(b"abcd", 3), r"its sizes \[3\] aren't those of what follows"),
        (gzip.compress(b"\0\0\x08\x01"), "not an IDX file"),
        (idx(b"abc", 3)[:-9], "can't read"),
        (b"", "not an IDX file"),
    ],
    ids=range(10),
)
def test_idx_files_that_lie_are_refused(tmp_path, content, match):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(UserError, match=match) as raised:
        read_idx(tmp_path / "a.gz", rank=1)
    assert "\n" not in str(raised.value)


def test_of_a_bomb_no_more_is_unpacked_than_its_sizes_say(tmp_path, monkeypatch):
    (tmp_path / "a.gz").write_bytes(idx(bytes(5 << 20), 7))
    read = []
    whole = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: read.append(size) or whole(file, size))
    with pytest.raises(UserError, match="aren't those of what follows"):
        read_idx(tmp_path / "a.gz", rank=1)
    assert 0 < sum(read) < 100


def test_labels_that_are_no_class_are_refused(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(idx(bytes(2 * 9), 2, 3, 3))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(b"\x03\x0a", 2))
    with pytest.raises(UserError, match=r"labels-idx1-ubyte.gz has the label 10, and they must lie in 0\.\.9"):
        read_fashion_mnist("train", idx_directory=tmp_path)
    os.unlink(tmp_path / "train-labels-idx1-ubyte.gz")
    os.mkfifo(tmp_path / "train-labels-idx1-ubyte.gz")
    with pytest.raises(UserError, match="no file that can be read to its end"):
        read_fashion_mnist("train", idx_directory=tmp_path)


# .npz.


def pictures(**changes):
    arrays = {}
    for split, count in {"train": 6, "validation": 3, "test": 2}.items():
        arrays[f"{split}/images"] = np.zeros((count, 4, 4, 1), np.uint8)
        arrays[f"{split}/labels"] = np.zeros(count, np.uint8)
    return {name: array for name, array in (arrays | changes).items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"test/labels": None}, "has no array 'test/labels'"),
        ({"extra": np.zeros(3)}, "the array 'extra' isn't understood"),
        ({"train/labels": np.zeros(6, np.float32)}, "train/labels is float32 of 1 axes"),
        ({"train/labels": np.zeros((6, 1), np.uint8)}, "train/labels is uint8 of 2 axes"),
        ({"train/labels": np.full(6, np.nan)}, "train/labels has numbers that aren't finite"),
        ({"train/labels": np.array([None] * 6)}, "train/labels is of object: it must be numbers"),
        ({"train/labels": np.zeros(5, np.uint8)}, "the arrays of train must have one length"),
        (
            {"test/images": np.zeros((2, 5, 4, 1), np.uint8)},
            r"test/images has rows of \(5, 4, 1\), and train/images of",
        ),
        (
            {"test/images": np.zeros((0, 4, 4, 1), np.uint8), "test/labels": np.zeros(0, np.uint8)},
            "of at least 1, and have",
        ),
    ],
)
def test_prepared_arrays_are_those_of_the_task(tmp_path, changes, match):
    save_prepared(tmp_path / "a.npz", TASKS["images"], pictures(**changes))
    with pytest.raises(UserError, match=match) as raised:
        load_prepared(tmp_path / "a.npz", TASKS["images"])
    assert "\n" not in str(raised.value)


def test_prepared_labels_and_tokens_lie_in_their_range(tmp_path):
    save_prepared(tmp_path / "a.npz", TASKS["images"], pictures(**{"test/labels": np.array([0, 10], np.uint8)}))
    task = TASKS["images"]
    with pytest.raises(UserError, match=r"test/labels has 0 to 10, and they must lie in 0\.\.9"):
        task.make(task.sizes["debug"].model, load_prepared(tmp_path / "a.npz", task))
    with pytest.raises(UserError, match="train/tokens has -1 to 3"):
        refuse_outside({"train/tokens": np.arange(-1, 4)}, "tokens", 257)


def npy(descr="'<i4'", shape="(3,)", content=bytes(12), order="False"):
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    ("member", "match"),
    [
        (npy(shape="(10**9,)"), "x has no header"),
        (npy(shape="(1000000000,)"), r"x is said to be int32 \[1000000000\], of 4,000,000,000 bytes, and has 12"),
        (npy(shape="(-3, -1)"), "x is said to be"),
        (npy(shape="(0, 99999999999999999999)", content=b""), "x is said to be"),
        (npy(shape="(3.0,)"), "x has no header"),
        (npy(descr="'|O'"), "x is of object: it must be numbers"),
        (npy(descr="[('a', '<i4')]"), "it must be numbers"),
        (npy(descr="'nonsense'"), "x has no header"),
        (npy(descr="("), "x has no header"),
        (npy(shape="(" * 500), "x has no header"),
        (npy(content=bytes(11)), "and has 11"),
        (npy(order="1"), "x has no header"),
        (b"", "x has no header"),
        (b"\x80\x04N.", "x has no header"),
    ],
)
def test_arrays_that_lie_are_refused(tmp_path, member, match):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", member)
    with pytest.raises(UserError, match=match) as raised:
        read_npz(tmp_path / "a.npz")
    assert "\n" not in str(raised.value)


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1 << 20))
    monkeypatch.setattr("crescendo.experiments.data.npz.MOST_BYTES", 1 << 20)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", None)
    with pytest.raises(UserError, match="unpacks to 8,388,736 bytes, above the 1,048,576"):
        read_npz(tmp_path / "a.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match="no file that can be read to its end"):
        read_npz(tmp_path / "pipe.npz")


def test_arrays_of_every_kind_come_back(tmp_path):
    arrays = {"f": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "e": np.zeros((0, 3)), "s": np.int16(5)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, text=np.array("to be"))
    (tmp_path / "a.npz").write_bytes(buffer.getvalue())
    read = read_npz(tmp_path / "a.npz")
    assert str(read.pop("text")) == "to be"
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)


# tokenizer.json.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda file: file["model"]["vocab"].update(far=4_000_000_000),
            r"has the number 4000000000, in a vocabulary of",
        ),
        (lambda file: file["model"]["vocab"].update(one=5, two=5), "have one number, 5"),
        (lambda file: file["model"]["vocab"].update(half=5.5), r"model.vocab.*half.* = 5\.5"),
        (lambda file: file["model"]["vocab"].update(below=-5), "below"),
        (lambda file: file["added_tokens"][0].update(id=7), "has the number 7, and is 0"),
        (lambda file: file["added_tokens"][0].update(special="yes"), "special = 'yes'"),
        (lambda file: file.update(unknown=1), "unknown isn't understood"),
        (lambda file: file.pop("model"), "has no model"),
        (lambda file: file["model"].update(merges=[["zz", "qq"]]), "not a tokenizer.json file that can be used"),
        (lambda file: file.update(pre_tokenizer={"type": "Split"}), "not a tokenizer.json file that can be used"),
    ],
)
def test_a_tokenizer_file_that_lies_is_refused(tmp_path, change, match):
    file = json.loads(train_bpe([b"the cat sat on the mat"] * 5, vocab_size=270).to_json())
    change(file)
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match=match) as raised:
        SubwordTokenizer.load(tmp_path / "tokenizer.json")
    assert "\n" not in str(raised.value)


def test_text_that_a_tokenizer_has_no_tokens_for_is_refused(tmp_path):
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "to": 1}, "unk_token": "?"}
    (tmp_path / "words.json").write_text(json.dumps({"model": model}))
    tokenizer = SubwordTokenizer.load(tmp_path / "words.json")
    with pytest.raises(UserError, match=r"the tokenizer can't encode a document \(WordLevel error: Missing"):
        tokenizer.encode_batch([b"be"])
