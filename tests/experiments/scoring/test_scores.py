"""Scores of rows, what is gone on from, and the rows that are kept."""

import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo import parallel
from crescendo.experiments.data.packing import pack
from crescendo.experiments.data.rows import Rows
from crescendo.experiments.runs.state import TrainState
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import Interrupted
from crescendo.experiments.scoring import rows, scores
from crescendo.experiments.scoring.opened import Opened
from crescendo.experiments.tasks.base import Context
from crescendo.experiments.tasks.language_model import language_model
from crescendo.models import ModelConfig
from crescendo.models.norm_probes import norm_scales, with_probes

LENGTH, MICROBATCH = 8, 4
MODEL = ModelConfig(width=16, layers=2, heads=2, kv_heads=1, mlp_width=32, scan_layers=True).for_platform("cpu")


def opened_on(devices: int) -> Opened:
    """A model of random parameters, over rows with padding and several documents."""
    random = np.random.default_rng(0)
    ends = np.cumsum(random.integers(3, 12, size=20))
    train = Rows(random.integers(0, 60, size=ends[-1] + 1), pack(np.array([0, *ends]), capacity=LENGTH), LENGTH)
    data = SimpleNamespace(train=train, held_out={}, vocab_size=60, sequence_length=LENGTH, fingerprint="rows")
    task = language_model(data, MODEL)
    layout = task.place(parallel.Layout(parallel.make_mesh(data=devices, devices=jax.devices()[:devices])))
    parameters = jax.tree.map(lambda x: 2 * x, jax.jit(task.initialize)(jax.random.key(0)))
    placed = jax.device_put(parameters, layout.parameters(task.logical_axes()))
    state = TrainState(placed, (), jnp.int32(0), jnp.int32(0))
    run = SimpleNamespace(folder=Path("runs/toy"), info={"started": "today"})
    return Opened(run, task, layout, state, 64, 16, MICROBATCH)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def opened():
    return opened_on(1)


def one_row(opened: Opened, number: int) -> dict[str, jax.Array]:
    row = {name: jnp.asarray(x) for name, x in opened.task.train.take([number]).items()}
    return {**row, "example": jnp.array([number])}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_losses_gradients_and_features_are_those_of_each_row_alone(devices):
    """Beside derivatives of one row's mean loss by the scales themselves, in a batch of one."""
    opened, numbers = opened_on(devices), np.array([5, 0, 3, 7, 1])
    task, parameters = opened.task, jax.tree.map(jnp.asarray, jax.device_get(opened.state.parameters))

    def loss(scales, row):
        total, weight = task.evaluate(with_probes(parameters, scales), row, Context(training=False))["loss"]
        return total / weight

    @jax.jit
    def alone(row):
        zeros = {name: jnp.zeros((*x.shape[:-1], 1, x.shape[-1])) for name, x in norm_scales(parameters).items()}
        return jax.value_and_grad(loss)(zeros, row), task.features(parameters, row, Context(training=False))

    found = [measure(opened)(numbers) for measure in (rows.losses, rows.gradient_norms, rows.features)]
    assert [each.shape for each in found] == [(5,), (5,), (5, 16)]
    for i, number in enumerate(numbers.tolist()):
        (value, gradient), features = alone(one_row(opened, number))
        norm = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in gradient.values()))
        np.testing.assert_allclose([found[0][i], found[1][i]], [value, norm], rtol=5e-5)
        np.testing.assert_allclose(found[2][i], features[0], rtol=1e-4, atol=1e-5)


def test_features_are_means_over_what_is_no_padding(opened):
    """What stands on padding changes nothing."""
    (number,) = np.flatnonzero((opened.task.train.take(range(len(opened.task.train)))["segment_ids"] == 0).any(1))[:1]
    row, parameters = one_row(opened, int(number)), opened.state.parameters
    other = {**row, "tokens": jnp.where(row["segment_ids"] == 0, 7, row["tokens"])}
    assert (other["tokens"] != row["tokens"]).any()
    of_row, of_other = (opened.task.features(parameters, each, Context(training=False)) for each in (row, other))
    np.testing.assert_allclose(of_row, of_other, rtol=1e-5, atol=1e-6)


