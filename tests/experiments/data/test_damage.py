"""Prepared data that something happened to: nothing else is ever trained on, and what is damaged is prepared anew."""

import json
import os
import random
import shutil

import numpy as np
import pytest

from crescendo.experiments.data import documents, manifest
from crescendo.experiments.data.documents import Documents, file_digests
from crescendo.experiments.data.preparation import prepared
from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.runtime.errors import UserError

TEXTS = [f"the {word} of document {i} is a text" for i, word in enumerate(["begin", "middle", "end"] * 70)]


def corpus(cache, tokenizer="bpe:300"):
    """A corpus of subwords, prepared in a folder or opened from there."""
    documents = Documents("a corpus", "of texts", lambda: (text.encode() for text in TEXTS))
    options = {"tokenizer": tokenizer, "sequence_length": 16, "validation_fraction": 0.2}
    data = text_data(documents, **options, cache_directory=cache)
    assert len(data.train)
    return data


def content(data):
    """Everything that a run sees."""
    rows = {name: each.take(range(len(each))) for name, each in {"train": data.train, **data.held_out}.items()}
    arrays = {f"{name} {field}": array.tolist() for name, each in rows.items() for field, array in each.items()}
    about = [data.fingerprint, data.vocab_size, data.documents, data.tokens, data.tokenizer.to_json(), str(data)]
    return [arrays, about, [each.bytes_per_token for each in data.held_out.values()]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    cache = tmp_path_factory.mktemp("whole")
    return cache, content(corpus(cache))


@pytest.fixture
def cache(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "cache")


def spoil(path, choose):
    """One of the things that disks, transfers and people do to a file; says which."""
    before = bytearray(path.read_bytes())
    at = choose.randrange(len(before) or 1)
    match choose.choice(
        ["bit", "bit", "block", "block", "cut", "longer", "missing", "empty", "folder", "pipe", "loop"]
    ):
        case "bit":
            before[at] ^= 1 << choose.randrange(8)
            path.write_bytes(before)
            return f"a bit of byte {at}"
        case "block":
            end = min(len(before), at + choose.choice([1, 64, 512, 4096]))
            path.write_bytes(before[:at] + bytes(end - at) + before[end:])
            return f"zeros at {at}"
        case "cut":
            os.truncate(path, at)
        case "longer":
            path.write_bytes(bytes(before) + bytes(choose.choice([1, 512])))
        case "empty":
            path.write_bytes(b"")
        case how:
            path.unlink()
            if how == "folder":
                path.mkdir()
            elif how == "pipe":
                os.mkfifo(path)
            elif how == "loop":
                path.symlink_to(path.name)
            return how
    return "another length"


def spoilt_in_many_ways(whole, folder, capsys, seeds):
    """Spoils one file of the cache at a time; returns how often that was noticed."""
    noticed = 0
    for seed in seeds:
        choose, cache = random.Random(seed), shutil.copytree(whole[0], folder / str(seed))
        files = sorted(path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
        path = choose.choice(files)
        before = path.read_bytes()
        how = f"seed {seed}: {path.relative_to(cache)}, {spoil(path, choose)}"
        same = path.is_file() and path.read_bytes() == before  # zeros for zeros
        assert content(corpus(cache)) == whole[1], how
        said = capsys.readouterr().err
        assert said.count(": preparing it anew\n") == (not same), f"{how}: {said}"
        assert content(corpus(cache)) == whole[1], how
        assert not capsys.readouterr().err, how
        shutil.rmtree(cache)
        noticed += not same
    return noticed


def test_nothing_else_is_trained_on_whatever_happens_to_a_file(whole, tmp_path, capsys):
    assert spoilt_in_many_ways(whole, tmp_path, capsys, range(15)) > 10


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_nothing_else_is_trained_on_whatever_happens_to_a_file_many_times(whole, tmp_path, capsys):
    first = random.SystemRandom().randrange(10**9)
    with capsys.disabled():
        print(f"\nseeds {first} to {first + 999}")
    assert spoilt_in_many_ways(whole, tmp_path, capsys, range(first, first + 1000)) > 800


@pytest.mark.parametrize("name", ["tokenizer.json", "summary.json", "train_tokens.npy", manifest.NAME])
def test_a_file_that_is_gone_is_made_again(cache, whole, capsys, name):
    (path,) = cache.glob(f"tokens/*/{name}")
    path.unlink()
    assert content(corpus(cache)) == whole[1]
    assert f"{path.parent} is not as it was prepared (" in capsys.readouterr().err
    assert path.exists()


def test_bytes_or_subwords_is_what_was_asked_for_and_not_what_lies_there(cache, whole):
    of_bytes = corpus(cache, "bytes")
    for folder in (cache / "tokens").iterdir():
        if not (folder / "tokenizer.json").exists():
            shutil.copy(next(cache.glob("tokens/*/tokenizer.json")), folder)
    assert corpus(cache, "bytes").vocab_size == of_bytes.vocab_size == 257


def test_rows_are_packed_anew_where_the_tokens_are_others(cache, whole, capsys):
    """As when another version of the tokenizers library trains another vocabulary."""
    (tokens,) = (cache / "tokens").glob("[!.]*")
    (rows,) = (cache / "rows").glob("[!.]*")
    summary = json.loads((tokens / "summary.json").read_text())
    (tokens / "summary.json").write_text(json.dumps(summary | {"digest": "of other tokens"}))
    (tokens / manifest.NAME).unlink()
    manifest.write(tokens)
    corpus(cache)
    assert f"{rows} is not as it was prepared (it was made of other data)" in capsys.readouterr().err


def test_a_large_file_is_compared_block_by_block_as_it_is_read(cache, whole, capsys, monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 256)
    monkeypatch.setattr(manifest, "LARGE_BYTES", 2048)
    (folder,) = (cache / "tokens").glob("[!.]*")
    (folder / manifest.NAME).unlink()
    manifest.write(folder)
    path = folder / "train_tokens.npy"
    assert path.stat().st_size > 2048
    compared = []
    compare = manifest._compare
    monkeypatch.setattr(manifest, "_compare", lambda *given: (compared.append(given[1:3]), compare(*given)))

    data = corpus(cache)
    capsys.readouterr()  # the rows were prepared with other blocks
    assert [number for name, number in compared if name == path.name] == [0]
    first = data.train.take([0])
    read = len(compared)
    assert 1 <= len([number for name, number in compared if name == path.name]) <= 4
    np.testing.assert_array_equal(data.train.take([0])["tokens"], first["tokens"])
    assert len(compared) == read  # each block once
    assert content(data) == whole[1]
    numbers = sorted(number for name, number in compared if name == path.name)
    assert numbers == list(range(len(manifest._read(folder).files[path.name].blocks)))

    damaged = bytearray(path.read_bytes())
    damaged[-700] ^= 1
    path.write_bytes(damaged)
    data = corpus(cache)
    assert not capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"train_tokens.npy isn't what was written at byte .*: the same command"
    ) as raised:
        data.train.take(range(len(data.train)))
    assert "\n" not in str(raised.value)
    assert content(corpus(cache)) == whole[1]
    assert "preparing it anew" in capsys.readouterr().err


def test_a_cache_without_manifests_is_prepared_anew_once(cache, whole, capsys):
    for path in cache.rglob(manifest.NAME):
        path.unlink()
    assert content(corpus(cache)) == whole[1]
    assert capsys.readouterr().err.count("there is no manifest.json, which tells whether data are whole") == 2
    assert content(corpus(cache)) == whole[1]
    assert not capsys.readouterr().err


def test_another_process_goes_on_with_the_old_files(cache, whole):
    """They are unlinked and not written over."""
    before = corpus(cache)
    for path in cache.rglob(manifest.NAME):
        path.unlink()
    corpus(cache)
    assert content(before)[0] == whole[1][0]


def test_what_cannot_be_built_anew_is_said(cache, monkeypatch):
    (folder,) = (cache / "tokens").glob("[!.]*")
    (folder / "tokenizer.json").unlink()

    def fail(folder):
        raise OSError(30, "Read-only file system")

    with pytest.raises(
        UserError, match=r"can't prepare data in .*tokens: Read-only file system; mend that, or name another"
    ):
        prepared(folder, fail)
    assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("damage", ["bit", "kind", "count", "cut"])
def test_kept_hashes_of_files_are_hashed_anew_where_they_are_damaged(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(documents, "SETTLED_SECONDS", -1.0)
    (tmp_path / "a.txt").write_text("text")
    paths = [tmp_path / "a.txt"]
    right = file_digests(paths)
    (kept,) = (tmp_path / "cache" / "crescendo" / "digests").iterdir()
    digest = right[0]
    flipped = digest.replace(digest[0], "0" if digest[0] != "0" else "1")
    spoilt = {"bit": flipped.join(kept.read_text().split(digest)), "kind": "[1]", "count": "[]", "cut": '{"files'}
    kept.write_text(spoilt[damage])
    assert file_digests(paths) == right
