"""Attention: every implementation against the reference in float64, on this machine or in an interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from crescendo.pallas_kernels.attention import attention, mosaic_gpu, mosaic_gpu_backward
from crescendo.pallas_kernels.attention.contract import Config, Operands, block_ranges, positions, visible
from crescendo.pallas_kernels.attention.specs import SPECS
from crescendo.pallas_kernels.op import explain, target

# The small ones are quick; all of them take minutes.
ALL = [
    pytest.param(spec, marks=() if "small" in spec.tags else pytest.mark.slow)
    for spec in SPECS
    if spec.tags & {"small", "awkward"}
]
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
BY_NAME = {spec.name: spec for spec in SPECS}


def error(array, exact) -> float:
    array, exact = np.asarray(array, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(array - exact) / max(np.linalg.norm(exact), 1e-30))


def everything(implementation, arrays, kwargs, cotangents):
    """Result, log-sum-exp with 0 for -inf, where it is finite, and the gradients of both together."""

    def call(*arrays):
        bias = {"bias": arrays[3]} if len(arrays) > 3 else {}
        return attention(*arrays[:3], **kwargs, **bias, return_lse=True, implementation=implementation)

    (out, lse), pull = jax.vjp(call, *arrays)
    dout, dlse = cotangents
    gradients = pull((dout.astype(out.dtype), jnp.where(jnp.isfinite(lse), dlse, 0).astype(lse.dtype)))
    return out, jnp.where(jnp.isfinite(lse), lse, 0), jnp.isfinite(lse), *gradients


def _compiled(implementation, kwargs):
    return jax.jit(lambda arrays, cotangents: everything(implementation, arrays, kwargs, cotangents))


def exact_and_given(spec, dtype, seed):
    """The spec's inputs in `dtype`, and everything about them in float64."""
    arrays, kwargs = spec.inputs(seed)
    bias = kwargs.pop("bias", None)
    arrays = [array.astype(dtype) for array in (*arrays, *([] if bias is None else [bias]))]
    rng = np.random.default_rng(seed)
    cotangents = rng.normal(size=arrays[0].shape).astype("f"), rng.normal(size=arrays[0].shape[:3]).astype("f")
    cotangents = tuple(np.asarray(jnp.asarray(c).astype(dtype), np.float32) for c in cotangents)
    with jax.enable_x64(True):
        doubles = [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]
        exact = _compiled("reference", kwargs)(doubles, tuple(jnp.asarray(c, jnp.float64) for c in cotangents))
        exact = [np.asarray(array) for array in exact]
    return arrays, kwargs, tuple(map(jnp.asarray, cotangents)), exact


def compare(implementation, spec, dtype, tolerance, seed=0):
    arrays, kwargs, cotangents, exact = exact_and_given(spec, dtype, seed)
    results = _compiled(implementation, kwargs)(arrays, cotangents)
    np.testing.assert_array_equal(results[2], exact[2])
    for i, (result, wanted) in enumerate(zip(results, exact, strict=True)):
        assert np.isfinite(np.asarray(result, np.float64)).all(), (spec.name, i)
        assert error(result, wanted) < tolerance, (spec.name, i)


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_chunked_attention_is_exact(spec, quick_compilation):
    compare("xla", spec, jnp.float32, 2e-5)


@pytest.mark.parametrize("implementation", ["xla"])
def test_half_precision_is_half_precision_only(implementation, quick_compilation):
    compare(implementation, BY_NAME["packed"], jnp.bfloat16, 1e-2)


def test_more_keys_than_a_chunk(quick_compilation, monkeypatch):
    monkeypatch.setattr("crescendo.pallas_kernels.attention.xla.CHUNK_KEYS", 32)
    for name in ("bias", "empty-rows"):
        compare("xla", BY_NAME[name], jnp.float32, 2e-5, seed=1)


def test_a_row_that_sees_nothing_gives_zero():
    q, k = jnp.ones((1, 3, 2, 8)), jnp.ones((1, 2, 1, 8))
    segments = jnp.array([[1, 7, 2]]), jnp.array([[1, 2]])
    for implementation in ("reference", "xla"):
        out, lse = attention(q, k, k, segment_ids=segments, return_lse=True, implementation=implementation)
        np.testing.assert_array_equal(out[0, 1], 0)
        np.testing.assert_array_equal(lse[0, 1], -np.inf)
        np.testing.assert_allclose(out[0, [0, 2]], 1, rtol=1e-6)


