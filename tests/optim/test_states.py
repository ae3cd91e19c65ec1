"""What states report of themselves, and the parameters to evaluate, found in whatever they are wrapped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from crescendo import optim
from crescendo.optim import schedules
from crescendo.optim.batch_size import BatchStats, constant
from crescendo.optim.states import find_states

PARAMS = {"kernel": jnp.ones((2, 3), jnp.float32), "bias": jnp.full((3,), 2, jnp.float32)}
GRADIENT = {"kernel": jnp.full((2, 3), 0.5, jnp.float32), "bias": jnp.full((3,), -1, jnp.float32)}


def stats(size=8, seen=0):
    """Two microbatches with ||G||^2 = 2 and tr(Sigma) = 12 at 8 examples."""
    return BatchStats(
        jnp.int32(seen), jnp.int32(size), jnp.float32(1), jnp.float32(3.5), jnp.array([4.0, 6.0]), jnp.int32(2)
    )


def step(optimizer, params, state, **extra):
    updates, state = optimizer.update(GRADIENT, state, params, **extra)
    return optax.apply_updates(params, updates), state


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def labels(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


def test_reports_are_collected_from_every_state():
    """The rate, the noise scale and the trust ratios, behind a mask, a chain, an average and the batch size."""
    inner = optim.chain([optim.gradient_noise_scale(decay=0.5), optax.masked(optim.lamb(0.1), matrices)])
    optimizer = optim.adaptive_batch_size(optim.average_weights(inner, 100), constant(8))
    _, state = step(optimizer, PARAMS, optimizer.init(PARAMS), batch_stats=stats(32))
    found = optim.reported(state)
    assert set(found) == {
        "learning_rate", "noise_scale", "noise_scale_error", "trust_ratio_min", "trust_ratio_median", "trust_ratio_max"
    }  # fmt: skip
    assert all(x.shape == () for x in found.values())
    assert found["learning_rate"] == np.float32(0.2)
    np.testing.assert_allclose(found["trust_ratio_min"], found["trust_ratio_max"])


def test_the_normalisation_layers_noise_scale_is_reported_where_it_is_kept():
    state = optim.gradient_noise_scale(norm_layers=True).init(PARAMS)
    names = ["noise_scale", "norm_layers_noise_scale", "noise_scale_error", "norm_layers_noise_scale_error"]
    assert list(optim.reported(state)) == names


def test_ratios_of_exactly_one_are_left_out():
    state = optim.lamb(0.1).init(PARAMS)
    state = find_states(state, optim.trust_ratio.TrustRatioState)[0]
    for ratios, expected in (
        ([1, 3, 1, 5, 4], [3, 4, 5]),
        ([2, 1, 1, 7], [2, 4.5, 7]),
        ([1, 1], [1, 1, 1]),
        ([], [1, 1, 1]),
    ):
        report = state._replace(trust_ratio=jnp.array(ratios, jnp.float32)).report()
        assert [float(report[f"trust_ratio_{name}"]) for name in ("min", "median", "max")] == expected


def test_who_reports_nothing_is_absent():
    assert optim.reported(optax.adamw(0.1).init(PARAMS)) == {}


def test_groups_of_a_partition_report_under_their_labels():
    optimizer = optax.partition({"matrix": optim.lamb(0.1), "vector": optim.sgd(0.2)}, labels)
    found = optim.reported(optimizer.init(PARAMS))
    assert found["learning_rate_matrix"] == np.float32(0.1)
    assert found["learning_rate_vector"] == np.float32(0.2)
    assert "trust_ratio_min" in found


def test_one_name_twice_is_numbered():
    found = optim.reported(optim.chain([optim.adamw(0.1), optim.adamw(0.2), optim.adamw(0.3)]).init(PARAMS))
    assert found == {f"learning_rate{end}": np.float32(rate) for end, rate in (("", 0.1), ("_2", 0.2), ("_3", 0.3))}


def test_reports_under_jit():
    optimizer = optim.lamb(schedules.linear(0.1))

    @jax.jit
    def report(state):
        return optim.reported(step(optimizer, PARAMS, state, examples_seen=50, total_examples=100)[1])

    assert report(optimizer.init(PARAMS))["learning_rate"] == np.float32(0.05)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("make", [lambda: optim.sgd(0.1, momentum=0), lambda: optax.sgd(0.1)])
def test_the_average_of_the_weights(make, told):
    """Against its definition in float64, with a batch that grows (each step counts 1 where the batch isn't told)."""
    optimizer = optim.average_weights(make(), 20.0)
    if told:
        optimizer = optim.adaptive_batch_size(optimizer, constant(8), "none")
    params, state = PARAMS, optimizer.init(PARAMS)
    assert optim.has_evaluation_params(state)
    jax.tree.map(np.testing.assert_array_equal, optim.evaluation_params(state, params), params)
    total, weight = 0.0, 0.0
    for size in (8, 8, 32):
        extra = {"batch_stats": stats(size)} if told else {}
        params, state = step(optimizer, params, state, **extra)
        decay = math.exp(-(size if told else 1) / 20)
        total = decay * total + (1 - decay) * np.asarray(params["kernel"], np.float64)
        weight = decay * weight + 1 - decay
    np.testing.assert_allclose(optim.evaluation_params(state, params)["kernel"], total / weight, rtol=1e-6)


@pytest.mark.parametrize("make", [lambda: optim.sgd(0.1, momentum=0), lambda: optax.sgd(0.1)])
def test_the_average_is_of_what_the_coupled_rate_makes(make):
    """At 4 times the base the update is doubled before it is averaged, once."""
    optimizer = optim.adaptive_batch_size(optim.average_weights(make(), 20.0), constant(8))
    params, state = step(optimizer, PARAMS, optimizer.init(PARAMS), batch_stats=stats(32))
    np.testing.assert_allclose(params["kernel"], 1 - 0.2 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(optim.evaluation_params(state, params)["kernel"], params["kernel"], rtol=1e-6)


def test_the_average_is_kept_in_float32_and_found_behind_wrappers():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    optimizer = optim.average_weights(optim.adamw(0.1), 20.0)
    state = optimizer.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.weighted_sum)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(optim.evaluation_params(state, params))} == {jnp.dtype(jnp.bfloat16)}
    mapped = optax.tree_map_params(optimizer, lambda x: "param", state, transform_non_params=lambda x: "other")
    assert set(jax.tree.leaves(mapped.weighted_sum)) == {"param"}
    assert mapped.weight == "other"
    masked = optax.masked(optimizer, matrices)
    _, state = step(masked, PARAMS, masked.init(PARAMS))
    found = optim.evaluation_params(state, PARAMS)
    assert (found["kernel"] != PARAMS["kernel"]).all()
    np.testing.assert_array_equal(found["bias"], PARAMS["bias"])


