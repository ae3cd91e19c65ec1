"""The closed form of a step's traffic against programs compiled for the CPU, where these say enough."""

import functools

import jax
import optax
import pytest

from crescendo import models, optim, parallel
from crescendo.experiments.state import abstract_batch, abstract_state, make_step, state_shardings
from crescendo.models import ModelConfig
from crescendo.optim.batch_size import adaptive_batch_size, constant
from crescendo.parallel.collectives import traffic
from crescendo.parallel.costs import Work, step_traffic

LENGTH = 64


def compiled_and_closed(kv_heads: int, axes: dict[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that a device sends, by kind, in a compiled step and in closed form."""
    config = ModelConfig.preset(
        "debug", width=256, layers=2, heads=8, kv_heads=kv_heads, mlp_width=64, vocab_size=128, scan_layers=True
    ).for_platform("cpu")
    layout = parallel.Layout(parallel.make_mesh(**{"data": 1} | axes)).with_heads(config.heads, kv_heads)
    plan = parallel.BatchPlan(layout.batch_shards, 1)
    chain = optax.chain(optim.adamw(1e-3), adaptive_batch_size(constant(layout.batch_shards)))
    shardings = state_shardings(config, chain, layout)
    step = jax.jit(make_step(config, chain, max_gradient_norm=1.0, layout=layout), out_shardings=(shardings, None))
    inputs = abstract_state(config, chain, shardings), abstract_batch(layout, plan, LENGTH)
    found = traffic(step.lower(*inputs).compile().as_text())
    work = Work(
        microbatches=1,
        examples=layout.batch_shards,
        sequence_length=LENGTH,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        kv_heads=kv_heads,
        head_width=config.head_size,
        compute_bytes=4,
    )
    arrays = jax.eval_shape(functools.partial(models.initialize, config), jax.random.key(0))
    expected = step_traffic(layout, arrays, models.logical_axes(config), work)
    return {kind: t.sent_bytes for kind, t in found.items()}, expected


@pytest.mark.parametrize(
    ("axes", "kv_heads"),
    [({"tensor": 8}, 2), pytest.param({"fsdp": 2, "tensor": 4}, 2, marks=pytest.mark.slow)],
)
def test_copies_of_key_heads_send_what_the_closed_form_says(quick_compilation, axes, kv_heads):
    # All else is as where each device has a key head of its own, so the difference is that of the copies.
    copied, closed_copied = compiled_and_closed(kv_heads, axes)
    own, closed_own = compiled_and_closed(axes["tensor"], axes)
    for kind in ("all-gather", "all-reduce"):
        more = closed_copied[kind] - closed_own[kind]
        assert more > 0
        assert copied[kind] - own[kind] == pytest.approx(more, rel=0.01), kind
    assert copied["reduce-scatter"] == own["reduce-scatter"]