OPTIONS = scores.Options(clusters=3, bins=2, block_rows=8)


# Those of features share what takes long to compile.
SLOW = ("loss", "gradient_norm")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in scores.SCORES]


@pytest.mark.parametrize("name", NAMES)
def test_every_score_is_written_and_read_again(name, opened, tmp_path):
    said: list[str] = []
    found = scores.scored(opened, name, OPTIONS, tmp_path / "scores.npz", said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]
    count = len(opened.task.train)
    assert (len(found.scores), found.sources.tolist(), found.data) == (count, [count], "rows")
    assert len(set(found.scores.tolist())) > 2
    again = scores.scored(opened, name, OPTIONS, tmp_path / "scores.npz", said.append)
    np.testing.assert_array_equal(again.scores, found.scores)
    assert said == [f"{tmp_path}/scores.npz has the scores already"]
    (tmp_path / "scores.npz").unlink()
    anew = scores.scored(opened, name, OPTIONS, tmp_path / "scores.npz", said.append)
    np.testing.assert_array_equal(anew.scores, found.scores)
    high, low = scores.kept(found, 0.25), scores.kept(found, 0.25, low=True)
    assert len(high.rows) == len(low.rows) == round(count / 4)
    assert found.scores[high.rows].min() >= np.delete(found.scores, high.rows).max()
    assert found.scores[low.rows].max() <= np.delete(found.scores, low.rows).min()
    other = scores.Options(seed=1) if scores.SCORES[name].options else None
    with pytest.raises(UserError, match=rf"scores\.npz holds other scores \({name}.*\): give another --out"):
        scores.scored(opened, name if other else "random", other or OPTIONS, tmp_path / "scores.npz", said.append)


def test_what_was_computed_is_gone_on_from(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "PIECE_ROWS", MICROBATCH)
    count, computed = len(opened.task.train), []

    def counted(opened):
        def call(numbers):
            computed.extend(numbers.tolist())
            if len(computed) == 2 * MICROBATCH:
                signal.raise_signal(signal.SIGTERM)
            return numbers.astype(np.float32)

        return call

    monkeypatch.setitem(scores.SCORES, "loss", scores.SCORES["loss"]._replace(measure=counted))
    path = tmp_path / "scores.npz"
    with pytest.raises(Interrupted, match=rf"8 of {count} rows are done; the same command goes on"):
        scores.scored(opened, "loss", OPTIONS, path, print)
    (pieces,) = tmp_path.iterdir()
    (pieces / f"{MICROBATCH}.npy").write_bytes(b"damaged")
    assert scores.scored(opened, "loss", OPTIONS, path, print).scores.tolist() == list(range(count))
    assert computed == [*range(8), *range(4, count)]


def test_what_isn_t_finite_is_refused_with_the_row(opened, tmp_path, monkeypatch):
    broken = scores.SCORES["loss"]._replace(
        measure=lambda _: lambda numbers: np.where(numbers == 3, np.nan, 1.0).astype(np.float32)
    )
    monkeypatch.setitem(scores.SCORES, "loss", broken)
    with pytest.raises(UserError, match=r"--score loss: what the model makes of row 3 isn't finite"):
        scores.scored(opened, "loss", OPTIONS, tmp_path / "scores.npz", print)
    assert not list(tmp_path.iterdir())


def test_more_clusters_than_rows_are_refused(opened, tmp_path):
    with pytest.raises(UserError, match=r"--clusters 5000 are more than the \d+ rows: use fewer"):
        scores.scored(opened, "centroid_distance", scores.Options(clusters=5000), tmp_path / "scores.npz", print)
