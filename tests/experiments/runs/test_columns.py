"""The training records of long runs, read quickly: what the reader of short ones gives."""

import json
import math

import numpy as np
import pytest

from crescendo.experiments.runs import run as run_module
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import to_json
from crescendo.experiments.runtime.text import RunningMean, running_means


@pytest.fixture
def both(monkeypatch):
    """`both(folder)`: the run as each reader reads it; the second is the quick one."""

    def read(folder):
        found = []
        for many in (10**9, 1):
            monkeypatch.setattr(run_module, "_MANY_LINES", many)
            try:
                found.append(read_run(folder))
            except UserError as error:
                found.append(str(error))
        return found

    return read


def check_same(slow, quick):
    assert list(slow.train) == list(quick.train)
    for name, values in slow.train.items():
        np.testing.assert_array_equal(values, quick.train[name], err_msg=name)
        assert values.dtype == quick.train[name].dtype, name
    assert slow.validation.keys() == quick.validation.keys()
    assert (slow.events, slow.time, slow.gaps) == (quick.events, quick.time, quick.gaps)


def odd_records(records: list[dict]) -> list[dict]:
    """With what a record may hold: null, other columns, texts, truths, numbers that are whole now and then."""
    random = np.random.default_rng(0)
    for i, record in enumerate(records):
        if record["kind"] == "train":
            record |= {"loss": None if i % 7 == 0 else record["loss"] * random.random(), "whole": i, "mixed": i / 2}
            record |= {"mfu": None, "truth": i % 2 == 0, "note": "text", "rare": 3.5} if i % 3 == 0 else {"mixed": i}
    return records


def test_both_readers_give_the_same(make_run, both):
    folder = make_run("run", doublings=(0.3, 0.6), warnings=("look here",))
    path = folder / "metrics.jsonl"
    records = odd_records([json.loads(line) for line in path.read_text().splitlines()])
    path.write_bytes(b"".join(map(to_json, records)))
    slow, quick = both(folder)
    check_same(slow, quick)
    assert quick.train["loss"].dtype == np.float64
    assert "note" not in quick.train
    assert {"whole", "mixed", "rare", "units_seen"} <= quick.train.keys()
    # A torn end is no damage; records that are lost or there twice are told.
    path.write_bytes(path.read_bytes()[:-30])
    check_same(*both(folder))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:40], *lines[60:80], *lines[70:]]))
    slow, quick = both(folder)
    check_same(slow, quick)
    assert len(quick.gaps) == 2


@pytest.mark.parametrize(
    "damage",
    [
        b'{"kind": "train", "examples_seen": 8, "loss": 3.\n',
        b'{"kind": "train", "loss": 3.5}\n',
        b'{"kind": "train", "examples_seen": -8}\n',
        b'{"kind": "train", "examples_seen": 2.5}\n',
        b'{"kind": "train", "examples_seen": 8} {"kind": "train", "examples_seen": 8}\n',
        b'{"kind": "train", "examples_seen": 99999999999999999999}\n',
        b"\x00\x00\x00\n",
        b"[1, 2]\n",
        b'{"kind":"train","examples_seen":8,"batch_size":8}\n',
        b'{"kind": "train", "examples_seen": 8, "batch_size": 8, "loss": NaN}\n',
        b'{"kind": "train", "examples_seen": 8, "batch_size": 8, "loss": "lost"}\n',
        b'{"kind": "train", "examples_seen": 8, "batch_size": 8, "loss": [1, {"a": 2}]}\n',
    ],
)
def test_what_is_odd_is_as_the_other_reader_finds_it(make_run, both, damage):
    folder = make_run("run")
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], damage, *lines[5:]]))
    slow, quick = both(folder)
    if isinstance(slow, str):
        assert quick == slow
    else:
        check_same(slow, quick)


@pytest.mark.parametrize("window", [0.5, 100.0, 1e6])
def test_running_means_of_all_at_once(window):
    random = np.random.default_rng(0)
    values, weights = 3 + random.standard_normal(2000), random.integers(1, 64, size=2000)
    values[random.random(2000) < 0.1] = random.choice([math.nan, math.inf])
    values[:5] = math.nan
    mean = RunningMean(window)
    expected = [mean.add(value, weight) for value, weight in zip(values, weights, strict=True)]
    np.testing.assert_allclose(running_means(values, weights, window), expected, rtol=1e-12)
    assert running_means(np.zeros(0), np.zeros(0), window).shape == (0,)
