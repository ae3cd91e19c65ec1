"""Scores of a run's rows, rows kept by them, and a run on these."""

import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.experiments import select_rows as command
from crescendo.experiments.data.subset import read_subset
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import Interrupted
from crescendo.experiments.scoring import rows, scores
from crescendo.experiments.scoring.opened import open_run
from crescendo.experiments.tasks.base import Context
from crescendo.models.norm_probes import norm_scales, with_probes


@pytest.fixture(scope="module")
def run(train_small, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_small(folder, "train.total_examples = 128")
    return folder


@pytest.fixture(autouse=True)
def _cache(run, small_bindings, monkeypatch):
    """Prepared data go where the run's are."""
    (directory,) = [binding for binding in small_bindings if "cache_directory" in binding]
    monkeypatch.setenv("XDG_CACHE_HOME", directory.split("'")[1])


@pytest.fixture
def opened(run):
    return open_run(run)


def selected(run: Path, folder: Path, *words: str) -> scores.Scores:
    command.main([str(run), "--out", str(folder / "scores.npz"), *words])
    return scores.read_scores(folder / "scores.npz")


def test_losses_and_gradients_are_those_of_each_row_alone(opened):
    """Beside derivatives of one row's mean loss by the scales themselves, in a batch of one."""
    task, numbers = opened.task, np.array([5, 0, 3])
    parameters = jax.tree.map(jnp.asarray, jax.device_get(opened.state.parameters))

    def loss(scales, row):
        total, weight = task.evaluate(with_probes(parameters, scales), row, Context(training=False))["loss"]
        return total / weight

    zeros = {name: jnp.zeros((*x.shape[:-1], 1, x.shape[-1])) for name, x in norm_scales(parameters).items()}
    of_row = jax.jit(jax.value_and_grad(loss))
    found = rows.losses(opened)(numbers), rows.gradient_norms(opened)(numbers)
    for i, number in enumerate(numbers.tolist()):
        row = {name: jnp.asarray(x) for name, x in task.train.take([number]).items()}
        value, gradient = of_row(zeros, {**row, "example": jnp.array([number])})
        norm = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in gradient.values()))
        np.testing.assert_allclose([found[0][i], found[1][i]], [value, norm], rtol=2e-5)


def test_features_leave_padding_out_and_are_of_each_row_alone(opened):
    task = opened.task
    of_some = rows.features(opened)(np.array([1, 4]))
    row = {name: jnp.asarray(x) for name, x in task.train.take([4]).items()}
    parameters = jax.tree.map(jnp.asarray, jax.device_get(opened.state.parameters))
    alone = task.features(parameters, {**row, "example": jnp.array([4])}, Context())
    np.testing.assert_allclose(of_some[1], alone[0], rtol=1e-4, atol=1e-5)
    assert of_some.shape == (2, task.config.width)


@pytest.mark.parametrize(
    ("score", "options"),
    [
        ("loss", []),
        ("centroid_distance", ["--clusters", "4"]),
        ("facility_location", ["--block-rows", "64"]),
        ("dataset_quantization", ["--bins", "3"]),
        ("random", ["--seed", "5"]),
    ],
)
def test_rows_are_scored_and_kept(score, options, run, tmp_path, capsys):
    subset = tmp_path / "few.npz"
    words = ["--score", score, *options]
    found = selected(run, tmp_path, *words, "--keep", "0.25", "--subset", str(subset))
    chosen = read_subset(subset)
    assert len(chosen.rows) == round(len(found.scores) / 4)
    assert found.scores[chosen.rows].min() >= np.delete(found.scores, chosen.rows).max()
    assert (chosen.data, chosen.of_rows) == (found.data, len(found.scores))
    shown = capsys.readouterr().out
    assert f"few.npz: {len(chosen.rows):,} of {chosen.of_rows:,} rows, by highest 0.25 of {score}" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"scores.npz", "few.npz"}
    if score == "loss":
        selected(run, tmp_path, *words, "--keep", "0.25", "--prefer", "low", "--subset", str(subset))
        assert "has the scores already" in capsys.readouterr().out
        low = read_subset(subset).rows
        assert found.scores[low].max() <= np.delete(found.scores, low).min()
        with pytest.raises(UserError, match=r"scores\.npz holds other scores \(loss of .*\): give another --out"):
            selected(run, tmp_path, "--score", "gradient_norm")


def test_what_was_computed_is_gone_on_from(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "PIECE_ROWS", 128)
    whole = selected(run, tmp_path, "--score", "loss").scores
    (tmp_path / "scores.npz").unlink()
    computed: list[int] = []

    def counted(opened):
        measure = rows.losses(opened)

        def call(numbers):
            computed.extend(numbers.tolist())
            if len(computed) == 256:
                signal.raise_signal(signal.SIGTERM)
            return measure(numbers)

        return call

    monkeypatch.setitem(scores.SCORES, "loss", scores.SCORES["loss"]._replace(measure=counted))
    with pytest.raises(Interrupted, match=rf"256 of {len(whole):,} rows are done; the same command goes on"):
        selected(run, tmp_path, "--score", "loss")
    (pieces,) = tmp_path.iterdir()
    (pieces / "128.npy").write_bytes(b"damaged")
    again = selected(run, tmp_path, "--score", "loss").scores
    np.testing.assert_array_equal(again, whole)
    assert computed == [*range(256), *range(128, len(whole))]


def test_a_run_on_some_rows_counts_these_and_goes_on_only_with_them(run, train_small, tmp_path, capsys):
    found = selected(run, tmp_path, "--score", "random", "--keep", "0.5", "--subset", str(tmp_path / "half.npz"))
    half, folder = tmp_path / "half.npz", tmp_path / "run"
    binding = f"train.rows = '{half}'"
    train_small(folder, binding, "train.total_examples = 128")
    kept = len(read_subset(half).rows)
    shown = capsys.readouterr().out
    assert f"trained on {kept:,} of {len(found.scores):,} rows, by highest 0.5 of random, seed 0" in shown
    assert f"{128 / kept:.2g} passes over the data" in shown
    fixed = json.loads((folder / "run.json").read_text())["fixed"]
    assert fixed["data"] != json.loads((run / "run.json").read_text())["fixed"]["data"]
    assert len(open_run(folder).task.train) == len(found.scores), "scores are of all rows"
    shutil.copytree(folder, tmp_path / "other")
    selected(run, tmp_path, "--score", "random", "--keep", "0.25", "--subset", str(half))
    with pytest.raises(UserError, match=r"can't go on: data was \w+ and is now \w+, a hash of .*the chosen"):
        train_small(tmp_path / "other", binding, "train.total_examples = 256")
    selected(run, tmp_path, "--score", "random", "--keep", "0.01", "--subset", str(half))
    with pytest.raises(UserError, match=r"the data have \d+ rows, fewer than one batch of 16"):
        train_small(tmp_path / "few", binding)


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


def test_more_clusters_than_rows_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"--clusters 5000 are more than the [\d,]+ rows: use fewer"):
        selected(run, tmp_path, "--score", "centroid_distance", "--clusters", "5000")
