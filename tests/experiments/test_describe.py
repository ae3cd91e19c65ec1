"""The description of a model over a mesh, with no devices."""

import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from crescendo import models, parallel
from crescendo.experiments import describe
from crescendo.experiments.planning.activations import slot_bytes
from crescendo.experiments.planning.mesh import planned_session
from crescendo.experiments.runtime.errors import UserError
from crescendo.models import ModelConfig
from crescendo.models.moe import Moe
from crescendo.parallel.tables import describe_sharding, device_bytes


def test_70b_over_4096_devices_is_described_without_any(capsys):
    began = time.monotonic()
    describe.main(["--model", "70b", "--devices", "4096", "--fsdp", "512", "--tensor", "8", "--batch-size", "512"])
    assert time.monotonic() - began < 30
    shown = capsys.readouterr().out
    assert "70,553,726,976 parameters" in shown
    held = dict(re.findall(r"│ (.*?) +│ +([\d.]+) │", shown))
    # 70.55e9 numbers of 4 bytes over 4096 devices, but for the norms of queries and keys.
    assert float(held["parameters, float32"]) == pytest.approx(70.55e9 * 4 / 4096 / 2**30, rel=0.02)
    assert float(held["optimizer state"]) == pytest.approx(2 * 70.55e9 * 4 / 4096 / 2**30, rel=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], r"8 stages, 1f1b: 18% of the time is idle, the inputs of 15 passes are kept\n"),
        (
            ["--schedule", "interleaved", "--chunks", "5"],
            r"8 stages of 5 chunks each, interleaved: 4% .* 63 passes are kept, 0\.399 GiB of layers and gradients",
        ),
        (
            ["--one-of", "2"],
            r"8 stages \(50% skipped\), 1f1b: 16% of the time is idle, the inputs of 7 passes are kept\n",
        ),
        (
            ["--one-of", "8"],
            r"8 stages \(88% skipped\), 1f1b: 0% of the time is idle, (.|\n)* collective-permute │ +0\.000 │",
        ),
    ],
)
def test_what_a_schedule_costs_is_said(capsys, options, said):
    mesh = ["--model", "70b", "--devices", "1024", "--stage", "8", "--fsdp", "16", "--tensor", "8"]
    describe.main([*mesh, "--batch-size", "512", "--microbatches", "32", *options])
    shown = capsys.readouterr().out
    assert re.search(said, shown)
    copied = re.search(r"layers in the order of the stages' work +│ ([\d.]+)", shown)
    assert (copied is not None) == ("interleaved" in options)


def test_what_ways_to_split_experts_send_is_said(capsys):
    mesh = ["--model", "moe-debug", "--devices", "32", "--data", "4", "--fsdp", "1", "--sequence", "2", "--tensor", "4"]
    describe.main([*mesh, "--experts", "tensor", "sequence", "--expert-chunks", "2", "--device", "H100"])
    shown = capsys.readouterr().out
    ways = re.findall(r"│ ([a-z, ]+?)( \(as set\))? +│ +[\d.]+ │ +[\d.]+ │ +([\d.]+) │", shown)
    assert {(axes, bool(here)) for axes, here, _ in ways} == {
        ("sequence, tensor", True),
        ("sequence", False),
        ("tensor", False),
        ("expert", False),
    }
    milliseconds = [float(each) for _, _, each in ways]
    assert milliseconds == sorted(milliseconds)
    assert re.search(r"room for other devices' tokens +│ +0\.0*[1-9]", shown)
    for options, message in (
        (["--experts", "data"], "strategy.experts = data: the mesh axis data holds replicas"),
        (["--experts", "tensor", "--model", "debug"], "strategy.experts = tensor: this model has no experts"),
        (
            ["--expert-chunks", "2"],
            "strategy.expert_chunks = 2 cuts what is sent to experts, and this mesh sends nothing",
        ),
        (["--experts", "tensor", "--expert-chunks", "3"], "strategy.expert_chunks = 3: use a multiple of 24"),
    ):
        with pytest.raises(UserError, match=message):
            describe.main([*mesh, *options])


