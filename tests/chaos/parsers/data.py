"""Readers of data: text files, tokenizers, pictures, prepared arrays, TFDS folders and the cache."""

import gzip
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz import Parser

from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.fashion_mnist import read_fashion_mnist, read_idx
from crescendo.experiments.data.image_data import image_data
from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.data.text_files import text_files
from crescendo.experiments.data.text_mixture import text_mixture
from crescendo.experiments.data.tokenizer import ByteTokenizer, parse_tokenizer, train_bpe
from crescendo.experiments.papers.large_batch.recipes import TASKS, load_prepared, refuse_outside, save_prepared
from crescendo.experiments.tasks.images import Weighted

TEXTS = [f"to be or not to be, {i} é" for i in range(20)]


# Text.


def _texts(folder: Path) -> list[Path]:
    text, lines = "\n".join(TEXTS), "".join(json.dumps({"text": each}) + "\n" for each in TEXTS)
    (folder / "a.txt").write_text(text)
    (folder / "b.jsonl").write_text(lines)
    (folder / "c.json").write_text(json.dumps({"version": 1, "rows": [TEXTS[0], {"text": TEXTS[1]}, None]}))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    with pa.output_stream(str(folder / "e.txt.zst"), compression="zstd") as file:
        file.write(text.encode())
    table = pa.table({"text": TEXTS, "id": range(len(TEXTS))})
    pq.write_table(table, folder / "f.parquet")
    for name, new in {"g": pa.ipc.new_stream, "h": pa.ipc.new_file}.items():
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, 8)
    return sorted(folder.iterdir())


def _read_text(path: Path) -> None:
    for errors in ("replace", "strict"):
        for document in text_files(str(path), errors=errors).read():
            document.decode()


def _weights(folder: Path) -> list[Path]:
    (folder / "a.json").write_text(json.dumps({"web": 3, "code": 0.5}))
    (folder / "b.json").write_text(json.dumps({"0": {"web": 1, "code": 0}, "4096": {"web": 0.25, "code": 3}}))
    return sorted(folder.iterdir())


def _read_weights(path: Path) -> None:
    sources = {name: Documents(name, name, lambda: iter(())) for name in ("web", "code")}
    shares = text_mixture(sources, str(path), between="anneal").shares
    assert shares.before(10**6).sum() == 10**6


# Tokenizers.