def test_each_group_of_a_partition_has_its_own_point():
    optimizer = optax.partition({"matrix": optim.schedule_free(0.1), "vector": optim.sgd(0.1)}, labels)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        params, state = step(optimizer, params, state)
    found = optim.evaluation_params(state, params)
    assert (found["kernel"] != params["kernel"]).all()
    np.testing.assert_array_equal(found["bias"], params["bias"])


@pytest.mark.parametrize("examples", [0.0, -1.0, math.nan, math.inf])
def test_bad_time_constant(examples):
    with pytest.raises(ValueError, match=f"examples = {examples} must be above 0 and finite"):
        optim.average_weights(optim.adamw(0.1), examples)


def test_schedule_free_from_a_rate_of_zero():
    """Weights of 0 / 0 and weights that underflow leave the average where it was; then it goes on."""
    rates = jnp.array([0.0, 0.0, 1e-30, 1e-20, 1e-3, 0.1, 0.1])
    optimizer = optim.schedule_free(lambda count: rates[jnp.int32(count)])
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(len(rates)):
        params, state = step(optimizer, params, state)
        point = optim.evaluation_params(state, params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state, point)))
    assert (point["kernel"] < PARAMS["kernel"]).all()


def test_schedule_frees_point_is_computed_in_float32():
    """From bfloat16 parameters as from the same numbers in float32, rounded once."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    optimizer = optim.schedule_free(0.1, moment_dtype="float32")
    state = optimizer.init(params)
    for _ in range(3):
        params, state = step(optimizer, params, state)
    inner = find_states(state, contrib.ScheduleFreeState)[0]
    y, z = np.asarray(params["kernel"], np.float64), np.asarray(inner.z["kernel"], np.float64)
    exact = jnp.asarray((y - 0.1 * z) / 0.9, jnp.bfloat16)
    np.testing.assert_array_equal(optim.evaluation_params(state, params)["kernel"], exact)


def test_chain_of_nothing():
    with pytest.raises(ValueError, match=r"chain.transforms is empty"):
        optim.chain([])
