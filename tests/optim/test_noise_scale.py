"""The noise scale of quadratics whose true one is known, and what the transform does with steps that tell nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo import optim
from crescendo.optim.batch_size import BatchStats
from crescendo.optim.noise_scale import group_indices, layer_squared_norms

STEPS, K_MAX, EXAMPLES, WIDTH = 2000, 4, 8, 32
SHAPES = {"blocks": {"kernel": (2, WIDTH // 4)}, "head": (WIDTH // 2,)}
PARAMS = jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
# A weight of 1 / (1 - decay) = 1000 steps, of which the 2,000 draws are worth 1,500.
TRANSFORM = optim.gradient_noise_scale(0.999, groups="layer", norm_layers=True)


def stats_of(gradients, count):
    """BatchStats of per-example gradients [K_MAX, EXAMPLES, WIDTH], of which `count` microbatches are used."""
    used = (jnp.arange(K_MAX) < count)[:, None]
    means = jnp.where(used, gradients.mean(axis=1), 0)
    mean = means.sum(axis=0) / count
    parts = lambda x: jnp.square(x).reshape(*x.shape[:-1], 4, -1).sum(axis=-1)  # noqa: E731
    by_layer = lambda x: jnp.stack([x[..., 0], x[..., 1], x[..., 2] + x[..., 3]], axis=-1)  # noqa: E731
    return BatchStats(
        examples_seen=jnp.int32(0),
        batch_size=count * EXAMPLES,
        loss=jnp.float32(0),
        squared_norm=jnp.sum(jnp.square(mean)),
        microbatch_squared_norms=jnp.sum(jnp.square(means), axis=1),
        microbatches=count,
        layer_squared_norms=by_layer(parts(mean)),
        microbatch_layer_squared_norms=by_layer(parts(means)),
        norm_squared_norm=jnp.sum(jnp.square(mean)),
        norm_example_squared_norm=jnp.sum(jnp.where(used[..., None], jnp.square(gradients), 0)) / count / EXAMPLES,
    )


@jax.jit
def run(key, gradient, deviations, counts):
    """The state after `len(counts)` steps on a quadratic whose example gradients are N(gradient, deviations^2)."""

    def step(state, xs):
        key, count = xs
        noise = jax.random.normal(key, (K_MAX, EXAMPLES, WIDTH))
        return TRANSFORM.update(PARAMS, state, batch_stats=stats_of(gradient + deviations * noise, count))[1], None

    return jax.lax.scan(step, TRANSFORM.init(PARAMS), (jax.random.split(key, len(counts)), counts))[0]


@functools.cache
def read():
    """All estimates of a state, compiled once: {name: NoiseScale}."""

    def every(state):
        found = optim.group_noise_scales(state, PARAMS, "layer")
        return found | {name: optim.noise_scale(state, name) for name in ("gradient", "norm_layers")}

    return jax.jit(every)


def truth(gradient, deviations):
    """(||G||^2, tr(Sigma)) of each name in `read()`."""
    parts = {"blocks/0": slice(0, 8), "blocks/1": slice(8, 16), "head": slice(16, 32)}
    parts |= dict.fromkeys(("gradient", "norm_layers"), slice(None))
    return {name: (np.sum(gradient[part] ** 2), np.sum(deviations[part] ** 2)) for name, part in parts.items()}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1),
    counts=st.sampled_from([(2,), (4,), (1, 2, 3, 4), (2, 1)]),
    noise_scale=st.floats(2.0, 12.0),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_both_estimators_find_the_true_noise_scale(seed, counts, noise_scale, size):
    """Within 5% over 2,000 draws, whatever the number of microbatches, also where it changes all the time.

    H (x - c) is the gradient of the quadratic (x - c)' H (x - c) / 2: with c normal about the minimum, so is it.
    """
    random = np.random.default_rng(seed)
    curvature = random.uniform(0.5, 2.0, WIDTH)
    gradient = size * curvature * np.sign(random.normal(size=WIDTH)) * random.uniform(0.7, 1.3, WIDTH)
    deviations = curvature * np.sqrt(noise_scale * np.sum(gradient**2) / np.sum(curvature**2))
    drawn = random.permutation(np.resize(counts, STEPS))
    state = run(jax.random.key(seed), jnp.float32(gradient), jnp.float32(deviations), jnp.int32(drawn))
    found = read()(state)
    for name, (squared_gradient, trace) in truth(gradient, deviations).items():
        # A layer is a quarter of the quadratic, so its estimates are twice as noisy.
        tolerance = 0.05 if name in ("gradient", "norm_layers") else 0.1
        estimate = found[name]
        np.testing.assert_allclose(estimate.squared_gradient, squared_gradient, rtol=tolerance, err_msg=name)
        np.testing.assert_allclose(estimate.trace, trace, rtol=tolerance, err_msg=name)
        np.testing.assert_allclose(estimate.value, trace / squared_gradient, rtol=tolerance, err_msg=name)
        assert abs(estimate.value - trace / squared_gradient) < 4.5 * estimate.standard_error


@pytest.mark.slow
def test_the_standard_error_is_the_spread_of_the_estimates():
    """Over 100 runs of 150 steps the errors, in standard errors, have mean 0 and deviation 1."""
    gradient, deviations = jnp.full(WIDTH, 0.25), jnp.full(WIDTH, 0.5)
    keys, counts = jax.random.split(jax.random.key(0), 100), jnp.full(150, 2)
    states = jax.vmap(run, (0, None, None, None))(keys, gradient, deviations, counts)
    estimates = jax.vmap(read())(states)
    for name in ("gradient", "norm_layers"):
        z = (estimates[name].value - 4.0) / estimates[name].standard_error
        assert abs(np.mean(z)) < 0.3, name  # 100 runs give 0.1, and the ratio of averages has a bias of second order
        assert 0.8 < np.std(z) < 1.2, name  # 100 runs give 0.07


def exact(squared_gradient=1.0, trace=16.0, count=2, **changes):
    """Statistics that equal their means: microbatches of 8 examples."""
    size = 8 * count
    small = jnp.where(jnp.arange(K_MAX) < count, squared_gradient + trace / 8, 0.0)
    stats = BatchStats(
        *(jnp.int32(0), jnp.int32(size), jnp.float32(0), jnp.float32(squared_gradient + trace / size)),
        *(small, jnp.int32(count)),
    )
    return stats._replace(**changes)


PLAIN = optim.gradient_noise_scale(0.9)


@jax.jit
def plain_step(state, stats):
    return PLAIN.update(PARAMS, state, batch_stats=stats)[1]


def test_one_estimate_is_the_value_and_has_no_error_yet():
    """The bias correction: the first of many is not weighed down by the zeros before it."""
    found = optim.noise_scale(plain_step(PLAIN.init(PARAMS), exact()))
    np.testing.assert_allclose([found.value, found.squared_gradient, found.trace], [16, 1, 16], rtol=1e-5)
    assert np.isinf(found.standard_error)


def test_averages_are_weighted_by_the_decay():
    """Three steps with weights 0.81, 0.9, 1, from the definition of an exponential average."""
    state = PLAIN.init(PARAMS)
    inputs = [(1.0, 16.0, 2), (3.0, 8.0, 4), (2.0, 2.0, 3)]
    for arguments in inputs:
        state = plain_step(state, exact(*arguments))
    gradient, trace, _ = np.average(inputs, axis=0, weights=[0.81, 0.9, 1])
    found = optim.noise_scale(state)
    np.testing.assert_allclose(found[2:], [gradient, trace], rtol=1e-5)
    np.testing.assert_allclose(found.value, trace / gradient, rtol=1e-5)


@pytest.mark.parametrize(
    "stats",
    [
        exact(count=1),
        exact(squared_norm=jnp.float32(jnp.nan)),
        exact(microbatch_squared_norms=jnp.array([1.0, jnp.inf, 0.0, 0.0])),
        None,
    ],
    ids=["one microbatch", "NaN", "infinity", "no statistics"],
)
def test_a_step_that_tells_nothing_changes_nothing(stats):
    for before in (PLAIN.init(PARAMS), plain_step(PLAIN.init(PARAMS), exact())):
        updates, after = PLAIN.update(PARAMS, before, batch_stats=stats)
        assert updates is PARAMS
        jax.tree.map(np.testing.assert_array_equal, after, before)


def test_before_the_first_estimate_anything_is_possible():
    """And nothing on the way is NaN, which `JAX_DEBUG_NANS` would stop at; nor is a step with a single microbatch."""
    one = exact(count=1)
    one = one._replace(
        layer_squared_norms=jnp.ones(3), microbatch_layer_squared_norms=jnp.eye(K_MAX, 3),
        norm_squared_norm=jnp.float32(1), norm_example_squared_norm=jnp.float32(2), batch_size=jnp.int32(1),
    )  # fmt: skip
    with jax.debug_nans(True):
        begin = TRANSFORM.init(PARAMS)
        for state in (begin, TRANSFORM.update(PARAMS, begin, batch_stats=one)[1]):
            for found in (*optim.group_noise_scales(state, PARAMS, "layer").values(), optim.noise_scale(state)):
                np.testing.assert_array_equal(found, [np.inf, np.inf, 0, 0])
            assert np.isinf(list(state.report().values())).all()


def test_a_gradient_lost_in_noise_has_an_infinite_noise_scale():
    found = optim.noise_scale(plain_step(PLAIN.init(PARAMS), exact(squared_gradient=-0.5)))
    assert np.isinf(found.value)
    assert np.isinf(found.standard_error)
    np.testing.assert_allclose(found.squared_gradient, -0.5, rtol=1e-5)


def test_another_number_of_microbatches_compiles_nothing():
    state = plain_step(PLAIN.init(PARAMS), exact())
    before = plain_step._cache_size()
    plain_step(plain_step(state, exact(count=4)), exact(count=1))
    assert plain_step._cache_size() == before


def test_groups():
    """By layer, by parameter and by a function; the squared norms add up."""
    assert group_indices(PARAMS, "layer") == {"blocks/0": [0], "blocks/1": [1], "head": [2]}
    assert group_indices(PARAMS, "parameter") == {"blocks/kernel": [0, 1], "head": [2]}
    assert group_indices(PARAMS, lambda path: path[-1][0]) == {"k": [0, 1], "h": [2]}
    tree = jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), PARAMS)
    expected = [np.sum(np.arange(8.0) ** 2), np.sum(np.arange(8.0, 16) ** 2), np.sum(np.arange(16.0) ** 2)]
    np.testing.assert_allclose(layer_squared_norms(tree), expected)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=f"decay = {decay} must be at least 0 and below 1"):
        optim.gradient_noise_scale(decay)


def test_bad_groups_and_missing_statistics():
    with pytest.raises(ValueError, match="groups = 'layers' must be 'layer' or 'parameter'"):
        optim.gradient_noise_scale(groups="layers")
    for options, message in (
        ({"groups": "layer"}, "measure the statistic 'layers'"),
        ({"norm_layers": True}, "'norm_"),
    ):
        transform = optim.gradient_noise_scale(**options)
        with pytest.raises(ValueError, match=message):
            transform.update(PARAMS, transform.init(PARAMS), batch_stats=exact())


def test_what_a_state_does_not_keep_cannot_be_read():
    state = PLAIN.init(PARAMS)
    with pytest.raises(ValueError, match="source = 'loss' must be"):
        optim.noise_scale(state, "loss")
    with pytest.raises(ValueError, match="keeps no noise scale of norm layers"):
        optim.noise_scale(state, "norm_layers")
    with pytest.raises(ValueError, match="the state has no groups"):
        optim.group_noise_scales(state, PARAMS, "layer")
    with pytest.raises(ValueError, match="keeps 3 groups, these are 2"):
        optim.group_noise_scales(TRANSFORM.init(PARAMS), PARAMS, "parameter")
    with pytest.raises(ValueError, match="holds 0 noise scales"):
        optim.noise_scale(())
