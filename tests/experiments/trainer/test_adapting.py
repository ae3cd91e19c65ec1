"""A run goes on under another batch size, policy, noise scale or guard: what is carried over, and what begins anew."""

import json

import jax
import numpy as np
import pytest

from crescendo import optim, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.adapting import Adapting
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.starting import state_of
from crescendo.experiments.trainer.training import train
from crescendo.models import ModelConfig
from crescendo.optim.batch_size import staged

MODEL = ModelConfig(vocab_size=32, width=8, layers=1, heads=2, kv_heads=1, mlp_width=16)


def options(devices: int = 1, **given) -> dict:
    return {
        "data": RandomText(32, 8),
        "model": MODEL,
        "optimizer": optim.adamw(1e-3),
        "batch_size": 8,
        "total_examples": 384,
        "max_microbatch_examples": 4,
        "mesh": parallel.make_mesh(devices=jax.devices()[:devices]),
        **given,
    }


SETTINGS = {
    "constant": {"batch_size": 8},
    "staged": {"batch_size": staged([8, 16], starts_examples=[0, 16])},
    "noise": {"noise_scale": optim.gradient_noise_scale()},
    "guard": {"guard": optim.guard(16)},
    "following": {"batch_size": optim.noise_scale_following(8, 64), "guard": optim.guard(8)},
    "norm test": {"batch_size": optim.norm_test(8, 16), "noise_scale": optim.gradient_noise_scale(norm_layers=True)},
}


@pytest.fixture(scope="module")
def adapting() -> dict[str, Adapting]:
    return {name: Adapting(Session(**options(**settings))) for name, settings in SETTINGS.items()}


@pytest.mark.parametrize("before", SETTINGS)
@pytest.mark.parametrize("now", SETTINGS)
def test_what_is_carried_from_each_setting_to_each(adapting, before, now):
    carried, wanted = adapting[now].carried(adapting[before].wanted), adapting[now].wanted
    assert carried is not None
    # Each goes to where the same names end, and all of parameters and optimizer go.
    assert all(wanted[own] == adapting[before].wanted[there] for own, there in carried.items())
    assert all(own[-1] == there[-1] for own, there in carried.items())
    essential = [path for path in wanted if path[0] != "opt_state" or {"mu", "nu", "learning_rate"} & set(path)]
    assert set(essential) <= carried.keys()
    assert len(set(carried.values())) == len(carried)
    assert (carried.keys() == wanted.keys()) == (
        before == now or {before, now} == {"constant", "staged"} or now in ("constant", "staged")
    )


def test_another_optimizer_or_average_is_not_taken(adapting):
    for other in ({"optimizer": optim.lion(1e-3)}, {"average_examples": 64}, {"optimizer": optim.lamb(1e-3)}):
        assert Adapting(Session(**options(**other))).carried(adapting["constant"].wanted) is None


def go_on(folder, total: int, **given) -> dict:
    return train(
        run=str(folder),
        evaluation_examples=8,
        evaluate_every_examples=10**6,
        checkpoint_every_examples=10**6,
        **options(total_examples=total, **given),
    )


@pytest.mark.slow
def test_one_run_under_many_settings_is_that_of_a_schedule(tmp_path):
    """Policies of a single size, so that a schedule is the reference; the guard and the noise scale change nothing."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    go_on(run, 64, batch_size=8)
    go_on(run, 160, batch_size=16, devices=2, noise_scale=optim.gradient_noise_scale())
    go_on(run, 256, batch_size=optim.noise_scale_following(32, 32), devices=4, guard=optim.guard(16))
    go_on(run, 304, batch_size=staged([8, 16], starts_examples=[0, 10**6]), max_microbatch_examples=None)
    # Decided by the update of batch n, the size is that of batch n + 2.
    go_on(whole, 304, batch_size=staged([8, 16, 32, 16, 8], starts_examples=[0, 56, 144, 224, 272]))
    found, expected = read_run(run).train, read_run(whole).train
    assert found["batch_size"].tolist() == [8] * 8 + [16] * 6 + [32] * 3 + [16] * 2 + [8] * 2
    assert expected["batch_size"].tolist() == found["batch_size"].tolist()
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    # The rate stays meant for the batch that the run began with.
    np.testing.assert_allclose(found["learning_rate"], 1e-3 * np.sqrt(found["batch_size"] / 8), rtol=1e-6)
    assert json.loads((run / "run.json").read_text())["base_batch_size"] == 8


@pytest.mark.slow
def test_a_base_that_is_given_counts(tmp_path, capsys):
    go_on(tmp_path, 32)
    go_on(tmp_path, 64, batch_size=16)
    assert "batch: 16 (the learning rate is meant for 8)" in capsys.readouterr().out
    go_on(tmp_path, 96, batch_size=16, base_batch_size=16)
    rates = read_run(tmp_path).train["learning_rate"]
    np.testing.assert_allclose(rates, [1e-3] * 4 + [1e-3 * 2**0.5] * 2 + [1e-3] * 2, rtol=1e-6)


@pytest.mark.slow
def test_what_was_known_is_kept_and_other_ladders_take_the_size_over(tmp_path):
    go_on(tmp_path, 64, **SETTINGS["noise"])
    before = read_run(tmp_path).train["noise_scale_error"][-1]
    go_on(tmp_path, 128, **SETTINGS["noise"], batch_size=16, guard=optim.guard(16))
    after = read_run(tmp_path).train["noise_scale_error"]
    assert np.isfinite(before)
    assert after[8] != before  # one estimate more, of all so far
    assert np.isfinite(after[8:]).all()
    go_on(tmp_path, 188, batch_size=staged([12, 24], starts_examples=[0, 10**6]))
    assert read_run(tmp_path).train["batch_size"][-5:].tolist() == [12] * 5  # 16 isn't on this one


@pytest.mark.slow
def test_what_is_not_carried_over_is_refused_by_name(tmp_path):
    go_on(tmp_path, 32)
    with pytest.raises(UserError, match=r"can't go on: arrays\."):
        go_on(tmp_path, 64, optimizer=optim.lion(1e-3))


@pytest.mark.slow
def test_another_runs_checkpoint_is_taken_as_well(tmp_path):
    go_on(tmp_path, 32, **SETTINGS["noise"])
    session = Session(**options(**SETTINGS["following"]))
    state, clock = state_of(f"{tmp_path}@32", session)
    assert clock.examples_seen == 32
    assert int(state.opt_state.guard_state.count) == 0
    assert jax.tree.structure(state) == jax.tree.structure(session.abstract_state)


@pytest.mark.slow
def test_a_flipped_bit_is_found_where_a_state_is_adapted(tmp_path):
    go_on(tmp_path, 32)
    chunks = [path for path in (tmp_path / "checkpoints" / "32" / "state").rglob("*") if path.stat().st_size > 2000]
    largest = max(chunks, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        go_on(tmp_path, 64, **SETTINGS["guard"])
