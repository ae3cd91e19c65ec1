"""Every task over text trains a model with experts: cut anywhere, on devices that share them, and through stages."""

import inspect
import math

import jax
import numpy as np
import pytest

from crescendo import parallel
from crescendo.experiments.configs.factories import FACTORIES
from crescendo.experiments.tasks.base import Context
from crescendo.experiments.tasks.text import TextTask
from crescendo.models.moe import TOLD

from .conftest import assert_any_cut, assert_same_on, assert_same_through_stages, fresh, read

EXPERTS = 4
# Of a gradient's largest entry: half of the parameters moved by one ulp, on one device, move entries by 2e-5 to 9e-4 of
# it (four draws for each task, with two layers and with four).
ROUNDING = 1e-3
TASKS = {
    name: make
    for name, make in FACTORIES["tasks"].items()
    if issubclass(inspect.signature(make, eval_str=True).return_annotation, TextTask)
}


@pytest.fixture(params=TASKS)
def make(request, text, small_model):
    options = {"experts": EXPERTS, "experts_per_token": 2, "expert_width": 8, "balance_loss": 0.3, "router_z_loss": 0.1}
    return lambda **changes: TASKS[request.param](text, small_model(**options, **changes))


# One is seen every day, and the decoder's own in `models/test_moe.py`.
@pytest.mark.parametrize(
    "make",
    [pytest.param(name, marks=() if name == "masked_lm" else pytest.mark.slow) for name in TASKS],
    indirect=True,
)
def test_what_experts_add_does_not_depend_on_the_cut(make):
    task = make()
    whole = assert_any_cut(task, read(task.train, range(4)))
    assert whole.extra.keys() == {*TOLD}
    # Means over the loss's own weight: routers begin nearly even.
    assert 0.7 * math.log(EXPERTS) < whole.extra["router_entropy"] / whole.weight <= math.log(EXPERTS)


@pytest.mark.slow
def test_loads_of_held_out_rows_are_shares(make):
    task = make(layers=4, moe_every=2)
    scores = jax.jit(lambda p, rows: task.evaluate(p, rows, Context()))(fresh(task), read(task.train, range(4)))
    loads = {name: x / weight for name, (x, weight) in scores.items() if name.startswith("expert_load_")}
    assert len(loads) == 2 * EXPERTS
    np.testing.assert_allclose(sum(loads.values()), 2, rtol=1e-5)


@pytest.mark.slow
def test_devices_with_experts_of_their_own_will_do(make):
    assert_same_on(make(), {"data": 1, "expert": 2, "fsdp": 2}, read(make().train, range(4)), tolerance=ROUNDING)


@pytest.mark.slow
def test_stages_will_do(make):
    task = make(layers=4, moe_every=2)
    assert_same_through_stages(task, read(task.train, range(8)), {"expert": 2}, tolerance=ROUNDING)


def test_layers_with_experts_that_stages_cannot_share_are_refused_with_those_that_can(make):
    layout = parallel.Layout(parallel.make_mesh(data=1, stage=2, devices=jax.devices()[:2]))
    message = "^layers = 2 are 1 group of moe_every = 2, which stage = 2 does not divide: use a stage of 1, or layers"
    with pytest.raises(ValueError, match=message):
        make(moe_every=2).place(layout)
