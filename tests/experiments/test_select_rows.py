"""The command that scores and keeps rows, and a run on these."""

import json
import shutil

import pytest

from crescendo.experiments import select_rows as command
from crescendo.experiments.data.subset import read_subset
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.scoring.opened import open_run
from crescendo.experiments.scoring.scores import read_scores


@pytest.mark.slow
def test_a_run_on_chosen_rows_counts_these_and_goes_on_only_with_them(
    train_small, small_bindings, tmp_path, monkeypatch, capsys
):
    (directory,) = [binding for binding in small_bindings if "cache_directory" in binding]
    monkeypatch.setenv("XDG_CACHE_HOME", directory.split("'")[1])
    total, scores, half = "train.total_examples = 128", tmp_path / "scores.npz", tmp_path / "half.npz"
    train_small(tmp_path / "all", total)
    words = [str(tmp_path / "all"), "--score", "loss", "--out", str(scores), "--subset", str(half), "--keep"]
    command.main([*words, "0.5"])
    count, kept = len(read_scores(scores).scores), len(read_subset(half).rows)
    assert kept == round(count / 2)
    shown = capsys.readouterr().out
    by = f"{kept:,} of {count:,} rows, by highest 0.5 of loss of {tmp_path}/all at 128 examples"
    assert by in shown
    run, binding = tmp_path / "run", f"train.rows = '{half}'"
    train_small(run, binding, total)
    shown = capsys.readouterr().out
    assert f"trained on {by}" in shown
    assert f"{128 / kept:.2g} passes over the data" in shown
    fixed = {name: json.loads((tmp_path / name / "run.json").read_text())["fixed"] for name in ("all", "run")}
    assert fixed["all"]["data"] == read_subset(half).data != fixed["run"]["data"]
    assert len(open_run(run).task.train) == count, "scores are of all rows"
    # It goes on with the same rows, and with no others.
    shutil.copytree(run, tmp_path / "other")
    train_small(run, binding, "train.total_examples = 256")
    command.main([*words, "0.25", "--prefer", "low"])
    assert "has the scores already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"can't go on: data was \w+ and is now \w+, a hash of .*the chosen"):
        train_small(tmp_path / "other", binding, "train.total_examples = 256")
    command.main([*words, "0.003"])
    with pytest.raises(UserError, match=r"the data have \d+ rows, fewer than one batch of 16"):
        train_small(tmp_path / "few", binding, total)
    with pytest.raises(UserError, match=r"rows of other data \(fingerprint"):
        train_small(tmp_path / "few", binding, total, "SEQUENCE_LENGTH = 16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0"], r"--keep 0 must be above 0 and at most 1"),
        (["--keep", "nan"], r"--keep nan must be above 0 and at most 1"),
        (["--keep", "0.5"], r"--keep 0\.5 needs --subset FILE"),
        (["--keep", "0.5", "--subset", "out.npz"], r"--subset out\.npz is the file of the scores"),
        (["--subset", "few.npz"], r"--subset is of rows that are kept: add --keep SHARE"),
        (["--prefer", "low"], r"--prefer is of rows that are kept: add --keep SHARE"),
        (["--clusters", "3"], r"--clusters is nothing that --score loss takes: leave it out"),
        (["--score", "centroid_distance", "--clusters", "0"], r"--clusters 0 must be at least 1"),
        (["--score", "random", "--seed", "-1"], r"--seed -1 must be at least 0 and below 2\^31"),
    ],
)
def test_what_can_t_be_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        command.main(["nowhere", "--score", "loss", "--out", "out.npz", *words])
