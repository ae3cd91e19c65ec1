"""The same training on many meshes: ten steps of the debug model against one device, to 1e-5 in float32.

Batches change their size on the way, are accumulated from microbatches, rows are packed, and the noise scale is on.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from crescendo import models, optim, parallel
from crescendo.experiments.data import Rows, Stream
from crescendo.experiments.feed import Feed
from crescendo.experiments.packing import pack
from crescendo.experiments.state import TrainState, abstract_batch, initial_state, make_step, state_shardings
from crescendo.models import ModelConfig
from crescendo.optim.batch_size import adaptive_batch_size, staged
from crescendo.optim.noise_scale import gradient_noise_scale

LENGTH = 32
SIZES = [8, 16, 24]
STATISTICS = ("layers", "norm_layers", "dot_products", "coordinates")
CONFIG = dataclasses.replace(
    ModelConfig.preset("debug", width=32, layers=2, heads=8, kv_heads=4, mlp_width=64, vocab_size=128, scan_layers=True), z_loss=1e-4
).for_platform("cpu")
MESHES: dict[str, tuple[dict, parallel.Strategy]] = {
    "data 8": ({"data": 8}, parallel.strategy("data")),
    "zero1 8": ({"data": 1, "fsdp": 8}, parallel.strategy("zero1")),
    "zero2 8": ({"data": 1, "fsdp": 8}, parallel.strategy("zero2")),
    "fsdp 8": ({"data": 1, "fsdp": 8}, parallel.strategy("fsdp")),
    "zero1 2x4": ({"data": 2, "fsdp": 4}, parallel.strategy("zero1")),
    "zero2 2x4": ({"data": 2, "fsdp": 4}, parallel.strategy("zero2")),
    "fsdp 2x4": ({"data": 2, "fsdp": 4}, parallel.strategy("fsdp")),
    "data 2, tensor 4": ({"data": 2, "tensor": 4}, parallel.strategy("data")),
    "zero1 4, tensor 2": ({"data": 1, "fsdp": 4, "tensor": 2}, parallel.strategy("zero1")),
    "data 2, fsdp 2, tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, parallel.strategy("fsdp")),
    "fsdp 4, tensor 2": ({"data": 1, "fsdp": 4, "tensor": 2}, parallel.strategy("fsdp")),
    "ring 8": ({"data": 1, "sequence": 8}, parallel.strategy("fsdp")),
    "ulysses 4": ({"data": 2, "sequence": 4}, parallel.strategy("fsdp", ulysses=4)),
    "ring 2, ulysses 2": ({"data": 1, "fsdp": 2, "sequence": 4}, parallel.strategy("fsdp", ulysses=2)),
    "fsdp 2, tensor 2, ring 2": ({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, parallel.strategy("fsdp")),
    "data 2, tensor 2, ring 2": ({"data": 2, "tensor": 2, "sequence": 2}, parallel.strategy("zero1")),
    "zero1 2, tensor 2, ulysses 2": (
        {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
        parallel.strategy("zero1", ulysses=2),
    ),
    "expert 2, fsdp 2, tensor 2": ({"data": 1, "expert": 2, "fsdp": 2, "tensor": 2}, parallel.strategy("zero2")),
}
# Of the quick ones, `deviations` (a second pass) is left out: it takes as long to compile as all the rest.
QUICK = {"zero1 2, tensor 2, ulysses 2": STATISTICS[:2], "fsdp 2, tensor 2, ring 2": STATISTICS[:2]}


@functools.cache
def rows() -> Rows:
    random = np.random.default_rng(0)
    ends = np.cumsum(random.integers(3, 60, size=300))
    tokens = random.integers(1, CONFIG.vocab_size, size=ends[-1] + 1)
    return Rows(tokens, pack(np.array([0, *ends]), capacity=LENGTH), LENGTH)


def optimizer():
    return optax.chain(
        gradient_noise_scale(0.9, groups="layer", norm_layers=True),
        optim.lamb(1e-2, weight_decay=0.1),
        adaptive_batch_size(staged(SIZES, starts_examples=[0, 24, 72])),
    )


def run(layout: parallel.Layout, plan: parallel.BatchPlan, statistics, steps: int = 10) -> tuple[TrainState, list[dict]]:
    chain = optimizer()
    shardings = state_shardings(CONFIG, chain, layout)
    step = make_step(CONFIG, chain, max_gradient_norm=1.0, layout=layout, statistics=statistics)
    quick = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
    jitted = jax.jit(step, out_shardings=(shardings, None), compiler_options=quick)
    state = jax.jit(lambda: initial_state(CONFIG, chain, 0), out_shardings=shardings)()
    feed = Feed(Stream(rows(), seed=0), plan, layout)
    seen, sizes, found = 0, [SIZES[0]] * 2, []
    for _ in range(steps):
        state, metrics = jitted(state, feed.read(seen, sizes[-2]))
        seen += sizes[-2]
        found.append(jax.tree.map(float, jax.device_get(metrics)))
        sizes.append(int(found[-1]["next_batch_size"]))
    assert jitted._cache_size() == 1  # batches of other sizes are the same program
    return state, found


@functools.cache
def on_one_device(microbatch: int, statistics) -> tuple[TrainState, list[dict]]:
    layout = parallel.Layout(parallel.make_mesh(devices=jax.devices()[:1]))
    return run(layout, parallel.BatchPlan(microbatch, SIZES[-1] // microbatch), statistics)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "statistics"),
    [*QUICK.items(), *(pytest.param(name, STATISTICS, marks=pytest.mark.slow) for name in MESHES)],
)
def test_ten_steps_equal_those_of_one_device(name, statistics):
    axes, strategy = MESHES[name]
    layout = parallel.Layout(parallel.make_mesh(**axes), strategy)
    state, found = run(layout, parallel.BatchPlan(8, 3), statistics)
    # Gradients that are summed once a step are measured part by part: the same as so much smaller microbatches.
    expected_state, expected = on_one_device(8 // layout.parts, statistics)
    for ours, theirs in zip(found, expected, strict=True):
        for metric in theirs:
            # The noise scale is a ratio of small differences.
            tolerance = 2e-3 if "noise_scale" in metric else 1e-5
            np.testing.assert_allclose(ours[metric], theirs[metric], rtol=tolerance, atol=1e-5, err_msg=metric)
    assert {record["next_batch_size"] for record in found} == set(SIZES)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), state.parameters, expected_state.parameters
    )
    shardings = state_shardings(CONFIG, optimizer(), layout)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings))


def test_batches_lie_where_the_step_wants_them():
    layout = parallel.Layout(parallel.make_mesh(data=2, sequence=4))
    plan = parallel.BatchPlan(8, 3)
    batch = Feed(Stream(rows(), seed=0), plan, layout).read(0, 16)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_batch(layout, plan, LENGTH))
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding} is not {s}"), batch, shardings)
    # In the ring's order; the third microbatch is not used.
    tokens = Stream(rows(), seed=0).read(0, 16)["tokens"].reshape(2, 8, LENGTH)
    order = parallel.sequence.zigzag(LENGTH, 4)
    np.testing.assert_array_equal(batch["rows"]["tokens"], np.concatenate([tokens[..., order], 0 * tokens[:1]]))


def test_models_that_a_mesh_cannot_divide_are_refused_by_name():
    layout = parallel.Layout(parallel.make_mesh(data=1, tensor=8))
    message = r"parameter blocks\.attention\.key\.kernel: its axis kv_heads = 4 does not divide over tensor = 8: use a "
    with pytest.raises(ValueError, match=message + "tensor of 1, 2 or 4, or kv_heads = 8"):
        state_shardings(CONFIG, optimizer(), layout)
    assert models.logical_axes(CONFIG)["blocks"]["attention"]["key"]["kernel"][2] == "kv_heads"
