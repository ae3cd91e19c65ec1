"""A run that begins as a dense one with experts: the loss is where it was, and goes on falling."""

import math

import jax
import numpy as np
import pytest

from crescendo import parallel
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.export import export
from crescendo.experiments.runs import trained
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.session import Session, session_options
from crescendo.experiments.trainer.starting import fresh_state
from crescendo.experiments.trainer.training import train

EXPERTS = ("model.experts = 4", "model.shared_expert_width = 16")


@pytest.fixture(scope="module")
def dense(train_small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dense"
    return folder, train_small(folder)["loss"]


@pytest.fixture
def session(small_bindings):
    def make(*bindings: str, **options) -> Session:
        configurables.bind(train, ["debug.gin"], [*EXPERTS, *bindings], own=small_bindings)
        return Session(**session_options(configurables.arguments(train) | options))

    return make


def test_experts_are_copies_of_what_a_run_or_an_export_of_it_has(dense, session, tmp_path):
    export(dense[0], tmp_path / "hf")
    there, upcycles = trained.load(dense[0]).parameters, session()
    for folder in dense[0], tmp_path / "hf":
        made = fresh_state(upcycles, str(folder)).parameters
        np.testing.assert_array_equal(
            made["blocks"]["attention_norm"]["scale"], there["blocks"]["attention_norm"]["scale"]
        )
        for name in ("gate", "up", "down"):
            copies, one = made["blocks"]["mlp"][name], there["blocks"]["mlp"][name]["kernel"]
            np.testing.assert_array_equal(copies, np.stack([one] * 4, axis=1))
        assert np.any(made["blocks"]["mlp"]["router"]["kernel"])


def test_what_does_not_fit_the_dense_run_is_refused(dense, session):
    for binding, message in [
        ("model.experts_per_token = 1", "experts_per_token = 1 scales .* use at least 2"),
        ("model.expert_width = 16", "expert_width = 16, but .* have the width 32, .*: set expert_width = 32"),
        ("model.width = 32", r"its blocks\.attention\.key\.kernel is \(1, 16, 1, 8\), this model's"),
        ("model.qk_norm = False", "has other parameters than this model"),
    ]:
        with pytest.raises(UserError, match=message):
            fresh_state(session(binding), str(dense[0]))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{}, {"data": 1, "fsdp": 2, "expert": 2}], ids=str)
def test_the_loss_is_where_the_dense_run_left_it(dense, session, axes):
    mesh = parallel.make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
    upcycles = session(mesh=mesh)
    state = fresh_state(upcycles, str(dense[0]))
    assert upcycles.evaluation(16)(state)["loss"] == pytest.approx(dense[1], rel=1e-6)


@pytest.mark.slow
def test_it_goes_on_falling(dense, train_small, tmp_path):
    start = f"train.initialize_from = '{dense[0]}'"
    ended = train_small(tmp_path / "experts", *EXPERTS, start, "schedules.linear.peak = 3e-3")
    run = read_run(tmp_path / "experts")
    assert ended["loss"] < 0.98 * dense[1]
    before, terms = read_run(dense[0]).train["loss"][-4:].mean(), 0.01 * 1 + 0.001 * np.log(4) ** 2
    assert run.train["loss"][0] == pytest.approx(before + terms, rel=0.05)  # other rows
