"""What a step measures on demand, against every microbatch and every example differentiated alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo import models
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.tasks.base import EXAMPLE, Loss
from crescendo.experiments.tasks.language_model import language_model
from crescendo.experiments.trainer.gradient_statistics import STATISTICS, measured_gradients
from crescendo.experiments.trainer.shapes import initial_state
from crescendo.experiments.trainer.step import make_step
from crescendo.models import ModelConfig
from crescendo.models.loss import next_token_loss
from crescendo.optim import adaptive_batch_size, batch_size, gradient_noise_scale, noise_scale, policies
from crescendo.optim.noise_scale import layer_squared_norms

CONFIG = ModelConfig(
    vocab_size=40, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24, scan_layers=False
).for_platform("cpu")
K_MAX, COUNT, EXAMPLES, LENGTH = 4, 3, 2, 8
TASK = language_model(RandomText(CONFIG.vocab_size, LENGTH), CONFIG)
# Each program runs once or twice: the compiler need not work on its speed.
QUICK = {"xla_backend_optimization_level": "0"}


def loss_fn(parameters, rows):
    return Loss(*next_token_loss(CONFIG, parameters, rows))


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)
    draw = lambda high: jnp.asarray(random.integers(0, high, (K_MAX, EXAMPLES, LENGTH)), jnp.int32)  # noqa: E731
    rows = {"tokens": draw(40), "labels": draw(40), "segment_ids": 1 + 0 * draw(2), "positions": draw(LENGTH)}
    rows[EXAMPLE] = jnp.arange(K_MAX * EXAMPLES).reshape(K_MAX, EXAMPLES)
    scalars = {"microbatches": jnp.int32(COUNT), "examples_seen": jnp.int32(6), "seed": jnp.uint32(0)}
    return jax.jit(models.initialize, static_argnums=0)(CONFIG, jax.random.key(0)), {"rows": rows, **scalars}


@pytest.fixture(scope="module")
def measured(problem):
    """Gradients and statistics with everything asked for."""
    return jax.jit(lambda p, b: measured_gradients(loss_fn, p, b, STATISTICS), compiler_options=QUICK)(*problem)


@pytest.fixture(scope="module")
def alone(problem):
    """The mean gradient of every example used, as a tree of float64 [COUNT, EXAMPLES, ...]."""
    parameters, batch = problem
    rows = jax.tree.map(lambda x: x[:COUNT, :, None], batch["rows"])
    mean = jax.grad(lambda p, row: jnp.divide(*loss_fn(p, row)[:2]))
    gradients = jax.jit(jax.vmap(jax.vmap(mean, (None, 0)), (None, 0)))(parameters, rows)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), gradients)


def flat(tree, batch_axes):
    """The leaves as one array, [*batch_axes, numbers]."""
    return np.concatenate([x.reshape(*x.shape[:batch_axes], -1) for x in jax.tree.leaves(tree)], axis=-1)


@pytest.mark.slow
def test_what_is_not_asked_for_is_not_there_and_changes_nothing_else(measured, problem):
    gradients, stats, _ = measured
    plain_gradients, plain, _ = jax.jit(lambda p, b: measured_gradients(loss_fn, p, b))(*problem)
    assert [getattr(plain, name) for name in plain._fields[6:]] == [None] * len(plain._fields[6:])
    for name in plain._fields[:6]:
        np.testing.assert_allclose(getattr(stats, name), getattr(plain, name), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, plain_gradients)


def test_the_unit_of_the_weights_does_not_matter():
    """A loss whose weights are a quarter of others means the same: gradients, statistics, means of extra sums."""

    def of_unit(unit):
        def loss(parameters, rows):
            outputs = rows["x"] * parameters["w"]
            return Loss(
                unit * jnp.sum(jnp.sin(outputs)), unit * jnp.float32(outputs.size), {"x": unit * rows["x"].sum()}
            )

        return loss

    rows = {"x": jnp.arange(24.0).reshape(4, 2, 3), EXAMPLE: jnp.arange(8).reshape(4, 2)}
    batch = {"rows": rows, "microbatches": jnp.int32(3), "examples_seen": jnp.int32(0), "seed": jnp.uint32(0)}
    every = [name for name, statistic in STATISTICS.items() if not statistic.probes]
    expected, quarter = (measured_gradients(of_unit(unit), {"w": jnp.ones(3)}, batch, every) for unit in (1.0, 2.0**-8))
    jax.tree.map(np.testing.assert_array_equal, quarter, expected)


def test_layers(measured, alone):
    stats = measured[1]
    means = jax.tree.map(lambda x: x.mean(axis=1), alone)
    expected = jax.vmap(layer_squared_norms)(jax.tree.map(jnp.float32, means))
    np.testing.assert_allclose(stats.microbatch_layer_squared_norms[:COUNT], expected, rtol=1e-3)
    assert not stats.microbatch_layer_squared_norms[COUNT:].any()
    np.testing.assert_allclose(stats.layer_squared_norms.sum(), stats.squared_norm, rtol=1e-5)
    np.testing.assert_allclose(
        stats.microbatch_layer_squared_norms.sum(axis=1), stats.microbatch_squared_norms, rtol=1e-5
    )


def test_norm_layers(measured, alone):
    stats = measured[1]
    leaves = jax.tree_util.tree_leaves_with_path(alone)
    scales = flat([leaf for path, leaf in leaves if path[-1].key == "scale"], 2)
    np.testing.assert_allclose(stats.norm_example_squared_norm, np.mean(np.sum(scales**2, -1)), rtol=1e-4)
    np.testing.assert_allclose(stats.norm_squared_norm, np.sum(scales.mean(axis=(0, 1)) ** 2), rtol=1e-4)


def test_dot_products_and_coordinates(measured, alone):
    stats = measured[1]
    microbatches = flat(alone, 2).mean(axis=1)
    mean = microbatches.mean(axis=0)
    np.testing.assert_allclose(stats.microbatch_dot_products[:COUNT], microbatches @ mean, rtol=1e-4)
    assert stats.microbatch_dot_products[COUNT] == 0
    variance = EXAMPLES * microbatches.var(axis=0, ddof=1)
    expected = np.max(variance[mean != 0] / mean[mean != 0] ** 2)
    # Relative errors of float32 grow where a coordinate's mean nearly cancels, which is where the maximum is.
    np.testing.assert_allclose(stats.coordinate_variance_ratio, expected, rtol=0.05)


def test_a_step_feeds_the_transforms_and_the_policy(problem):
    """The noise scale of norm layers with a single microbatch, in a chain, inside the compiled step."""
    _, batch = problem
    policy = policies.noise_scale_following(2, 8, source="norm_layers", min_updates=2, confidence=0.0)
    noise = gradient_noise_scale(norm_layers=True, groups="layer")
    chain = adaptive_batch_size(optax.chain(noise, optax.sgd(0.0)), policy)
    step = jax.jit(
        make_step(TASK, chain, max_gradient_norm=1.0, statistics=("layers", *policy.statistics)),
        compiler_options=QUICK,
    )
    state = jax.jit(lambda: initial_state(TASK, chain, 0))()
    for count in (1, 3):
        state, metrics = step(state, batch | {"microbatches": jnp.int32(count)})
        found = noise_scale(state.opt_state, "norm_layers")
        assert np.isfinite(found.trace)
        assert (noise_scale(state.opt_state).trace == 0) == (count == 1)
    assert step._cache_size() == 1
    assert int(metrics["next_batch_size"]) in policy.sizes


def test_an_unknown_statistic_is_refused():
    with pytest.raises(
        ValueError, match="unknown statistic 'dots': use layers, norm_layers, dot_products, coordinates"
    ):
        make_step(TASK, optax.sgd(0.1), max_gradient_norm=None, statistics=("dots",))


def test_what_policies_may_ask_for_is_what_the_step_can_measure():
    assert tuple(STATISTICS) == batch_size.STATISTICS