def test_memory_is_linear_in_the_length_backward_too():
    def peak_bytes(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        gradient = jax.grad(lambda q, k, v: attention(q, k, v, causal=True, implementation="xla").sum(), (0, 1, 2))
        return jax.jit(gradient).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert peak_bytes(8192) < 2.5 * peak_bytes(4096)


def test_under_vmap_and_remat(quick_compilation):
    (q, k, v), kwargs = BY_NAME["packed"].inputs()
    q, k, v = (array.astype(jnp.float32) for array in (q, k, v))
    segments = kwargs.pop("segment_ids")

    def loss(q, k, v, segments):
        return (attention(q, k, v, segment_ids=segments, implementation="xla", **kwargs) ** 2).sum()

    whole = jax.grad(loss, (0, 1, 2))(q, k, v, segments)
    rows = jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*(x[:, None] for x in (q, k, v, segments)))
    for one, other in zip(whole, rows, strict=True):
        np.testing.assert_allclose(one, other[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_by_batch_and_heads_nothing_is_gathered(kind, quick_compilation):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    where = NamedSharding(mesh, P("data", None, "model"))
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(4, 48, heads, 16)).astype("f") for heads in (4, 2, 2))

    def loss(q, k, v):
        return (attention(q, k, v, causal=True, implementation="xla") ** 2).sum()

    expected = jax.grad(loss, (0, 1, 2))(q, k, v)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*jax.device_put((q, k, v), where)).compile()
        gradients = compiled(*jax.device_put((q, k, v), where))
    assert "all-gather" not in compiled.as_text()
    assert "all-to-all" not in compiled.as_text()
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert tuple(gradient.sharding.spec)[:3] == ("data", None, "model")
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block_q", "block_k"), [(8, 16), (16, 8)])
def test_ranges_of_blocks_hold_every_visible_pair(seed, block_q, block_k):
    """Outside of its range a block is hidden; among the full ones no pair is."""
    rng = np.random.default_rng(seed)
    length, keys = 45, 61
    config = Config(1.0, causal=bool(seed % 2), window=None if rng.random() < 0.5 else int(rng.integers(1, 40)))
    q = jax.ShapeDtypeStruct((2, length, 1, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((2, keys, 1, 8), jnp.float32)
    sizes = (2, length), (2, keys)
    segments = [jnp.asarray(np.sort(rng.integers(-40, 40, size) * 3, -1), jnp.int32) for size in sizes]
    where = [jnp.asarray(rng.integers(0, 60, size), jnp.int32) for size in sizes]
    for q_meta, k_meta in (
        ((None, None), (None, None)),
        ((segments[0], None), (segments[1], None)),
        ((segments[0], where[0]), (segments[1], where[1])),
    ):
        operands = Operands(q, k, k, None, q_meta[0], k_meta[0], q_meta[1], k_meta[1])
        mask = visible(config, operands.q_segments, operands.k_segments, *positions(operands))
        mask = np.ones((1, length, keys), bool) if mask is None else np.asarray(mask)
        for ranges, blocks, pairs in zip(
            block_ranges(config, operands, block_q, block_k),
            ((block_q, block_k), (block_k, block_q)),
            (mask, mask.swapaxes(1, 2)),
            strict=True,
        ):
            ours, theirs = blocks
            lo, full_lo, full_hi, hi = (np.broadcast_to(array, (len(pairs), array.shape[-1])) for array in ranges)
            for row in range(len(pairs)):
                for i in range(lo.shape[1]):
                    part = pairs[row, i * ours : (i + 1) * ours]
                    assert not part[:, : lo[row, i] * theirs].any()
                    assert not part[:, hi[row, i] * theirs :].any()
                    assert part[:, full_lo[row, i] * theirs : full_hi[row, i] * theirs].all()
                    assert lo[row, i] <= full_lo[row, i] <= full_hi[row, i] <= hi[row, i]


def test_bad_input_is_named():
    q = jnp.ones((2, 8, 4, 16))
    k = jnp.ones((2, 8, 2, 16))
    three = jnp.ones((2, 8, 3, 16))
    mistakes = {
        "q must have 4 dimensions": lambda: attention(q[0], k, k),
        "q has 4 heads, which is no multiple of k's 3": lambda: attention(q, three, three),
        "k and v must have one shape": lambda: attention(q, k, k[:, :4]),
        "must agree in batch and width": lambda: attention(q, k[:1], k[:1]),
        "must not be empty": lambda: attention(q[:0], k[:0], k[:0]),
        "window must be a whole number of at least 1, or None, not -3": lambda: attention(q, k, k, window=-3),
        "soft_cap must be positive": lambda: attention(q, k, k, soft_cap=0.0),
        "scale must be finite": lambda: attention(q, k, k, scale=float("nan")),
        "segment_ids for q must have the shape": lambda: attention(q, k, k, segment_ids=jnp.ones((2, 9), int)),
        "segment_ids must be a pair": lambda: attention(q, k[:, :4], k[:, :4], segment_ids=jnp.ones((2, 8), int)),
        "must broadcast to": lambda: attention(q, k, k, bias=jnp.ones((2, 3, 8, 8))),
        "has no implementation 'cuddn'; did you mean 'cudnn'": lambda: attention(q, k, k, implementation="cuddn"),
    }  # fmt: skip
    for message, call in mistakes.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="one dtype, not float32, bfloat16"):
        attention(q, k.astype(jnp.bfloat16), k)
    with pytest.raises(TypeError, match="positions for q must be integers"):
        attention(q, k, k, causal=True, positions=jnp.ones((2, 8)))


@pytest.mark.parametrize(
    "name", ["packed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("odd", "empty-rows", "one-token"))]
)
def test_hopper_kernels_are_right_and_free_of_races(name, interpreted, monkeypatch):
    arrays, kwargs, cotangents, exact = exact_and_given(BY_NAME[name], jnp.bfloat16, 0)
    monkeypatch.setattr(mosaic_gpu, "per_device", lambda kernels: kernels)
    with interpreted():
        results = [np.asarray(result) for result in _compiled("mosaic_gpu", kwargs)(arrays, cotangents)]
    np.testing.assert_array_equal(results[2], exact[2])
    for result, wanted in zip(results, exact, strict=True):
        assert error(result, wanted) < 1e-2


@pytest.mark.parametrize("name", ["packed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("packed-wide", "empty-rows"))])
def test_hopper_kernels_with_the_gradients_in_one(name, interpreted, monkeypatch):
    arrays, kwargs, cotangents, exact = exact_and_given(BY_NAME[name], jnp.bfloat16, 0)
    monkeypatch.setattr(mosaic_gpu, "per_device", lambda kernels: kernels)
    monkeypatch.setattr(mosaic_gpu_backward, "ONE_KERNEL_TO_WIDTH", 128)
    with interpreted(cores=1):
        results = [np.asarray(result) for result in _compiled("mosaic_gpu", kwargs)(arrays, cotangents)]
    for result, wanted in zip(results, exact, strict=True):
        assert error(result, wanted) < 1e-2


@pytest.mark.parametrize("name", ["packed-gpt2", "gemma-local"])
def test_hopper_kernels_lower_for_real_shapes(name):
    arrays, kwargs = BY_NAME[name].abstract()

    def gradients(q, k, v, segment_ids):
        def total(*arrays):
            out = attention(*arrays, **kwargs, segment_ids=segment_ids, implementation="mosaic_gpu")
            return out.astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    segment_ids = kwargs.pop("segment_ids", None)
    with target(H100):
        lowered = jax.jit(gradients).trace(*arrays, segment_ids).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_who_serves_and_why_not():
    arrays, kwargs = BY_NAME["packed"].abstract()
    with target(H100):
        assert explain(attention, *arrays, **kwargs).chosen == "mosaic_gpu"
    with target(A100), pytest.raises(NotImplementedError, match=r"later, not NVIDIA A100.* serves it"):
        attention(*arrays, **kwargs, implementation="mosaic_gpu")
    answers = explain(attention, *BY_NAME["square"].abstract()[0], causal=True)
    assert answers.chosen == "xla"
    reasons = {answer.implementation: answer.reason for answer in answers.answers}
    assert "needs an NVIDIA GPU of compute capability 9.0" in reasons["mosaic_gpu"]
    assert reasons["reference"] == ""
