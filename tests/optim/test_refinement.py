"""Recording gradient norms, and the schedules refined from them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo import optim
from crescendo.optim import refinement, schedules

POSITIVE = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=60)


def from_the_paper(norms, norm, smoothing):
    """Algorithm 1 with its median filter, as a double loop."""
    count = len(norms)
    width = 2 * int(smoothing * count / 2) + 1
    padded = [*norms, *np.pad(norms, (0, 2 * width), mode="reflect")[count:]]
    smooth = []
    for t in range(count):
        window = [padded[max(t + i, 0)] for i in range(-(width // 2), width // 2 + 1)]
        smooth.append(np.median(window))
    weights = [1 / x if norm == "l1" else 1 / x**2 for x in smooth]
    rates = np.array([w * sum(weights[t + 1 :]) for t, w in enumerate(weights)])
    return rates / rates.max()


@settings(max_examples=60, deadline=None)
@given(POSITIVE, st.sampled_from(["l1", "l2"]), st.sampled_from([0.0, 0.1, 0.3]))
def test_refine_properties(norms, norm, smoothing):
    """The paper's formula; the last value 0, the maximum 1; blind to the scale of the norms."""
    multipliers = optim.refine(norms, norm=norm, smoothing=smoothing)
    assert multipliers.shape == (len(norms),)
    assert multipliers[-1] == 0
    assert multipliers.max() == 1
    assert multipliers.min() >= 0
    np.testing.assert_allclose(multipliers, from_the_paper(norms, norm, smoothing), rtol=1e-9, atol=1e-12)
    scaled = optim.refine(np.array(norms) * 1024, norm=norm, smoothing=smoothing)
    np.testing.assert_allclose(scaled, multipliers, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-150, 1e150), st.integers(2, 500), st.sampled_from(["l1", "l2"]))
def test_constant_norms_give_linear_decay(value, count, norm):
    """Exactly: not to within a tolerance."""
    multipliers = optim.refine([value] * count, norm=norm)
    np.testing.assert_array_equal(multipliers, np.arange(count - 1, -1, -1) / (count - 1))


def test_constant_norms_give_the_linear_schedule():
    refined = optim.refined_schedule(0.3, [2.0] * 50, 1000, warmup=100)
    line = schedules.linear(0.3, 1000)
    counts = np.arange(100, 1001)
    np.testing.assert_allclose(refined(counts), line(counts), rtol=0, atol=1e-6 * 0.3)
    assert refined(1000) == 0
    assert refined(0) == 0
    assert optim.refined_schedule(0.3, [2.0] * 50, 1000)(0) == np.float32(0.3)


@functools.cache
def recorder(clocked):
    """A run over values[:steps], each the gradient's four entries; 8 slots, 32 examples a step if `clocked`."""
    transform = optax.chain(optim.record_gradient_norms(8), optim.sgd(0.1))
    params = {"a": jnp.ones(3), "b": jnp.ones(())}

    def record(values, steps):
        def step(i, state):
            clock = {"examples_seen": 32 * i} if clocked else {}
            grads = jax.tree.map(lambda p: jnp.full_like(p, values[i]), params)
            return transform.update(grads, state, params, **clock)[1]

        return jax.lax.fori_loop(0, steps, step, transform.init(params))

    return jax.jit(record)


def run(values, *, clocked=False):
    """The optimizer's state after gradients of the given values."""
    return recorder(clocked)(np.resize(np.float32(values), 100), len(values))


@pytest.mark.parametrize("steps", [2, 7, 8, 9, 16, 17, 100])
def test_history_is_bounded(steps):
    """However long the run: at most 8 slots, each the mean over as many steps."""
    values = np.random.default_rng(steps).uniform(1, 2, steps)
    norms = optim.recorded_norms(run(values, clocked=True))
    stride = 1
    while steps > 8 * stride:
        stride *= 2
    full = steps // stride
    assert full <= 8
    slots = values[: full * stride].reshape(full, stride).mean(axis=1)
    clock = 32 * np.arange(full * stride).reshape(full, stride).mean(axis=1)
    np.testing.assert_allclose(norms.l1, 4 * slots, rtol=1e-6)
    np.testing.assert_allclose(norms.l2, 2 * slots, rtol=1e-6)
    np.testing.assert_allclose(norms.clock, clock, rtol=1e-6)


def test_steps_that_are_not_finite_are_left_out():
    values = np.array([1.0, np.inf, 3.0, np.nan, 5.0, 6.0])
    norms = optim.recorded_norms(run(values))
    np.testing.assert_allclose(norms.l2, [2, 6, 10, 12])
    np.testing.assert_allclose(norms.clock, [0, 2, 4, 5])
    assert np.isfinite(optim.refine(norms, norm="l2")).all()


