"""The closed form of a step's traffic against programs compiled for the CPU, where these say enough."""

import functools

import jax
import pytest

from crescendo import models, optim, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.planning.mesh import step_work
from crescendo.experiments.trainer.session import Session
from crescendo.models import ModelConfig
from crescendo.parallel.collectives import traffic
from crescendo.parallel.costs import step_traffic

LENGTH = 64


def compiled_and_closed(kv_heads: int, axes: dict[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that a device sends, by kind, in a compiled step and in closed form."""
    config = ModelConfig.preset(
        "debug", width=256, layers=2, heads=8, kv_heads=kv_heads, mlp_width=64, vocab_size=128, scan_layers=True
    ).for_platform("cpu")
    mesh = parallel.make_mesh(**{"data": 1} | axes)
    shards = parallel.Layout(mesh).batch_shards
    session = Session(
        data=RandomText(128, LENGTH),
        model=config,
        optimizer=optim.adamw(1e-3),
        batch_size=shards,
        total_examples=2**20,
        mesh=mesh,
    )
    layout = session.layout
    plan = parallel.BatchPlan(shards, 1)
    found = traffic(session.lower(plan).compile().as_text())
    work = step_work(config, plan, LENGTH)
    arrays = jax.eval_shape(functools.partial(models.initialize, config), jax.random.key(0))
    expected = step_traffic(layout, arrays, models.logical_axes(config), work)
    return {kind: t.sent_bytes for kind, t in found.items()}, expected


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "kv_heads"), [({"tensor": 8}, 2), ({"fsdp": 2, "tensor": 4}, 2)])
def test_copies_of_key_heads_send_what_the_closed_form_says(quick_compilation, axes, kv_heads):
    # All else is as where each device has a key head of its own, so the difference is that of the copies.
    copied, closed_copied = compiled_and_closed(kv_heads, axes)
    own, closed_own = compiled_and_closed(axes["tensor"], axes)
    for kind in ("all-gather", "all-reduce"):
        more = closed_copied[kind] - closed_own[kind]
        assert more > 0
        assert copied[kind] - own[kind] == pytest.approx(more, rel=0.01), kind
    assert copied["reduce-scatter"] == own["reduce-scatter"]
