"""Held-out sets of a corpus' own, and the bytes that a token stands for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.text_data import held_out_text, text_data
from crescendo.experiments.data.tokenizer import ByteTokenizer
from crescendo.experiments.runtime.errors import UserError

WORDS = [f"document {i} of a corpus" for i in range(60)]


def corpus(texts, **held_out) -> Documents:
    sets = {name: corpus(each) for name, each in held_out.items()}
    return Documents("a corpus", f"{texts}", lambda: (text.encode() for text in texts), None, sets)


def text_of(rows) -> str:
    return "".join(ByteTokenizer().decode(row["labels"][row["segment_ids"] > 0]) for row in rows)


def test_own_sets_are_held_out_whole_and_nothing_else(tmp_path):
    own = {"news": ["one more", "and another"], "validation": ["held out", "é"]}
    data = text_data(corpus(WORDS, **own), sequence_length=8, cache_directory=tmp_path)
    assert list(data.held_out) == ["validation", "news"]
    assert sorted(text_of(data.validation)) == sorted("held outé")
    assert sorted(text_of(data.held_out["news"])) == sorted("one moreand another")
    assert sorted(text_of(data.train)) == sorted("".join(WORDS))
    assert str(data).endswith("2 held out, 3 news")
    assert data.documents == 64
    split = text_data(corpus(WORDS, news=own["news"]), sequence_length=8, cache_directory=tmp_path)
    assert list(split.held_out) == ["validation", "news"]
    assert sorted(text_of(split.train) + text_of(split.validation)) == sorted("".join(WORDS))
    alone = text_data(corpus(WORDS), sequence_length=8, cache_directory=tmp_path)
    assert text_of(alone.train) == text_of(split.train)
    assert len({each.fingerprint for each in (data, split, alone)}) == 3


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=9, unique=True),
    st.sampled_from(["bytes", "bpe:300"]),
)
def test_the_bytes_of_a_token_are_those_of_all_documents_over_all_labels(tmp_path_factory, texts, tokenizer):
    folder, texts = tmp_path_factory.mktemp("bytes"), [*texts, "a document of a corpus"]  # which has merges
    data = text_data(corpus(WORDS, own=texts), tokenizer=tokenizer, sequence_length=16, cache_directory=folder)
    rows = data.held_out["own"]
    labels = sum(int((row["segment_ids"] > 0).sum()) for row in rows)
    assert rows.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in texts) / labels)
    again = text_data(corpus(WORDS, own=texts), tokenizer=tokenizer, sequence_length=16, cache_directory=folder)
    assert again.held_out["own"].bytes_per_token == rows.bytes_per_token


def test_sets_alone_need_no_row_to_train_on(tmp_path):
    sets = {"short": corpus(["né"]), "long": corpus(WORDS)}
    data = held_out_text(sets, tokenizer="bytes", sequence_length=64, cache_directory=tmp_path)
    assert (len(data.train), list(data.held_out), len(data.held_out["short"])) == (0, ["short", "long"], 1)
    assert data.held_out["short"].bytes_per_token == 3 / 4
    np.testing.assert_array_equal(data.held_out["short"][0]["labels"][:4], [*"né".encode(), 256])


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ({"train": ["x"]}, "can't be called 'train'"),
        ({"a/b": ["x"]}, "can't be called 'a/b': use letters"),
        ({"news": [""]}, r"the held-out set news \(a corpus\) is empty"),
        ({"validation": []}, r"the held-out set validation \(a corpus\) is empty"),
    ],
)
def test_a_set_has_a_plain_name_and_a_text(tmp_path, held_out, message):
    with pytest.raises(UserError, match=message):
        str(text_data(corpus(WORDS, **held_out), sequence_length=8, cache_directory=tmp_path))


def test_a_uniform_model_of_bytes_has_eight_bits_a_byte_of_long_text(tmp_path):
    long = corpus(WORDS, validation=["x" * 5000])
    rows = text_data(long, sequence_length=64, cache_directory=tmp_path).validation
    assert math.log(256) / (math.log(2) * rows.bytes_per_token) == pytest.approx(8, rel=1e-3)
