"""What compiled steps send between devices, against the closed form, for eight H100s and for a pod of TPUs."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import pytest

from crescendo import models, optim, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.planning.mesh import step_work
from crescendo.experiments.runtime.hardware import topology_devices
from crescendo.experiments.trainer.session import Session
from crescendo.models import ModelConfig
from crescendo.parallel import costs
from crescendo.parallel.collectives import Traffic, collectives, computations, shapes_of, traffic
from crescendo.parallel.costs import step_traffic
from crescendo.parallel.tables import device_bytes

pytestmark = [pytest.mark.aot, pytest.mark.timeout(1200)]
H100 = Path(__file__).parent / "h100.txtpb"
SMALL = ModelConfig.preset(
    "debug", width=512, layers=2, heads=8, kv_heads=8, mlp_width=1536, vocab_size=8192, scan_layers=True
)
# name: axes, strategy, Ulysses degree, microbatches, and what the backward pass computes again
STEPS: dict[str, tuple[dict, str, int, int, str]] = {
    "data": ({"data": 8}, "data", 1, 1, "none"),
    "zero1": ({"data": 1, "fsdp": 8}, "zero1", 1, 2, "none"),
    "zero2": ({"data": 1, "fsdp": 8}, "zero2", 1, 2, "none"),
    "fsdp": ({"data": 2, "fsdp": 4}, "fsdp", 1, 2, "none"),
    "tensor": ({"data": 1, "tensor": 8}, "fsdp", 1, 1, "none"),
    "fsdp and tensor": ({"data": 1, "fsdp": 2, "tensor": 4}, "fsdp", 1, 1, "full"),
    "ring": ({"data": 1, "sequence": 8}, "fsdp", 1, 1, "none"),
    "ulysses": ({"data": 1, "sequence": 8}, "fsdp", 8, 1, "none"),
    "ring and ulysses": ({"data": 1, "fsdp": 2, "sequence": 4}, "fsdp", 2, 1, "full"),
}


def lowered(config: ModelConfig, layout: parallel.Layout, microbatches: int, sequence_length: int):
    plan = parallel.BatchPlan(layout.batch_shards, microbatches)
    session = Session(
        data=RandomText(config.vocab_size, sequence_length),
        model=config,
        optimizer=optim.adamw(1e-3),
        batch_size=layout.batch_shards * microbatches,
        total_examples=2**20,
        mesh=layout.mesh,
        strategy=layout.strategy,
    )
    return session.lower(plan, implementation="xla"), session


def closed_form(config: ModelConfig, layout: parallel.Layout, microbatches: int, sequence_length: int):
    arrays = jax.eval_shape(functools.partial(models.initialize, config), jax.random.key(0))
    work = step_work(config, parallel.BatchPlan(layout.batch_shards, microbatches), sequence_length)
    return step_traffic(layout, arrays, models.logical_axes(config), work)


def row(name: str, kind: str, found: Traffic, expected: float) -> str:
    """A line of the table: how often, and megabytes a device sends, as compiled and in closed form."""
    return f"{name:17}{kind:20}{found.count:5.0f}{found.sent_bytes / 1e6:10.2f} MB {expected / 1e6:10.2f} MB"


@functools.cache
def compiled_for_h100s(name: str, matmul: str = "dtype"):
    axes, strategy, ulysses, microbatches, remat = STEPS[name]
    devices = topology_devices("h100:1x1x8", H100)
    layout = parallel.Layout(parallel.make_mesh(**axes, devices=devices), parallel.strategy(strategy, ulysses=ulysses))
    config = ModelConfig(**{**SMALL.__dict__, "remat": remat, "matmul": matmul}).for_platform("gpu")
    step, _ = lowered(config, layout, microbatches, 1024)
    return step.compile().as_text(), config, layout, microbatches


# A step compiles for half a minute to two: every day those that compile fast, one of each kind of parallelism.
EVERY_DAY = ("data", "zero1", "fsdp", "tensor", "ulysses")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in STEPS]
)
def test_eight_h100s_send_what_the_closed_form_says(name):
    text, config, layout, microbatches = compiled_for_h100s(name)
    found, expected = traffic(text, microbatches=microbatches), closed_form(config, layout, microbatches, 1024)
    check_traffic(name, found, expected)


def check_traffic(name: str, found: dict[str, Traffic], expected: dict[str, float]) -> None:
    """Sums of scalars and whole vectors are not in the closed form: under 1% of all here."""
    for kind, size in expected.items():
        print(row(name, kind, found[kind], size))
    for kind, size in expected.items():
        assert found[kind].sent_bytes == pytest.approx(size, rel=0.01, abs=0.01 * sum(expected.values())), kind


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_three_kinds_together_send_no_more_than_the_closed_form(strategy):
    devices = topology_devices("h100:1x1x8", H100)
    layout = parallel.Layout(parallel.make_mesh(data=1, fsdp=2, tensor=2, sequence=2, devices=devices), strategy)
    config = SMALL.for_platform("gpu")
    step, _ = lowered(config, layout, 1, 4096)
    found, expected = traffic(step.compile().as_text()), closed_form(config, layout, 1, 4096)
    total = sum(expected.values())
    for kind, size in expected.items():
        print(row(strategy, kind, found[kind], size))
        assert found[kind].sent_bytes <= size + 0.01 * total, kind
    # With `fsdp` the compiler finds gathers of activations that two matmuls can share.
    assert sum(t.sent_bytes for t in found.values()) >= 0.85 * total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "over"),
    [
        ({"data": 1, "fsdp": 8}, ("expert",)),
        ({"data": 1, "expert": 4, "fsdp": 2}, ("expert",)),
        ({"data": 1, "fsdp": 2, "tensor": 4}, ("tensor",)),
        ({"data": 2, "fsdp": 4}, ("fsdp",)),
    ],
    ids=str,
)
def test_experts_send_what_the_closed_form_says(axes, over):
    devices = topology_devices("h100:1x1x8", H100)
    layout = parallel.Layout(parallel.make_mesh(**axes, devices=devices), parallel.strategy("fsdp", experts=over))
    config = dataclasses.replace(SMALL, experts=8, expert_width=768).for_platform("gpu")
    step, _ = lowered(config, layout, 1, 1024)
    text = step.compile().as_text()
    found, expected = traffic(text), closed_form(config, layout, 1, 1024)
    if layout.expert_axes:
        # There and back, forward and backward; a program says how many rows there is room for, not how many there are.
        assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)) >= 4
        assert expected.pop("all-to-all") > 0
    if "tensor" in axes:  # the compiler keeps what attention has gathered of the stream for the backward pass
        gathered = expected.pop("all-gather")
        assert 0.9 * gathered <= found["all-gather"].sent_bytes <= 1.01 * gathered
    check_traffic(str(axes), found, expected)


@pytest.mark.slow
def test_layers_with_one_blocks_weights_send_no_more_than_the_closed_form():
    devices = topology_devices("h100:1x1x8", H100)
    layout = parallel.Layout(parallel.make_mesh(data=1, fsdp=8, devices=devices))
    config = dataclasses.replace(SMALL, layers=4, experts=8, expert_width=768, shared_layers=True).for_platform("gpu")
    step, _ = lowered(config, layout, 1, 1024)
    found, expected = traffic(step.compile().as_text()), closed_form(config, layout, 1, 1024)
    for kind, size in expected.items():
        print(row("shared layers", kind, found[kind], size))
    assert found["reduce-scatter"].sent_bytes == pytest.approx(expected["reduce-scatter"], rel=0.01)
    # What doesn't change from layer to layer the compiler may gather before their loop: experts, in one of the passes.
    assert 0.5 * expected["all-gather"] < found["all-gather"].sent_bytes < 1.01 * expected["all-gather"]


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2)])
def test_a_tick_of_a_pipeline_sends_what_the_closed_form_says(monkeypatch, schedule, chunks):
    devices = topology_devices("h100:1x1x8", H100)
    strategy = parallel.strategy("fsdp", schedule=schedule, chunks=chunks)
    layout = parallel.Layout(parallel.make_mesh(data=1, stage=4, fsdp=2, devices=devices), strategy)
    config = ModelConfig(**{**SMALL.__dict__, "layers": 4 * chunks, "scan_layers": False}).for_platform("gpu")
    step, _ = lowered(config, layout, 16, 4096)
    # Of one tick in which every pass is due: the program doesn't say how often its conditions are met. Layers move to
    # the stages whose work they are once.
    tick = costs._Runs(layers=1, forward=2, backward=1, enters=1, leaves=1, gathers=3, ticks=1)
    monkeypatch.setattr(costs, "_runs", lambda layout, work: tick)
    expected = closed_form(config, layout, 1, 4096)
    sent = dict.fromkeys(expected, 0.0)
    for c in collectives(step.compile().as_text()):
        # A condition counts half, and a neighbour is sent to whether it is met or not.
        twice = 2 if c.runs == 0.5 and c.kind != "collective-permute" else 1
        sent[c.kind] += twice * c.runs * c.sent_bytes
    for kind, size in expected.items():
        print(row("tick", kind, Traffic(0, sent[kind]), size))
        # The compiler finds some gathers of weights that two passes can share.
        assert sent[kind] == pytest.approx(size, rel=0.06 if kind == "all-gather" else 0.01), kind


@pytest.mark.slow
def test_stages_with_experts_compile_and_send_rows_to_experts_and_streams_to_neighbours():
    devices = topology_devices("h100:1x1x8", H100)
    layout = parallel.Layout(parallel.make_mesh(data=1, stage=2, expert=4, devices=devices))
    config = dataclasses.replace(SMALL, layers=4, moe_every=2, experts=8, expert_width=768).for_platform("gpu")
    step, _ = lowered(config, layout, 8, 1024)
    text = step.compile().as_text()
    assert "collective-permute" in {c.kind for c in collectives(text)}
    # There and back: in the forward pass, in the one that begins a backward pass, and in the backward pass.
    assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)) >= 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "scan_layers", "work", "passes"),
    [("fsdp", False, "gemm_fusion|cublas", 1), ("zero1", True, r" while\(", 2)],
)
def test_a_stage_sends_while_another_pass_computes(strategy, scan_layers, work, passes):
    devices = topology_devices("h100:1x1x8", H100)
    layout = parallel.Layout(parallel.make_mesh(data=1, stage=4, fsdp=2, devices=devices), strategy)
    config = ModelConfig(**{**SMALL.__dict__, "layers": 8, "scan_layers": scan_layers}).for_platform("gpu")
    step, _ = lowered(config, layout, 16, 1024)
    overlapped = 0
    for lines in computations(step.compile().as_text()).values():
        (began, *_), (ended, *_) = (
            [*(i for i, line in enumerate(lines) if f"collective-permute-{end}(%" in line), None]
            for end in ("start", "done")
        )
        overlapped += began is not None and any(re.search(work, line) for line in lines[began:ended])
    # A pass's result beside the other pass: where layers gather weights, what goes forward is beside sums of gradients.
    assert overlapped == passes


@pytest.mark.slow
def test_every_stage_has_its_part_of_a_large_vocabulary():
    devices, stages, vocab = topology_devices("h100:1x1x8", H100), 8, 128_000
    layout = parallel.Layout(parallel.make_mesh(data=1, stage=stages, devices=devices))
    config = ModelConfig(**{**SMALL.__dict__, "layers": 8, "vocab_size": vocab, "tied_head": False}).for_platform("gpu")
    step, session = lowered(config, layout, 16, 1024)
    compiled = step.compile()
    # There is one program, and its memory is that of every stage: first, middle and last are equal. What would be the
    # first's or the last's alone is divided by them, in the tables, their gradients and moments, and the logits.
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert f"num_partitions={stages}" in text.splitlines()[0]
    sizes = {size for _, dims in shapes_of(text) for size in dims if len(dims) > 1}
    assert vocab // stages in sizes
    assert vocab not in sizes
    held = device_bytes(session.abstract_state, session.shardings)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(session.abstract_state))
    assert held == pytest.approx(whole / stages, rel=0.01)
    assert memory.argument_size_in_bytes == pytest.approx(held, rel=0.05)
    print(f"{held / 1e6:.1f} MB of state on every stage, {memory.temp_size_in_bytes / 1e6:.1f} MB beside it")


@pytest.mark.slow
def test_the_memory_of_a_pipeline_does_not_depend_on_the_microbatches():
    devices = topology_devices("h100:1x1x8", H100)
    layout = parallel.Layout(parallel.make_mesh(data=1, stage=4, fsdp=2, devices=devices))
    config = ModelConfig(**{**SMALL.__dict__, "layers": 8}).for_platform("gpu")
    peaks = [
        step.compile().memory_analysis().temp_size_in_bytes
        for step, _ in (lowered(config, layout, microbatches, 1024) for microbatches in (8, 64))
    ]
    assert peaks[1] == pytest.approx(peaks[0], rel=1e-3)


def test_zero_moves_two_and_three_times_the_parameters():
    parameters = sum(
        x.size
        for x in jax.tree.leaves(
            jax.eval_shape(lambda: models.initialize(SMALL.for_platform("gpu"), jax.random.key(0)))
        )
    )
    share = 7 / 8
    for name, worth in (("data", 2), ("zero1", 2)):
        text, _, _, microbatches = compiled_for_h100s(name)
        sent = sum(t.sent_bytes for t in traffic(text, microbatches=microbatches).values())
        assert sent == pytest.approx(worth * share * 4 * parameters, rel=0.01)
    # Of layers, in bfloat16: gathered twice and scattered once in each of two microbatches.
    text, config, _, microbatches = compiled_for_h100s("fsdp")
    blocks = jax.eval_shape(lambda: models.initialize(config, jax.random.key(0)))["blocks"]
    in_loops = [c for c in collectives(text, microbatches=microbatches) if c.runs == config.layers * microbatches]
    expected = 3 * microbatches * (3 / 4) * 2 * sum(x.size for x in jax.tree.leaves(blocks))
    assert sum(c.runs * c.sent_bytes for c in in_loops) == pytest.approx(expected, rel=0.01)


def test_fsdp_gathers_one_layer_at_a_time():
    text, config, _, microbatches = compiled_for_h100s("fsdp")
    gathers = [c for c in collectives(text, microbatches=microbatches) if c.kind == "all-gather"]
    blocks = jax.eval_shape(lambda: models.initialize(config, jax.random.key(0)))["blocks"]
    one_layer = 2 * sum(x.size for x in jax.tree.leaves(blocks)) / config.layers
    tables = 4 * config.vocab_size * config.width
    of_layers = [c for c in gathers if c.runs == config.layers * microbatches]
    assert of_layers
    assert all(c.result_bytes < 1.01 * one_layer for c in of_layers)
    assert all(c.result_bytes < 1.01 * tables for c in gathers)
    assert not any(len(dims) > 2 and dims[0] == config.layers for c in gathers for _, dims in c.shapes)


def test_fsdp_gathers_weights_in_8_bits_under_fp8():
    text, config, layout, microbatches = compiled_for_h100s("fsdp", "fp8")
    found, expected = traffic(text, microbatches=microbatches), closed_form(config, layout, microbatches, 1024)
    in_loops = [
        c
        for c in collectives(text, microbatches=microbatches)
        if c.kind == "all-gather" and c.runs == config.layers * microbatches
    ]
    assert {dtype for c in in_loops for dtype, dims in c.shapes if math.prod(dims) > config.width} == {"f8e4m3fn"}
    blocks = jax.eval_shape(lambda: models.initialize(config, jax.random.key(0)))["blocks"]
    bfloat16 = 2 * microbatches * (3 / 4) * 2 * sum(x.size for x in jax.tree.leaves(blocks))
    assert sum(c.runs * c.sent_bytes for c in in_loops) == pytest.approx(bfloat16 / 2, rel=0.01)
    check_traffic("fsdp, fp8", found, expected)


@pytest.mark.slow
def test_tensor_parallelism_under_fp8_sends_what_the_closed_form_says():
    text, config, layout, microbatches = compiled_for_h100s("tensor", "fp8")
    check_traffic("tensor, fp8", traffic(text), closed_form(config, layout, microbatches, 1024))


@pytest.mark.slow
def test_the_ring_sends_while_it_computes():
    text, _, _, _ = compiled_for_h100s("ring")
    lines = text.splitlines()
    waits = []
    for i, line in enumerate(lines):
        if start := re.search(r"%(collective-permute-start[\w.]*) = ", line):
            done = next(j for j in range(i, len(lines)) if f"collective-permute-done(%{start[1]})" in lines[j])
            between = "\n".join(lines[i + 1 : done])
            waits.append(bool(re.search(r"custom-call|fusion\(|conditional\(| dot\(|call\(", between)))
    assert len(waits) >= 14  # seven steps forward, seven backward
    assert sum(waits) >= 0.7 * len(waits)


def test_a_pod_of_1024_chips_sends_and_holds_what_the_closed_form_says():
    layout = parallel.Layout(
        parallel.make_mesh(data=8, fsdp=32, tensor=4, devices=topology_devices("v5p:8x8x16", None))
    )
    config = ModelConfig.preset(
        "1b", width=4096, layers=8, kv_heads=8, mlp_width=14_336, vocab_size=8192, remat="full", scan_layers=True
    ).for_platform("tpu")
    step, session = lowered(config, layout, 1, 2048)
    # As plain collectives: by itself the compiler turns some into rings of matmuls and permutes.
    compiled = step.compile(compiler_options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"})
    found, expected = traffic(compiled.as_text()), closed_form(config, layout, 1, 2048)
    for kind, size in expected.items():
        print(row("1024 chips", kind, found[kind], size))
    sent = {kind: t.sent_bytes for kind, t in found.items()}
    assert sent["all-gather"] == pytest.approx(expected["all-gather"], rel=0.05)
    # This compiler leaves some scattered sums whole, as all-reduces of twice the bytes.
    scattered = sent["reduce-scatter"] + (sent["all-reduce"] - expected["all-reduce"]) / 2
    assert scattered == pytest.approx(expected["reduce-scatter"], rel=0.05)
    assert sent["collective-permute"] + sent["all-to-all"] < 0.02 * sum(sent.values())
    held = device_bytes(session.abstract_state, session.shardings)
    memory = compiled.memory_analysis()
    assert memory is not None
    rows = 4 * 4 * 2048  # tokens, labels, segment ids and positions of one row
    # Arrays are padded to the hardware's tiles.
    assert held + rows <= memory.argument_size_in_bytes <= 1.1 * (held + rows)
    assert jax.tree.leaves(session.abstract_state)[0].sharding.mesh.size == 1024
