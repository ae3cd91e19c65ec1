"""Attention's kernels for devices that are not here: the TPU's interpreted, with its race detector, and all lowered."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from crescendo.pallas_kernels.attention import attention, checking, mosaic_tpu
from crescendo.pallas_kernels.attention.specs import SPECS
from crescendo.pallas_kernels.op import explain, target

BY_NAME = {spec.name: spec for spec in SPECS}
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
TPU = AbstractDevice("TPU v5e", 1, "tpu")
# The others take minutes.
QUICK = ("bias-of-keys",)
LOWERED = ("packed-128", "gemma-local")


@pytest.fixture
def tpu(monkeypatch):
    """A context in which the kernels run here on small blocks, parallel steps in any order and on two cores.

    Memory is NaN before it is written. Fails on a race.
    """
    monkeypatch.setattr(mosaic_tpu, "require_tpu", lambda: None)
    monkeypatch.setattr(mosaic_tpu, "BLOCK", 128)
    seed = int(np.random.default_rng().integers(2**31))
    parameters = pltpu.InterpretParams(detect_races=True, random_seed=seed, num_cores_or_threads=2)

    @contextlib.contextmanager
    def context():
        with target(TPU), pltpu.force_tpu_interpret_mode(parameters):
            yield
        assert not interpret_pallas_call.races.races_found

    return context


def check(spec, context, dtype, tolerance):
    given, cotangents = checking.case(spec, 0, dtype), checking.cotangents(spec, 0)
    exact = checking.exactly(given)(cotangents)
    run = functools.partial(checking.everything, "mosaic_tpu", given.options)
    with context():
        results = jax.tree.map(np.asarray, jax.jit(run)(given.arrays, given.metadata, cotangents))
    np.testing.assert_array_equal(results["seen"], exact["seen"])
    errors = {name: checking.error(result, exact[name]) for name, result in results.items()}
    assert all(value < tolerance for value in errors.values()), errors


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=() if spec.name in QUICK else pytest.mark.slow, id=spec.name)
        for spec in SPECS
        if spec.tags & {"small", "awkward"}
    ],
)
def test_tpu_kernels_are_right_and_free_of_races(spec, tpu, quick_compilation):
    check(spec, tpu, jnp.float32, 2e-5)


@pytest.mark.parametrize(
    "name",
    ["packed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("unequal", "window", "empty-rows", "ring"))],
)
@pytest.mark.slow
def test_tpu_kernels_that_hold_a_block_at_a_time(name, tpu, monkeypatch, quick_compilation):
    """Keys, and in their gradients queries, that don't fit: every block is a chunk of its own."""
    monkeypatch.setattr(mosaic_tpu, "CHUNK_BYTES", 1)
    check(BY_NAME[name], tpu, jnp.float32, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed", "bias-hides"])
def test_tpu_kernels_in_half_precision(name, tpu, quick_compilation):
    check(BY_NAME[name], tpu, jnp.bfloat16, 1e-2)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=() if spec.name in LOWERED else pytest.mark.slow, id=spec.name)
        for spec in SPECS
        if not spec.name.endswith("-scaled")
    ],
)
@pytest.mark.parametrize(
    ("implementation", "device", "platform", "kernel"),
    [("mosaic_gpu", H100, "cuda", "mosaic_gpu"), ("mosaic_tpu", TPU, "tpu", "tpu_custom_call")],
    ids=["cuda", "tpu"],
)
def test_kernels_lower_for_real_shapes(implementation, device, platform, kernel, spec):
    call = checking.case(spec)
    shape = call.arrays["q"].shape
    cotangents = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    run = functools.partial(checking.everything, implementation, call.options)
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        reason = next(
            answer.reason
            for answer in explain(attention, **call.arrays, **call.metadata, **call.options).answers
            if answer.implementation == implementation
        )
        if reason and "shard_map" not in reason:
            refused = "bias" in call.arrays or call.arrays["q"].dtype != jnp.bfloat16
            assert refused, reason
            pytest.skip(reason)
        mapped = jax.shard_map(run, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        lowered = jax.jit(mapped).trace(call.arrays, call.metadata, cotangents).lower(lowering_platforms=(platform,))
    assert kernel in lowered.as_text()
