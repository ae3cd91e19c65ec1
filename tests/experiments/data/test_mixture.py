"""Mixtures: sources as they are alone, one tokenizer, nothing read twice, and what is refused before a start."""

import json
import os

import numpy as np
import pytest

from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.data.text_files import text_files
from crescendo.experiments.data.text_mixture import text_mixture
from crescendo.experiments.runtime.errors import UserError

PROSE = [f"sentence {i} of some prose, " + "and so on " * (i % 9) for i in range(150)]
VERSE = [f"{i} zigzag lines " + "zigzag " * (i % 5) for i in range(90)]


def corpus(texts, **held_out) -> Documents:
    sets = {name: corpus(each) for name, each in held_out.items()}
    return Documents("a corpus", json.dumps(texts), lambda: (text.encode() for text in texts), None, sets)


def mixture(weights=None, prose=PROSE, verse=VERSE, **options):
    sources = {"verse": corpus(verse), "prose": corpus(prose)}
    return text_mixture(sources, weights or {"prose": 3, "verse": 1}, **options)


OPTIONS = {"sequence_length": 32, "validation_fraction": 0.2}


def test_each_source_is_what_it_is_alone(tmp_path):
    data = text_data(mixture(), cache_directory=tmp_path, **OPTIONS)
    alone = {
        name: text_data(corpus(texts), cache_directory=tmp_path, **OPTIONS)
        for name, texts in {"prose": PROSE, "verse": VERSE}.items()
    }
    assert list(data.held_out) == ["prose", "verse"]
    assert alone["prose"].expected() is alone["verse"].expected() is None  # prepared once for both
    numbers = [0, len(data.train) - 1, 3, len(alone["prose"].train), 3]
    rows = data.train.take(numbers)
    for i, number in enumerate(numbers):
        name, row, of_rows = data.train.place(number)
        assert of_rows == len(alone[name].train)
        for array, values in alone[name].train[row].items():
            np.testing.assert_array_equal(rows[array][i], values)
            np.testing.assert_array_equal(data.train[number][array], values)
    for name, part in alone.items():
        np.testing.assert_array_equal(data.held_out[name][0]["tokens"], part.validation[0]["tokens"])
        assert data.held_out[name].bytes_per_token == part.validation.bytes_per_token
    assert data.documents == len(PROSE) + len(VERSE)
    assert data.padding_share == pytest.approx(
        sum(part.padding_share * len(part.train) for part in alone.values()) / len(data.train)
    )
    assert f"to train on {len(alone['prose'].train)} of prose, {len(alone['verse'].train)} of verse" in str(data)
    assert data.train.take([])["tokens"].shape == (0, 32)


def test_sets_that_a_source_brings_go_by_both_names(tmp_path):
    sources = {"a": corpus(PROSE, news=["a line of news"]), "b": corpus(VERSE, validation=["one held out verse"])}
    mixed = text_data(text_mixture(sources, {"a": 1, "b": 1}), cache_directory=tmp_path, **OPTIONS)
    expected = mixed.expected()
    assert set(expected.held_out) == {"a", "a-news", "b"}
    assert expected.fits(mixed)
    assert set(mixed.held_out) == {"a", "a-news", "b"}
    assert mixed.validation_weights == {"a": 0.5, "b": 0.5}
    again = text_data(text_mixture(sources, {"a": 1, "b": 1}), cache_directory=tmp_path, **OPTIONS)
    assert again.expected() is None


def test_one_tokenizer_is_trained_on_all_sources_whatever_their_weights(tmp_path):
    options = OPTIONS | {"tokenizer": "bpe:280", "cache_directory": tmp_path}
    data = text_data(mixture(), **options)
    for word in ("zigzag", "sentence"):
        assert len(data.tokenizer.encode(word)) < len(word)
    assert data.vocab_size <= 280
    files = [path.read_bytes() for path in tmp_path.glob("*/*/tokenizer.json")]
    assert len(files) == 3
    assert len(set(files)) == 1

    def unreadable():
        raise AssertionError("read again")

    sources = {
        name: Documents("a corpus", json.dumps(texts), unreadable)
        for name, texts in (("prose", PROSE), ("verse", VERSE))
    }
    others = text_data(text_mixture(sources, {0: {"prose": 1, "verse": 0}, 64: {"prose": 1, "verse": 1}}), **options)
    assert others.tokenizer.to_json() == data.tokenizer.to_json()
    assert others.fingerprint != data.fingerprint


def test_the_fingerprint_follows_what_is_drawn(tmp_path):
    def fingerprint(*args, **options):
        return text_data(mixture(*args, **options), cache_directory=tmp_path, **OPTIONS).fingerprint

    before = fingerprint()
    assert before == fingerprint({"verse": 0.5, "prose": 1.5}) == fingerprint(most_epochs={"prose": 9})
    points = {0: {"prose": 3, "verse": 1}, 64: {"prose": 1, "verse": 1}}
    others = [
        fingerprint({"prose": 3, "verse": 2}),
        fingerprint(points),
        fingerprint(points, between="anneal"),
        fingerprint(verse=[*VERSE, "one more line of verse"]),
    ]
    assert len({before, *others}) == 5