def _tokenizer_files(folder: Path) -> list[Path]:
    for name, tokenizer in {"bytes": ByteTokenizer(), "bpe": train_bpe([each.encode() for each in TEXTS], 300)}.items():
        (folder / f"{name}.json").write_text(tokenizer.to_json())
    words = {"type": "WordLevel", "vocab": {"?": 0, "</s>": 1, "to": 2, "be": 5}, "unk_token": "?"}
    added = {"id": 1, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = {"type": "Whitespace"}
    file = {"version": "1.0", "added_tokens": [added | {"special": True}], "pre_tokenizer": split, "model": words}
    (folder / "words.json").write_text(json.dumps(file))
    return sorted(folder.iterdir())


def _read_tokenizer(path: Path) -> None:
    tokenizer = parse_tokenizer(str(path)).make([])
    assert 0 < tokenizer.vocab_size < 10_000
    tokens, lengths = tokenizer.encode_batch([each.encode() for each in [*TEXTS, "</s>", "\0\u0416"]])
    assert len(tokens) == lengths.sum()
    assert (tokens < tokenizer.vocab_size).all()
    assert tokenizer.end_of_text not in tokens
    tokenizer.decode(tokens)


# Pictures and arrays.


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


def _idx_files(folder: Path) -> list[Path]:
    (folder / "labels.gz").write_bytes(_idx(np.arange(10)))
    return [folder / "labels.gz"]


def _read_idx(path: Path) -> None:
    assert read_idx(path, rank=1).size > 0


def _fashion_mnist(folder: Path) -> list[Path]:
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = np.arange(count * 784).reshape(count, 28, 28) % 251
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(_idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(_idx(np.arange(count) % 10))
    return [folder]


def _read_fashion_mnist(folder: Path) -> None:
    for split in ("train", "test"):
        images, labels = read_fashion_mnist(split, idx_directory=folder)
        assert images.shape[1:] == (*images.shape[1:3], 1)
        assert len(images) == len(labels) > 0
        assert (labels >= 0).all()
        assert (labels < 10).all()


def _npz_files(folder: Path) -> list[Path]:
    sizes = {"train": 8, "validation": 4, "test": 4}
    text, images = {"mask_token": np.int16(257)}, {}
    for split, count in sizes.items():
        text[f"{split}/tokens"] = np.arange(count * 8, dtype=np.int16).reshape(count, 8)
        text[f"{split}/segment_ids"] = np.ones((count, 8), np.int16)
        text[f"{split}/positions"] = np.tile(np.arange(8, dtype=np.int16), (count, 1))
        images[f"{split}/images"] = np.zeros((count, 4, 4, 1), np.uint8)
        images[f"{split}/labels"] = np.arange(count, dtype=np.uint8)
    save_prepared(folder / "mlm.npz", TASKS["mlm"], text)
    save_prepared(folder / "images.npz", TASKS["images"], images)
    return sorted(folder.iterdir())


def _read_npz(path: Path) -> None:
    arrays = load_prepared(path, TASKS[path.stem])
    if path.stem == "images":
        refuse_outside(arrays, "labels", 10)
    for array in arrays.values():
        assert array.size
        assert array.dtype.kind in "iu"


# TFDS folders, and the cache.


def _tfds_folder(folder: Path) -> list[Path]:
    import tensorflow_datasets as tfds
    from PIL import Image

    class FuzzedPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A few pictures."""

        name = "fuzzed_pictures"
        VERSION = tfds.core.Version("1.0.0")
        code_path = Path(__file__)
        pkg_dir_path = Path(__file__).parent

        def _info(self):
            label = tfds.features.ClassLabel(num_classes=3)
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(4, 6, 3)), "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(count) for split, count in {"train": 9, "test": 4}.items()}

        def _generate_examples(self, count):
            for i in range(count):
                png = io.BytesIO()
                Image.fromarray(np.full((4, 6, 3), 10 * i, np.uint8)).save(png, "PNG")
                png.seek(0)
                yield i, {"image": png, "label": i % 3}

    tfds.disable_progress_bar()
    FuzzedPictures(data_dir=folder / "tfds", file_format="array_record").download_and_prepare()
    return [folder / "tfds"]


def _read_tfds(folder: Path) -> None:
    data = image_data("fuzzed_pictures", data_directory=folder, validation_examples=2)
    for rows in (data.train, data.validation, data.test):
        read = Weighted(rows, data.classes).take(range(len(rows)))
        assert read["images"].shape[1:] == data.shape


def _cached(cache: Path) -> list:
    corpus = Documents("a corpus", "of texts", lambda: (f"{text} {i}".encode() for i in range(9) for text in TEXTS))
    data = text_data(corpus, tokenizer="bpe:300", sequence_length=16, validation_fraction=0.2, cache_directory=cache)
    rows = data.train.take(range(len(data.train)))
    return [data.fingerprint, str(data), data.tokenizer.to_json(), *(array.tolist() for array in rows.values())]


def _cache_folder(folder: Path) -> list[Path]:
    _cached(folder / "cache")
    return [folder / "cache"]


_RIGHT: list = []


def _read_cache(cache: Path) -> None:
    if not _RIGHT:
        fresh = tempfile.mkdtemp()
        _RIGHT.extend(_cached(Path(fresh)))
        shutil.rmtree(fresh)
    assert _cached(cache) == _RIGHT


PARSERS = [
    Parser("text files", _texts, _read_text),
    Parser("weights of a mixture", _weights, _read_weights),
    Parser("tokenizer.json", _tokenizer_files, _read_tokenizer),
    Parser("IDX", _idx_files, _read_idx),
    Parser("Fashion-MNIST", _fashion_mnist, _read_fashion_mnist),
    Parser("prepared .npz", _npz_files, _read_npz),
    Parser("TFDS folder", _tfds_folder, _read_tfds),
    Parser("cache", _cache_folder, _read_cache),
]
