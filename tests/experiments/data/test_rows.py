"""Rows against the documents that they were made from, and the stream against plain permutations of the rows."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments.data.corpus import held_out
from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.packing import pack
from crescendo.experiments.data.rows import Rows, Stream
from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.data.text_files import text_files
from crescendo.experiments.runtime.errors import UserError

NAMES = ("tokens", "labels", "segment_ids", "positions")


def documents_of(texts, identity=None):
    texts = [text.encode() for text in texts]
    return Documents("a test corpus", identity or json.dumps([text.decode() for text in texts]), lambda: iter(texts))


WORDS = [f"document {i} says {'so ' * (i % 17)}" for i in range(300)]


@pytest.fixture(scope="module")
def cache_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache_directory):
    return text_data(documents_of(WORDS), sequence_length=24, validation_fraction=0.2, cache_directory=cache_directory)


def pieces_of(rows):
    """(tokens, labels) of every piece of every row, after checking what surrounds them."""
    for row in rows:
        assert set(row) == set(NAMES)
        for name in NAMES:
            assert row[name].dtype == np.int32
            assert row[name].shape == (rows.sequence_length,)
        segments = row["segment_ids"]
        used = int((segments > 0).sum())
        assert all((row[name][used:] == 0).all() for name in NAMES)
        starts = np.flatnonzero(np.diff(segments[:used], prepend=0))
        assert segments[starts].tolist() == list(range(1, len(starts) + 1))
        for begin, end in zip(starts, [*starts[1:], used], strict=True):
            assert row["positions"][begin:end].tolist() == list(range(end - begin))
            yield row["tokens"][begin:end].tolist(), row["labels"][begin:end].tolist()


def expected_pieces(texts, sequence_length, end_of_text=256):
    for text in filter(None, texts):
        tokens = [end_of_text, *text.encode(), end_of_text]
        pairs = list(pairwise(tokens))
        for begin in range(0, len(pairs), sequence_length):
            piece = pairs[begin : begin + sequence_length]
            yield [token for token, _ in piece], [label for _, label in piece]


@settings(max_examples=20, deadline=None)
@given(
    texts=st.lists(st.text(max_size=60), min_size=1, max_size=12, unique=True),
    sequence_length=st.integers(1, 40),
)
def test_rows_hold_every_piece_of_every_document_and_nothing_else(tmp_path_factory, texts, sequence_length):
    texts = [*texts, *WORDS[:40]]  # enough for a row of each split
    directory = tmp_path_factory.mktemp("rows")
    data = text_data(
        documents_of(texts), sequence_length=sequence_length, validation_fraction=0.5, cache_directory=directory
    )
    for rows, is_validation in ((data.train, False), (data.validation, True)):
        split = [text for text in texts if held_out(text.encode(), 0.5) == is_validation]
        assert sorted(pieces_of(rows)) == sorted(expected_pieces(split, sequence_length))


def test_padding_share_and_the_summary_say_what_the_rows_hold(data):
    used = np.concatenate([row["segment_ids"] > 0 for row in data.train])
    assert data.padding_share == pytest.approx(1 - used.mean(), abs=1e-12)
    tokens = sum(len(text) + 1 for text in WORDS)
    assert (data.documents, data.tokens, data.vocab_size, data.sequence_length) == (300, tokens, 257, 24)
    assert f"300 documents, {tokens:,} tokens" in str(data)
    assert f"{len(data.train):,} to train on ({data.padding_share:.2%} padding)" in str(data)


def test_rows_are_read_singly_or_together(data):
    numbers = [3, 0, len(data.train) - 1, 3]
    together = data.train.take(numbers)
    for i, number in enumerate(numbers):
        for name in NAMES:
            np.testing.assert_array_equal(together[name][i], data.train[number][name])
            np.testing.assert_array_equal(data.train[-1][name], data.train[len(data.train) - 1][name])
    assert data.train.take([])["tokens"].shape == (0, 24)
    with pytest.raises(IndexError):
        data.train[len(data.train)]


def test_prepared_data_are_memory_mapped_and_not_read_again(data, cache_directory):
    def unreadable():
        raise AssertionError("read again")

    same = Documents("a test corpus", documents_of(WORDS).identity, unreadable)
    warm = text_data(same, sequence_length=24, validation_fraction=0.2, cache_directory=cache_directory)
    assert warm.fingerprint == data.fingerprint
    np.testing.assert_array_equal(warm.train[5]["tokens"], data.train[5]["tokens"])
    for array in (warm.train._tokens, *warm.train._packing):
        assert isinstance(array.base, np.memmap)


def test_the_fingerprint_follows_the_rows_and_nothing_else(data, tmp_path):
    def fingerprint(texts=WORDS, identity=None, sequence_length=24, validation_fraction=0.2, tokenizer="bytes"):
        return text_data(
            documents_of(texts, identity),
            sequence_length=sequence_length,
            validation_fraction=validation_fraction,
            tokenizer=tokenizer,
            cache_directory=tmp_path,
        ).fingerprint

    assert fingerprint() == fingerprint(identity="elsewhere") == data.fingerprint
    others = [
        fingerprint(texts=[*WORDS, "one more"]),
        fingerprint(texts=WORDS[::-1]),
        fingerprint(sequence_length=25),
        fingerprint(validation_fraction=0.3),
        fingerprint(tokenizer="bpe:260"),
    ]
    assert len({data.fingerprint, *others}) == 6


def test_documents_stay_in_their_split_when_others_come(data, cache_directory):
    more = [*[f"a new document {i}" for i in range(200)], *WORDS]
    grown = text_data(documents_of(more), sequence_length=24, validation_fraction=0.2, cache_directory=cache_directory)
    for before, after in ((data.train, grown.train), (data.validation, grown.validation)):
        pieces = sorted(pieces_of(after))
        assert all(piece in pieces for piece in pieces_of(before))


def test_bpe_is_trained_on_the_training_documents_and_kept(tmp_path):
    # "zq" is only in documents that are held out, so no token may be made of it.
    texts = [word + " zq" * 30 if held_out((word + " zq" * 30).encode(), 0.2) else word for word in WORDS]
    assert any("zq" in text for text in texts)
    data = text_data(
        documents_of(texts),
        tokenizer="bpe:280",
        sequence_length=16,
        validation_fraction=0.2,
        cache_directory=tmp_path,
    )
    assert data.vocab_size <= 280
    assert len(data.tokenizer.encode("zq")) == 2
    assert len(data.tokenizer.encode("document")) < 8
    assert len(list(tmp_path.glob("tokens/*/tokenizer.json"))) == 1
    decoded = [data.tokenizer.decode(row["tokens"][row["segment_ids"] > 0]) for row in data.train]
    assert "document 100 says" in " ".join(decoded)


def test_large_vocabularies_are_stored_wider(tmp_path):
    vocabulary = {"?": 0, "</s>": 1, **{f"word {i}": i for i in range(2, 70_000)}, "far": 70_000}
    settings = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"}
    (tmp_path / "words.json").write_text(json.dumps({"model": settings, "added_tokens": [], "version": "1.0"}))
    data = text_data(
        documents_of(["far"] + [f"{i}" for i in range(50)]),
        tokenizer=str(tmp_path / "words.json"),
        sequence_length=2,
        validation_fraction=0.5,
        cache_directory=tmp_path,
    )
    assert data.vocab_size == 70_001
    rows = [*data.train, *data.validation]
    assert sorted({int(token) for row in rows for token in row["tokens"]}) == [0, 1, 70_000]


def numbered_rows(count):
    """`count` rows of one token each, the row's own number."""
    return Rows(np.arange(count + 1), pack(np.arange(count + 1), capacity=1), sequence_length=1)