def test_weights_may_stand_in_a_file(tmp_path):
    points = {"0": {"prose": 1, "verse": 0}, "64": {"prose": 1, "verse": 3}}
    (tmp_path / "w.json").write_text(json.dumps(points))
    shares = mixture(str(tmp_path / "w.json"), between="anneal").shares
    assert shares.before(64).tolist() == [40, 24]
    (tmp_path / "w.json").write_text('{"prose": 1, "verse": 1, "prose": 2}')
    with pytest.raises(UserError, match=r"text_mixture\.weights: .*w\.json has 'prose' twice"):
        mixture(str(tmp_path / "w.json"))
    with pytest.raises(UserError, match=r"text_mixture\.weights: .*nowhere\.json"):
        mixture("nowhere.json")


def test_a_source_that_weighs_nothing_is_not_in_the_mean():
    assert mixture(validation_weights={"prose": 3, "verse": 0}).validation_weights == {"prose": 1.0}


def test_the_same_text_in_two_sources_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text {name} " * 50)
    os.link(tmp_path / "a.txt", tmp_path / "hard.txt")
    (tmp_path / "soft.txt").symlink_to("a.txt")
    (tmp_path / "copy.txt").write_bytes((tmp_path / "a.txt").read_bytes())

    def mixed(other, **options):
        one = text_files([f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"])
        return text_mixture(
            {"one": one, "other": text_files(f"{tmp_path}/{other}.txt", **options)}, {"one": 1, "other": 1}
        )

    for name in ("a", "hard", "soft"):
        with pytest.raises(UserError, match=rf"one and other both read {tmp_path}/a\.txt: name it in one"):
            mixed(name)
        with pytest.raises(UserError, match=r"one and other both read"):  # what the other evaluates on
            mixed("copy", validation_paths=f"{tmp_path}/{name}.txt")
    with pytest.raises(UserError, match=r"one and other both read"):
        mixed("a", document_bytes=999)
    same = {name: text_files(f"{tmp_path}/{name}.txt") for name in ("a", "copy")}
    with pytest.raises(UserError, match=r"a and copy both read text_files .*a\.txt, or its copy: name it in one of"):
        text_mixture(same, {"a": 1, "copy": 1})
    # Of a corpus that names no files, too: what one holds out, and what both do.
    for other in (corpus(VERSE), corpus(["else"], test=VERSE)):
        with pytest.raises(UserError, match=r"one and other both read a corpus, or its copy"):
            text_mixture({"one": corpus(PROSE, validation=VERSE), "other": other}, {"one": 1, "other": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": {}}, r"text_mixture\.sources has 0 sources: name from 1 to 256"),
        ({"sources": {"a b": corpus(PROSE)}}, r"no source can be called 'a b': use up to 40 letters, digits and _"),
        ({"sources": {"validation": corpus(PROSE)}}, r"no source can be called 'validation'.* not train or validation"),
        ({"weights": {"prose": 1, "verse": -1}}, r"text_mixture\.weights: verse has -1 at 0 examples"),
        ({"most_epochs": {"poems": 1}}, r"text_mixture\.most_epochs: 'poems' is no source; there are prose, verse"),
        ({"most_epochs": {"verse": 0.0}}, r"text_mixture\.most_epochs = .* must each be above 0"),
        ({"validation_weights": {"prose": 0}}, r"text_mixture\.validation_weights add up to 0"),
    ],
)
def test_what_can_t_be_is_refused_in_a_line(arguments, message):
    given = {"sources": {"prose": corpus(PROSE), "verse": corpus(VERSE)}, "weights": {"prose": 1, "verse": 1}}
    with pytest.raises(UserError, match=message) as refused:
        text_mixture(**given | arguments)
    assert "\n" not in str(refused.value)


def test_a_source_without_rows_to_train_on_or_held_out_is_refused_by_name(tmp_path):
    for verse, split in ([VERSE[0]], "train|validation"), (["x" * 99], "train|validation"):
        with pytest.raises(UserError, match=rf"text_mixture\.sources, verse: .* is too small: its ({split}) split has"):
            str(text_data(mixture(verse=verse), cache_directory=tmp_path, **OPTIONS))


def test_more_epochs_than_allowed_are_refused_with_both_counts(tmp_path):
    data = text_data(mixture(most_epochs={"verse": 1.5}), cache_directory=tmp_path, **OPTIONS)
    order, rows = data.train.order(0), len(data.train.parts["verse"])
    order.check(4 * rows)
    with pytest.raises(
        UserError, match=rf"draw {2 * rows} examples of verse in {8 * rows}, and its {rows} rows give {int(1.5 * rows)}"
    ):
        order.check(8 * rows)
