"""Labelled images: Fashion-MNIST from IDX files, TFDS sets by name, and which examples are held out."""

import gzip
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from crescendo.experiments.data.image_data import image_data
from crescendo.experiments.runtime.errors import UserError


class CrescendoPictures(tfds.core.GeneratorBasedBuilder):
    """Twelve small pictures to train on and four to test; each is as bright as its number."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = Path(__file__)
    split_sizes = {"train": 12, "test": 4}  # noqa: RUF012
    odd_one = None

    def _info(self):
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(count) for split, count in self.split_sizes.items()}

    def _generate_examples(self, count):
        for i in range(count):
            png = io.BytesIO()
            shape = (5, 6, 3) if i == self.odd_one else (4, 6, 3)
            Image.fromarray(np.full(shape, 10 * i, np.uint8)).save(png, "PNG")
            png.seek(0)
            yield i, {"image": png, "label": i % 3}


class CrescendoValidated(CrescendoPictures):
    """With all three splits, and a picture of another shape."""

    split_sizes = {"train": 12, "validation": 5, "test": 4}  # noqa: RUF012
    odd_one = 3


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    for builder in (CrescendoPictures, CrescendoValidated):
        builder(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


@pytest.fixture(scope="module")
def idx_directory(tmp_path_factory):
    """Twenty pictures to train on, ten to test; each is as bright as its label."""
    folder = tmp_path_factory.mktemp("idx")
    for prefix, count in (("train", 20), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", np.tile(labels[:, None, None], (1, 28, 28))), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def test_fashion_mnist_from_the_publishers_files(idx_directory):
    data = image_data(data_directory=idx_directory, validation_examples=6)
    assert (data.shape, data.classes) == ((28, 28, 1), 10)
    assert (len(data.train), len(data.validation), len(data.test)) == (14, 6, 10)
    assert str(data) == (
        "fashion_mnist: images of 28 x 28 x 1 in 10 classes, 14 to train on, 6 to validate, 10 to test"
    )
    rows = [data.train.take(range(14)), data.validation.take(range(6))]
    for part in rows:
        np.testing.assert_array_equal(part["images"].max((1, 2, 3)), part["labels"])
        assert (part["images"].dtype, part["labels"].dtype) == (np.uint8, np.int32)
    labels = np.concatenate([part["labels"] for part in rows])
    np.testing.assert_array_equal(np.bincount(labels), [2] * 10)  # none is in both


def test_the_fingerprint_of_a_tfds_set_follows_its_contents(tfds_directory, tmp_path):
    """A set of the same name and lengths whose pictures are others is another one; elsewhere it is the same."""
    copy = Path(shutil.copytree(tfds_directory, tmp_path / "tfds"))
    prints = [image_data("crescendo_pictures", data_directory=d, validation_examples=2) for d in (tfds_directory, copy)]
    assert prints[0].fingerprint == prints[1].fingerprint
    file = next(copy.rglob("crescendo_pictures-test.*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    changed = image_data("crescendo_pictures", data_directory=copy, validation_examples=2).fingerprint
    assert changed != prints[0].fingerprint


def test_the_fingerprint_follows_the_split(idx_directory):
    prints = [image_data(data_directory=idx_directory, validation_examples=count).fingerprint for count in (6, 6, 7)]
    assert prints[0] == prints[1] != prints[2]


def test_a_tfds_set_by_name(tfds_directory):
    data = image_data("crescendo_pictures", data_directory=tfds_directory, validation_examples=4)
    assert (data.shape, data.classes) == ((4, 6, 3), 3)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 4, 4)
    seen = np.concatenate([rows.take(range(len(rows)))["images"][:, 0, 0, 0] for rows in (data.train, data.validation)])
    np.testing.assert_array_equal(np.sort(seen), 10 * np.arange(12))


def test_splits_that_are_there_stay_and_one_shape_is_asked_for(tfds_directory):
    data = image_data("crescendo_validated", data_directory=tfds_directory, validation_examples=4)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 5, 4)
    shapes = re.escape("crescendo_validated/1.0.0 has images of (4, 6, 3) and of (5, 6, 3)")
    with pytest.raises(UserError, match=f"(?s){shapes}|images of"):
        data.train.take(range(12))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_examples": 0}, "image_data.validation_examples = 0 must be at least 1"),
        ({"validation_examples": 20}, "validation_examples = 20 for validation would leave none of the 20 training"),
        ({"name": "mnist"}, r'"mnist" is not prepared in .*mnist.*--set .image_data\.download = True'),
    ],
)
def test_what_can_not_be_is_refused(idx_directory, arguments, message):
    with pytest.raises(UserError, match=message):
        image_data(**{"data_directory": idx_directory, **arguments})
