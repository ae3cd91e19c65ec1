"""The closed form of a step's traffic against programs compiled for the CPU, where these say enough."""

import dataclasses
import functools

import jax
import pytest

from crescendo import models, optim, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.planning.mesh import step_work
from crescendo.experiments.trainer.session import Session
from crescendo.models import ModelConfig
from crescendo.parallel.collectives import traffic
from crescendo.parallel.costs import Links, expert_splits, seconds, step_sends, step_traffic

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


SPARSE = ModelConfig(
    vocab_size=128, width=256, layers=4, heads=8, mlp_width=64, experts=16, experts_per_token=2, expert_width=512
).for_platform("gpu")
FAST = Links(within=100e9, across=10e9, devices=8)


def splits_of(axes: dict[str, int], *, rows: int, plan="fsdp", config=SPARSE, links=FAST):
    """Every way to split the experts of 64 devices, each with so many rows of 64 tokens in a microbatch."""
    layout = parallel.Layout(parallel.MeshSpec(**{"data": 1} | axes).abstract(64), plan)
    arrays = jax.eval_shape(functools.partial(models.initialize, config), jax.random.key(0))
    work = step_work(config, parallel.BatchPlan(rows * layout.batch_shards, 1), LENGTH)
    assert config.experts is not None
    return expert_splits(layout, arrays, models.logical_axes(config), work, experts=config.experts, links=links)


def test_tokens_are_sent_where_they_are_less_than_weights():
    for rows, sent in ((1, True), (4096, False)):
        by_bytes = splits_of({"fsdp": 8, "tensor": 8}, rows=rows, links=None)
        of = {split.axes: split.rows + split.rest for split in by_bytes}
        # Over all 64 there are too many devices for 16 experts.
        assert set(of) == {("fsdp",), ("tensor",), ()}
        assert (of["fsdp",] < of[()]) == sent, rows
        assert list(of.values()) == sorted(of.values())


def test_what_crosses_to_other_hosts_decides_where_those_links_are_slow():
    # Along fsdp tokens go from host to host, along tensor they stay on theirs.
    axes, rows = {"fsdp": 8, "tensor": 8}, 512
    by_time, even = splits_of(axes, rows=rows), splits_of(axes, rows=rows, links=Links(1e9, 1e9, 8))
    assert [split.axes for split in by_time][-1] == ("fsdp",)
    assert [split.seconds for split in by_time] == sorted(split.seconds for split in by_time)
    # Links that are all alike take as long as there are bytes.
    for split in even:
        assert split.seconds == pytest.approx((split.rows + split.rest) / 1e9)


def test_an_expert_axis_holds_other_experts_whatever_else_splits_them():
    found = {split.axes for split in splits_of({"expert": 8, "tensor": 8}, rows=8)}
    assert found == {("expert",)}
    found = {
        s.axes for s in splits_of({"expert": 8, "tensor": 8}, rows=8, config=dataclasses.replace(SPARSE, experts=64))
    }
    assert found == {("expert",), ("expert", "tensor")}


def test_bytes_of_tokens_and_weights_are_those_of_the_layers_with_experts():
    found = {split.axes: split for split in splits_of({"fsdp": 8, "tensor": 8}, rows=8)}
    # Of a token's two rows 7 / 8 go elsewhere, there and back, forward and backward, in bfloat16, in 4 layers.
    of_device = 2 * 8 * 64 * 7 / 8 * 256 * 2 * 4 * 4
    assert found["fsdp",].rows == of_device
    assert found["tensor",].rows == of_device / 8
    assert found[()].rows == 0
    # Along fsdp no weight of an expert is gathered (twice) or its gradient scattered, in bfloat16 too.
    of_experts = 3 * 4 * 16 * 256 * 512 / 8 * 7 / 8 * 2 * 3
    assert found[()].rest - found["fsdp",].rest == pytest.approx(of_experts)
    # Along tensor an expert is as many numbers a device as its part was, and no token is gathered for it.
    tokens = 8 * 64 * 256 * 7 / 8 * 2 * 4
    assert found[()].rest - found["tensor",].rest == pytest.approx(5 * tokens)


def test_gradients_of_folded_experts_wait_for_no_axis_that_splits_them():
    plan = parallel.strategy("zero1", experts=("fsdp",))
    layout = parallel.Layout(parallel.MeshSpec(data=4, fsdp=16).abstract(64), plan)
    assert layout.deferred == ("data",)
    arrays = {"up": jax.ShapeDtypeStruct((4, 16, 256, 512), "float32")}
    work = step_work(SPARSE, parallel.BatchPlan(64, 1), LENGTH)
    sends = step_sends(layout, arrays, {"up": ("layers", "experts", "embed", "mlp")}, work)
    # Over replicas of the same experts alone, once a step and in float32.
    (reduced,) = (sent for sent in sends if sent.kind == "all-reduce" and sent.size)
    assert reduced.axes == ("data",)
    assert reduced.size == 2 * 3 / 4 * 4 * 256 * 512 * 4
    assert seconds([reduced], layout, FAST) == pytest.approx(reduced.size / 10e9)