@pytest.mark.parametrize(
    ("axes", "over", "chunks", "capacity"),
    [
        pytest.param({"fsdp": 4, "tensor": 2}, "tensor", 4, None, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, "fsdp", 1, None, marks=pytest.mark.slow),
        pytest.param({"expert": 2, "tensor": 4}, "expert", 1, None, marks=pytest.mark.slow),
        ({"fsdp": 2, "expert": 4}, "expert", 2, 1.5),
    ],
    ids=str,
)
def test_room_for_tokens_is_what_a_layer_keeps_beyond_even_loads(axes, over, chunks, capacity):
    config = ModelConfig(
        vocab_size=128,
        width=32,
        layers=1,
        heads=4,
        mlp_width=96,
        experts=8,
        experts_per_token=2,
        expert_capacity=capacity,
    ).for_platform("cpu")
    layout = parallel.Layout(
        parallel.make_mesh(**{"data": 1} | axes), parallel.strategy(experts=(over,), expert_chunks=chunks)
    )
    length, rows = 64, 4 * layout.batch_shards
    session, plan, _ = planned_session(
        config, layout, batch_size=rows, microbatches=1, sequence_length=length, platform="cpu"
    )
    structure, state = nnx.split(nnx.eval_shape(lambda: Moe(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    x_BTD = jax.ShapeDtypeStruct((rows, length, config.width), jnp.float32)

    def residuals(state, x_BTD):
        return jax.vjp(lambda state, x_BTD: nnx.merge(structure, state)(x_BTD, layout)[0], state, x_BTD)[1]

    whole = over == "tensor"
    inner = config.expert_size // (1 if whole else layout.sizes["tensor"])
    kept = [x.shape for x in jax.tree.leaves(jax.eval_shape(residuals, state, x_BTD)) if x.ndim == 2]
    slots, again, tokens = (sum(n for n, width in kept if width == each) for each in (inner, 2 * inner, config.width))
    assert slots == again <= tokens  # and tokens back from their experts
    even = config.experts_per_token * rows * length * (1 if whole else layout.sizes["tensor"])
    more = (slots - even) / layout.mesh.size
    assert slot_bytes(session, plan) == pytest.approx(more * (config.width + 3 * inner) * 4)


def test_more_devices_along_tensor_than_key_heads_hold_copies(capsys):
    held = {}
    for tensor in ("8", "16"):
        describe.main(["--model", "70b", "--devices", "4096", "--tensor", tensor, "--batch-size", "512"])
        shown = capsys.readouterr().out
        row = next(line for line in shown.splitlines() if line.startswith("│ blocks.attention.key.ker"))
        held[tensor] = int(row.split("│")[-2].replace(",", ""))
    # Whole along tensor, the key weight of 80 x 8192 x 8 x 128 is split over fsdp = 256 alone.
    assert held == {"8": 4 * 80 * 8192 * 8 * 128 // 4096, "16": 4 * 80 * 8192 * 8 * 128 // 256}


def test_the_command_of_the_package_is_the_same():
    command = [sys.executable, "-m", "crescendo.parallel.describe", "--devices", "0"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (2, "error: --devices 0 must be at least 1\n")


def test_a_preset_by_itself_has_no_mesh(capsys):
    describe.main(["124m", "--sequence-length", "2048"])
    shown = capsys.readouterr().out
    assert "MFLOPs a token, forward and backward, at 2048 tokens a row" in shown
    count = next(line for line in shown.splitlines() if line.startswith("│ all"))
    block = 4 * 768**2 + 3 * 768 * 2048 + 2 * 768 + 2 * 64  # attention, feed-forward, norms of both, of q and k
    assert int(count.split("│")[-2].replace(",", "")) == 50_304 * 768 + 12 * block + 768
    assert "GiB  Adam moments, float32" in shown
    assert "a device" not in shown
    command = [sys.executable, "-m", "crescendo.models.describe", "124m", "--sequence-length", "0"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (2, "error: --sequence-length 0 must be at least 1\n")


def test_what_is_replicated_is_warned_of():
    config = ModelConfig.preset("124m").for_platform("gpu")
    arrays = jax.eval_shape(lambda: models.initialize(config, jax.random.key(0)))
    mesh = parallel.MeshSpec(data=2, fsdp=4).abstract(8)
    for strategy, expected in (("zero2", True), ("fsdp", False)):
        layout = parallel.Layout(mesh, strategy)
        _, warnings = describe_sharding(arrays, models.logical_axes(config), layout)
        assert any("embedding.table (147 MiB) is replicated on each of the 8" in line for line in warnings) == expected
    axes = models.logical_axes(config)
    held = {
        name: device_bytes(arrays, getattr(parallel.Layout(mesh, strategy), name)(axes))
        for strategy in ("zero2",)
        for name in ("parameters", "gradients")
    }
    # All but the norms of queries and keys is split four ways.
    assert held["gradients"] == pytest.approx(held["parameters"] / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices 0 must be at least 1"),
        (["124m", "--fsdp", "4"], "^--fsdp is of a mesh: say --model 124m then, and not 124m$"),
        (["--devices", "6", "--tensor", "4"], "does not cover the 6 devices"),
        (
            ["--model", "70b", "--devices", "128", "--tensor", "128"],
            r"^heads = 64 does not divide over tensor = 128: use a tensor of 1, 2, 4, 8, 16, 32 or 64$",
        ),
        (["--devices", "8", "--sequence", "4", "--sequence-length", "100"], "sequence_length = 100 does not divide"),
        (["--devices", "8", "--fsdp", "1", "--sequence", "8", "--ulysses", "8"], "ulysses = 8 can't split the 4 query"),
        (["--devices", "8", "--batch-size", "12"], "batch_size = 12 does not divide over 8 devices: use 8 or 16"),
        (["--topology", "h100:1x1x8"], "needs --target FILE"),
        (["--topology", "abacus:3"], "--topology abacus:3: .*; names are such as v5e:4x4"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        describe.main(arguments)
