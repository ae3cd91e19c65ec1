"""Attention: what a mask hides, memory, which blocks are computed, who serves, errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as drawn_by_hypothesis
from hypothesis import settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice

from crescendo.pallas_kernels import conformance, tiles
from crescendo.pallas_kernels.attention import attention
from crescendo.pallas_kernels.attention.contract import Config, Operands, block_ranges, positions, visible
from crescendo.pallas_kernels.attention.hopper import backward
from crescendo.pallas_kernels.attention.hopper.tiling import Schedule
from crescendo.pallas_kernels.attention.specs import SPECS
from crescendo.pallas_kernels.interpreter import interpreted
from crescendo.pallas_kernels.op import explain, target

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
BY_NAME = {spec.name: spec for spec in SPECS}
pytestmark = pytest.mark.usefixtures("quick_compilation")


HIDING = {
    "segments": {},
    "causal": {"causal": True},
    "window": {"window": 3},
    "soft cap": {"causal": True, "soft_cap": 2.0},
    "bias": {"bias": True},
}


def hidden_case(name: str, implementation: str):
    """Outputs and gradients of the tokens of segment 1, where those of segment 2 hold a value, their cotangents too."""
    options = {**HIDING[name]}
    random = np.random.default_rng(0)
    batch, length, width = 2, 7, 8
    segments = jnp.asarray(random.integers(1, 3, (batch, length)), jnp.int32)
    hidden = (segments == 2)[..., None, None]
    q, k, v, cotangent = (jnp.float32(random.normal(size=(batch, length, heads, width))) for heads in (4, 2, 2, 4))
    if "bias" in options:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        options["bias"] = jnp.where(same, jnp.float32(random.normal(size=same.shape)), -jnp.inf)
    else:
        options["segment_ids"] = segments

    @jax.jit
    def run(value, of_cotangent):
        call = functools.partial(attention, implementation=implementation, **options)
        out, pull = jax.vjp(call, *(jnp.where(hidden, value, x) for x in (q, k, v)))
        results = out, *pull(jnp.where(hidden, of_cotangent, cotangent))
        return [jnp.where(hidden, 0, result) for result in results]

    return run


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_a_mask_hides_does_not_matter(name, implementation):
    run = hidden_case(name, implementation)
    with tiles.cut("attention", "chunks of keys", keys=4):
        expected = run(0.0, 0.0)
    assert all(np.isfinite(array).all() and np.any(array) for array in expected)
    for value in (np.nan, np.inf, -np.inf, 1e38):
        # The reference's derivative is JAX's, which multiplies a cotangent by 0 too.
        for of_cotangent in (0.0, value) if implementation == "xla" else (0.0,):
            for result, array in zip(run(value, of_cotangent), expected, strict=True):
                np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_is_seen_and_not_finite_shows(implementation):
    q = jnp.ones((1, 2, 1, 2))
    v = jnp.array([[1.0, 1.0], [jnp.nan, 0.0]]).reshape(q.shape)
    run = functools.partial(attention, implementation=implementation)
    ids, order = (jnp.array([[1, 1]]), jnp.array([[1, 2]])), (jnp.array([[0, 0]]), jnp.array([[0, 1]]))
    for hides in (
        {"causal": True, "positions": order},
        {"segment_ids": ids},
        {"bias": jnp.array([0.0, -jnp.inf]).reshape(1, 1, 1, 2)},
    ):
        np.testing.assert_array_equal(run(q, 0 * q, v, **hides), jnp.ones_like(q))
    causal = run(q, 0 * q, v, causal=True)
    np.testing.assert_array_equal(causal[0, 0], 1)
    assert jnp.isnan(causal[0, 1, 0, 0])
    for operands in ((q, v, q), (v, q, q)):
        assert jnp.isnan(run(*operands, causal=True)[0, 1]).all()


def test_float16_loses_no_gradients_of_scores():
    """Over 4,096 keys, a mean over as many rows: the scores' gradients are below float16's least number."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, length, 1, 16)), jnp.float16) for length in (8, 4096, 4096))

    def gradient(implementation, *arrays):
        loss = lambda *x: attention(*x, implementation=implementation).astype(jnp.float32).sum() / 4096  # noqa: E731
        return jax.jit(jax.grad(loss))(*arrays).astype(jnp.float32)

    exact = gradient("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    assert jnp.abs(gradient("xla", q, k, v) - exact).max() < 1e-7  # float16's numbers are 6e-8 apart there
    assert jnp.abs(exact).max() > 3e-6


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


def ranges_of(config, operands, block_q, block_k):
    """`block_ranges`, by one program."""
    return jax.jit(lambda: block_ranges(config, operands, block_q, block_k))()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("block_q", "block_k"), [(8, 16), pytest.param(16, 8, marks=pytest.mark.slow)])
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
            ranges_of(config, operands, block_q, block_k),
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


