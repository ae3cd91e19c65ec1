"""Rows kept by scores compared with random ones."""

import json

import pytest

from crescendo.experiments.data.subset import read_subset
from crescendo.experiments.papers.data_pruning import data_pruning, main
from crescendo.experiments.runtime.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kept", "1"], r"--kept 1\.0: give shares between 0 and 1, increasing"),
        (["--kept", "0.5", "0.2"], r"--kept 0\.5 0\.2: give shares"),
        (["--by", "loss"], r"--by loss: no such choice; there are random, loss-high, loss-low, gradient_norm-high"),
        (["--set", "train.rows = 'few.npz'"], r"sets train\.rows itself: give --by"),
    ],
)
def test_what_can_t_be_is_one_line(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(["--run", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_every_arm_trains_on_its_rows(small_bindings, tmp_path):
    options = {"bindings": small_bindings, "kept": [0.5], "by": ["random", "loss-high"], "clusters": 4}
    records = data_pruning(tmp_path, **options)
    assert list(records) == ["all", "random-50", "loss-high-50"]
    assert [arm["arm"] for arm in json.loads((tmp_path / "comparison.json").read_text())] == [*records]
    chosen = {name: read_subset(tmp_path / "rows" / f"all-{name}-50.npz") for name in ("random", "loss-high")}
    assert len({len(each.rows) for each in chosen.values()}) == 1
    fixed = {name: json.loads((tmp_path / name / "run.json").read_text())["fixed"]["data"] for name in records}
    assert len(set(fixed.values())) == 3
    # The same command trains nothing again.
    before = (tmp_path / "loss-high-50" / "metrics.jsonl").read_bytes()
    assert data_pruning(tmp_path, **options) == records
    assert (tmp_path / "loss-high-50" / "metrics.jsonl").read_bytes() == before