def test_updates_pass_unchanged():
    transform = optim.record_gradient_norms()
    grads = {"a": jnp.array([1.0, -2.0], jnp.bfloat16)}
    updates, _ = transform.update(grads, transform.init(grads))
    assert updates["a"] is grads["a"]


def test_the_clock_places_the_multipliers():
    """A run whose batch doubled: the first half of its steps is the first third of its examples."""
    clock = np.array([0.0, 10.0, 20.0, 40.0, 60.0])
    norms = optim.GradientNorms(clock, np.ones(5), np.ones(5))
    schedule = optim.refined_schedule(1.0, norms, 600)
    np.testing.assert_allclose([schedule(t) for t in (0, 100, 200, 400, 600)], [1, 0.75, 0.5, 0.25, 0], atol=1e-6)
    with pytest.raises(ValueError, match="clock of the norms doesn't rise"):
        optim.refined_schedule(1.0, norms._replace(clock=clock[::-1]), 600)


def test_saved_and_loaded(tmp_path):
    """A small file gives the same schedule, at another peak and length if wanted."""
    norms = np.random.default_rng(0).uniform(1, 3, 512)
    path = tmp_path / "refined.json"
    optim.save_refined(path, norms, norm="l2")
    assert path.stat().st_size < 30_000
    assert json.loads(path.read_text())["norm"] == "l2"
    counts = np.linspace(0, 1000, 777)
    direct = optim.refined_schedule(0.5, norms, 1000, norm="l2", warmup=50)
    loaded = optim.refined(0.5, 1000, path=path, warmup=50)
    np.testing.assert_array_equal(loaded(counts), direct(counts))
    np.testing.assert_array_equal(optim.refined(1.0, 2000, path=path, warmup=100)(2 * counts), 2 * loaded(counts))


@pytest.mark.parametrize("content", ["", "{}", '{"fractions": [0, 1], "multipliers": [1]}', '[1, 2]',
                                     '{"fractions": [0, 1], "multipliers": [2, 0]}', "[" * 100_000,
                                     '{"fractions": [0, 1], "multipliers": [NaN, 0]}',
                                     '{"fractions": [0, 1], "multipliers": [1, 1e999]}',
                                     '{"fractions": [0, 1], "multipliers": [true, 0]}',
                                     '{"fractions": [0, 0, 1], "multipliers": [1, 1, 0]}',
                                     '{"fractions": [0, 1], "multipliers": [0, 0]}',
                                     '{"fractions": [0, 1], "multipliers": [1, 0], "power": 2}',
                                     '{"fractions": [0, 1], "multipliers": [1, 0], "norm": "l3"}'])  # fmt: skip
def test_a_file_that_is_no_schedule(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad.json is not a refined schedule: write it with save_refined"):
        optim.refined(1.0, 10, path=path)


@pytest.mark.parametrize(
    ("norms", "options", "message"),
    [
        ([], {}, "norms must be a sequence of at least 2"),
        ([1.0], {}, "norms must be a sequence of at least 2"),
        ([[1.0, 2.0]], {}, "norms must be a sequence of at least 2"),
        ([1.0, -2.0], {}, "norms must be positive and finite, got -2.0 at 1"),
        ([0.0, 2.0], {}, "norms must be positive and finite, got 0.0 at 0"),
        ([1.0, np.inf, 1.0], {}, "norms must be positive and finite, got inf at 1"),
        ([1.0, np.nan], {}, "norms must be positive and finite, got nan at 1"),
        ([1.0, 2.0], {"norm": "l3"}, "unknown norm 'l3'"),
        ([1.0, 2.0], {"smoothing": 1.5}, "smoothing must be from 0 to 1, got 1.5"),
        ([1e300, 1e300, 1.0], {"norm": "l2", "smoothing": 0}, "too far apart to refine"),
    ],
)
def test_bad_norms(norms, options, message):
    with pytest.raises(ValueError, match=message):
        optim.refine(norms, **options)


def test_bad_recordings():
    for slots in (0, 7):
        with pytest.raises(ValueError, match=f"slots = {slots} must be at least 2 and below 2.31 and a multiple of 2"):
            optim.record_gradient_norms(slots)
    with pytest.raises(ValueError, match="holds no gradient norms"):
        optim.recorded_norms(optax.adam(0.1).init(jnp.ones(2)))
    with pytest.raises(ValueError, match="only 1 finite gradient norms were recorded"):
        optim.recorded_norms(run([1.0, np.nan]))
    with pytest.raises(ValueError, match="total = 0 must be above 0"):
        optim.refined_schedule(1.0, [1.0, 1.0], 0)


def test_median_filter_keeps_a_trend_at_the_end():
    """The reflection on the right end is what the paper's figures rest on: an edge repeated would flatten it."""
    smooth = refinement._median_filter(np.arange(20.0), 5)
    np.testing.assert_array_equal(smooth[2:18], np.arange(2.0, 18.0))
    np.testing.assert_array_equal(smooth[:2], [0.0, 1.0])