@settings(deadline=None, max_examples=4)
@drawn_by_hypothesis(
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    blocks=st.sampled_from([(8, 16), (16, 8), (8, 8)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 80),
)
def test_ranges_by_arithmetic_are_those_found_by_comparing_positions(lengths, blocks, causal, window):
    config = Config(1.0, causal=causal, window=window)
    q, k = (jax.ShapeDtypeStruct((1, size, 1, 8), jnp.float32) for size in lengths)
    where = (jnp.arange(size, dtype=jnp.int32)[None] for size in lengths)
    found = ranges_of(config, Operands(q, k, k), *blocks)
    expected = ranges_of(config, Operands(q, k, k, None, None, None, *where), *blocks)
    for ours, theirs in zip(found, expected, strict=True):
        lo, full_lo, full_hi, hi = map(np.asarray, ours)
        np.testing.assert_array_equal(hi - lo, theirs.hi - theirs.lo)
        np.testing.assert_array_equal(full_hi - full_lo, theirs.full_hi - theirs.full_lo)
        np.testing.assert_array_equal(np.where(hi > lo, lo, 0), np.where(hi > lo, theirs.lo, 0))
        np.testing.assert_array_equal(
            np.where(full_hi > full_lo, full_lo, 0), np.where(full_hi > full_lo, theirs.full_lo, 0)
        )
        assert (np.diff([lo, full_lo, full_hi, hi], axis=0) >= 0).all()


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
        "positions = 2147483640 must be .* below": lambda: attention(q, k, k, causal=True, positions=2**31 - 8),
        "must broadcast to": lambda: attention(q, k, k, bias=jnp.ones((2, 3, 8, 8))),
        "has no implementation 'cuddn'; did you mean 'cudnn'": lambda: attention(q, k, k, implementation="cuddn"),
    }  # fmt: skip
    for message, call in mistakes.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="one dtype, not float32, bfloat16"):
        attention(q, k.astype(jnp.bfloat16), k)
    with pytest.raises(TypeError, match=r"bias must be floating-point, not bool: jnp.where"):
        attention(q, k, k, bias=jnp.ones((2, 4, 8, 8), bool))
    with pytest.raises(TypeError, match="bias must be an array, not float"):
        attention(q, k, k, bias=0.5)
    with pytest.raises(TypeError, match="segment_ids for q must be an array, not list"):
        attention(q, k, k, segment_ids=[[1] * 8] * 2)
    with pytest.raises(TypeError, match="scale must be a Python number or None"):
        jax.jit(lambda scale: attention(q, k, k, scale=scale))(0.5)
    with pytest.raises(TypeError, match="soft_cap must be a Python number or None, not 'high'"):
        attention(q, k, k, soft_cap="high")
    with pytest.raises(TypeError, match="positions for q must be integers"):
        attention(q, k, k, causal=True, positions=jnp.ones((2, 8)))
    with pytest.raises(TypeError, match="positions must be integers, not float32"):
        attention(q, k, k, causal=True, positions=jnp.float32(3))


def test_positions_told_by_a_number(quick_compilation):
    """Python's or traced, they are those of queries that follow so many of the keys."""
    keys, begin = jax.random.split(jax.random.key(0), 3), int(np.random.default_rng().integers(1, 37))
    q, k, v = (jax.random.normal(key, (2, n, 2, 8)) for key, n in zip(keys, (4, 40, 40), strict=True))
    sides = jnp.broadcast_to(begin + jnp.arange(4), (2, 4)), jnp.broadcast_to(jnp.arange(40), (2, 40))
    call = functools.partial(attention, q, k, v, causal=True)
    for implementation in ("xla", "reference"):
        expected = call(positions=sides, implementation=implementation)
        np.testing.assert_array_equal(call(positions=begin, implementation=implementation), expected)
        traced = jax.jit(functools.partial(call, implementation=implementation))(positions=jnp.int32(begin))
        np.testing.assert_allclose(traced, expected, atol=1e-6)  # another order of sums, of numbers near 1
    assert jnp.abs(expected - call(positions=0)).max() > 0.01


@pytest.mark.slow
def test_hopper_kernels_take_a_sum_of_whole_rows_from_a_ring():
    """`delta` from outside, as for a block of keys, is what they would have found from the rows of `out`."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, out, dout = (jax.random.normal(key, (1, 90, 1, 64), jnp.bfloat16) for key in keys)
    operands, config, lse = Operands(q, k, v), Config(0.1), jnp.zeros((1, 1, 90))
    delta = jnp.einsum("bthd,bthd->bht", out.astype(jnp.float32), dout.astype(jnp.float32)) - 1.0
    with interpreted(conformance.HOMES["mosaic_gpu"].stand_in):
        run = functools.partial(jax.jit(backward.backward, static_argnums=0), config, operands, lse, dout)
        whole, found = run(delta)[:3], run(jnp.full_like(delta, -1.0), out)[:3]
    for theirs, ours in zip(whole, found, strict=True):
        assert conformance.error(ours, np.asarray(theirs)) < 1e-3


@settings(deadline=None, max_examples=30)
@drawn_by_hypothesis(
    pairs=st.integers(1, 9), heads=st.integers(1, 7), paired=st.booleans(), at_once=st.none() | st.integers(1, 20)
)
def test_every_tile_is_taken_once_and_pairs_share_the_work(pairs, heads, paired, at_once):
    schedule = Schedule(2 * pairs, heads, paired, at_once)
    taken = [
        [tuple(int(x) for x in schedule.tile(block, n)) for n in range(schedule.count(block))]
        for block in range(schedule.blocks)
    ]
    assert sorted(itertools.chain(*taken)) == list(itertools.product(range(heads), range(2 * pairs)))
    counts = [len(of_block) for of_block in taken]
    assert max(counts) - min(counts) <= schedule.pairing
    if paired:  # a causal tile's work is its number
        for of_block in taken:
            assert sum(tile for _, tile in of_block) == len(of_block) * (2 * pairs - 1) / 2


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