def order(stream, examples_seen, count):
    return stream.read(examples_seen, count)["tokens"][:, 0].tolist()


@given(rows=st.integers(1, 50), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_each_epoch_is_a_permutation(rows, seed, epoch):
    stream = Stream(numbered_rows(rows), seed)
    assert sorted(order(stream, epoch * rows, rows)) == list(range(rows))


def test_epochs_and_seeds_are_ordered_differently():
    streams = [Stream(numbered_rows(50), seed) for seed in range(3)]
    orders = [order(stream, epoch * 50, 50) for stream in streams for epoch in range(3)]
    assert len({tuple(each) for each in orders}) == 9
    assert list(range(50)) not in orders


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.integers(0, 10**9))
@settings(deadline=None, max_examples=20)
def test_the_position_is_one_integer_whatever_the_batches(batch_sizes, begin):
    rows = numbered_rows(300)
    whole = order(Stream(rows, seed=4), begin, sum(batch_sizes))
    parts, examples_seen = [], begin
    for batch_size in batch_sizes:
        parts += order(Stream(rows, seed=4), examples_seen, batch_size)
        examples_seen += batch_size
    assert parts == whole


def test_any_share_of_a_batch_can_be_read_alone(data):
    whole = Stream(data.train, seed=1).read(100, 8)
    share = Stream(data.train, seed=1).take([103, 101, 106])
    for name in NAMES:
        np.testing.assert_array_equal(share[name], whole[name][[3, 1, 6]])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(data, seed):
    with pytest.raises(UserError, match=rf"seed = {seed} must lie in 0\.\.4294967295"):
        Stream(data.train, seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 0}, r"sequence_length = 0 must be at least 1"),
        ({"validation_fraction": 0.0}, r"validation_fraction = 0\.0 must be above 0 and below 1"),
        ({"validation_fraction": 1.5}, r"validation_fraction = 1\.5 must be above 0 and below 1"),
        ({"tokenizer": "bpe:7"}, r"at least 257"),
        ({"documents": documents_of([])}, r"a test corpus is empty: it has no document with any text"),
        ({"documents": documents_of(["", ""])}, r"a test corpus is empty"),
        ({"documents": documents_of([]), "tokenizer": "bpe:300"}, r"a test corpus is empty"),
        (
            {"documents": documents_of(["only one"])},
            r"a test corpus is too small: its train split has 9 tokens, fewer than one row of "
            r"text_data\.sequence_length = 128; add text, lower the sequence length, or change "
            r"text_data\.validation_fraction = 0\.05",
        ),
        ({"documents": documents_of(WORDS), "sequence_length": 5000}, r"its validation split has \d+ tokens"),
        (
            {"documents": documents_of(WORDS), "sequence_length": 500, "validation_fraction": 0.99},
            r"its train split has \d+ tokens",
        ),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        str(text_data(**arguments, cache_directory=tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_bad_document_is_named_whatever_the_tokenizer(tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nbad\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2 is not JSON"):
        str(text_data(text_files(f"{tmp_path}/bad.jsonl"), tokenizer=tokenizer, cache_directory=tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("**/*.npy"))


@contextmanager
def largest_file(size):
    """Writing further than `size` bytes into a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [64, 1_000, 10_000])
def test_a_full_disk_is_reported_and_leaves_nothing_half_done(tmp_path, size):
    arguments = {"sequence_length": 8, "validation_fraction": 0.2, "cache_directory": tmp_path}
    with (
        pytest.raises(UserError, match=rf"can't prepare data in {tmp_path}/.*: .*; free some space .*cache_directory"),
        largest_file(size),
    ):
        str(text_data(documents_of(WORDS), **arguments))
    assert not list(tmp_path.glob("**/*.npy"))
    assert len(text_data(documents_of(WORDS), **arguments).train) > 0


def test_a_full_disk_is_reported_for_the_standard_library_too(tmp_path):
    with pytest.raises(UserError, match=r"can't prepare data in .*; free some space"), largest_file(1_000_000):
        str(text_data(cache_directory=tmp_path))
    assert not list(tmp_path.glob("**/*.array_record*"))


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't prepare data in .*/file/tokens: Not a directory; .*cache_directory"):
        str(text_data(documents_of(WORDS), cache_directory=tmp_path / "file"))


def test_tensorflow_is_never_imported_and_tfds_only_to_prepare(tmp_path):
    # A stand-in for TensorFlow, so that an import of it would succeed and show.
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("")
    script = """
import sys
from crescendo.experiments.data.rows import Stream
from crescendo.experiments.data.text_data import text_data
data = text_data(cache_directory=sys.argv[1])
if sys.argv[2] == "cold":
    Stream(data.train, seed=0).read(0, 4)
print(data.fingerprint, "tensorflow" in sys.modules, "tensorflow_datasets" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script, str(tmp_path / "cache")]
    cold, warm = (
        subprocess.run([*command, start], env=environment, check=True, capture_output=True, text=True)
        for start in ("cold", "warm")
    )
    fingerprint, *imported = cold.stdout.split()
    assert imported == ["False", "True"]
    assert warm.stdout.split() == [fingerprint, "False", "False"]
    assert cold.stderr == ""
