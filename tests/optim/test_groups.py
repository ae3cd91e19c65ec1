"""Groups of parameters: who is in which, and what their shares do to the updates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo import optim
from crescendo.optim import groups
from crescendo.optim.batch_size import BatchStats, constant
from crescendo.optim.groups import ParameterGroup, assign, frozen_mask, group, scale_groups


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


PARAMS = {
    "blocks": {"attention": {"query": {"kernel": normal(0, 2, 4, 3)}}, "norm": {"scale": normal(1, 2, 4)}},
    "embedding": {"table": normal(2, 7, 4)},
    "head": {"kernel": normal(3, 4, 7)},
}
AXES = {
    "blocks": {
        "attention": {"query": {"kernel": ("layers", "embed", "heads")}},
        "norm": {"scale": ("layers", "embed")},
    },
    "embedding": {"table": ("vocab", "embed")},
    "head": {"kernel": ("embed", "vocab")},
}
GRADIENT = jax.tree.map(lambda x: jnp.sin(9 * x), PARAMS)


def half_square(params):
    return sum(jnp.sum(x**2) / 2 for x in jax.tree.leaves(params))


def steps(optimizer, params=PARAMS, count=3, axes=None):
    """Updates and state after some steps, told all that a run tells."""
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(params, state, seen):
        zero = jnp.float32(0)
        stats = BatchStats(jnp.int32(seen), jnp.int32(16), zero, zero, jnp.zeros(1), jnp.int32(1))
        gradient = jax.tree.map(lambda x: jnp.sin(9 * x), params)
        updates, state = optimizer.update(
            gradient, state, params, examples_seen=seen + 8.0, total_examples=64, batch_stats=stats, obj_fn=half_square
        )
        return updates, optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(count):
        updates, params, state = step(params, state, 16 * i)
    return updates, params, state


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_first_group_that_matches_counts():
    found = assign([group("*/query/*"), group(axis="vocab"), group("blocks/*")], PARAMS, AXES)
    assert found == {
        "blocks": {"attention": {"query": {"kernel": 0}}, "norm": {"scale": 2}},
        "embedding": {"table": 1},
        "head": {"kernel": 1},
    }
    assert assign([group("head/*")], PARAMS)["embedding"] == {"table": None}


def test_frozen_mask():
    marks = frozen_mask([group("*/norm/*"), group("blocks/*", frozen=True)], PARAMS)
    assert jax.tree.leaves(marks) == [True, False, False, False]
    assert jax.tree.structure(marks) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            [group("blocks/attention/key/*")],
            "group 'blocks/attention/key/.*' matches no parameter; nearest: bloc",
        ),
        ([group(axis="vocabulary")], "group of axis 'vocabulary' matches no parameter; nearest: vocab"),
        ([group("blocks/*"), group("*/norm/*")], "group './norm/.' gets no parameter: groups before it take all"),
    ],
)
def test_a_group_of_nothing(wrong, message):
    for use in (assign, frozen_mask, lambda g, p, a: scale_groups(optim.adamw(0.1), g, a).init(p)):
        with pytest.raises(ValueError, match=message):
            use(wrong, PARAMS, AXES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs either a path or an axis"),
        ({"path": "a", "axis": "b"}, "needs either a path or an axis"),
        ({"path": "a", "learning_rate": -1.0}, "learning_rate = -1.0 must be at least 0 and finite"),
        ({"axis": "a", "weight_decay": math.nan}, "weight_decay = nan must be at least 0"),
    ],
)
def test_bad_groups(options, message):
    with pytest.raises(ValueError, match=message):
        ParameterGroup(**options)


# They take their share as others do which a quick run has: as AdamW but for LAMB, which does as LARS.
ALIKE = {"adafactor", "adagrad", "adagrad_norm", "nadamw", "lion", "sgd", "sophia", "prodigy", "lamb"}


def each(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in names]


@pytest.mark.parametrize("name", each(optim.OPTIMIZERS))
def test_groups_that_change_nothing_change_nothing(name):
    """Bit for bit, also where the decay's multipliers are passed; and without groups it is the optimizer itself."""
    make = optim.OPTIMIZERS[name]
    optimizer = make(0.1)
    equal(steps(scale_groups(optimizer, [group("*")])), steps(optimizer))
    assert scale_groups(optimizer, []).update is optimizer.update


@pytest.mark.parametrize("make", [lambda: optim.adamw(0.1), lambda: optim.muon(0.1), lambda: optax.adam(0.1)])
def test_a_share_of_the_rate(make):
    plain, _, _ = steps(make(), count=1)
    shared, _, _ = steps(scale_groups(make(), [group(axis="vocab", learning_rate=0.25)], AXES), count=1)
    equal(shared["blocks"], plain["blocks"])
    for name in ("embedding", "head"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.25 * b, rtol=1e-6), shared[name], plain[name])


DECAYING = groups.decaying()


@pytest.mark.parametrize("name", each(DECAYING))
def test_a_share_of_the_decay(name):
    """Half of a decay of 0.2 for one parameter is 0.1 for all, seen at that parameter; the others have all of it."""
    make = optim.OPTIMIZERS[name]
    half, _, _ = steps(scale_groups(make(0.1, weight_decay=0.2), [group("head/*", weight_decay=0.5)]), count=1)
    less, more = (steps(make(0.1, weight_decay=decay), count=1)[0] for decay in (0.1, 0.2))
    equal(half["head"], less["head"])
    equal(half["embedding"], more["embedding"])
    assert (half["head"]["kernel"] != more["head"]["kernel"]).any()


@pytest.mark.parametrize("name", [*(name for name in optim.OPTIMIZERS if name not in DECAYING), "optax"])
def test_a_share_of_a_decay_that_nobody_reads_is_refused(name):
    optimizer = optax.adamw(0.1) if name == "optax" else optim.OPTIMIZERS[name](0.1)
    message = rf"group 'head/\*': weight_decay = 0.0 has no effect .*: use one of {', '.join(DECAYING)}$"
    with pytest.raises(ValueError, match=message):
        scale_groups(optimizer, [group("head/*", weight_decay=0.0)]).init(PARAMS)


def test_frozen_parameters_stand_still():
    _, params, _ = steps(scale_groups(optim.adamw(0.1), [group("blocks/*", frozen=True)]))
    equal(params["blocks"], PARAMS["blocks"])
    assert (params["head"]["kernel"] != PARAMS["head"]["kernel"]).any()


def test_a_loop_may_leave_frozen_parameters_out():
    """Then their group matches nothing here, which is no mistake, and the axes may hold more than is trained."""
    rest = {name: PARAMS[name] for name in ("embedding", "head")}
    members = [group("blocks/*", frozen=True), group("head/*", learning_rate=0.5)]
    optimizer = scale_groups(optim.adamw(0.1), members, AXES)
    _, without, state = steps(optimizer, rest)
    _, whole, _ = steps(optimizer)
    equal(without, {name: whole[name] for name in rest})
    assert len(jax.tree.leaves(state)) < len(jax.tree.leaves(optimizer.init(PARAMS)))


def test_averages_see_the_share_of_the_rate():
    """Schedule-Free's point is that of the parameter trained alone at its rate, and so is an average of weights."""
    for make in (optim.schedule_free, lambda rate: optim.average_weights(optim.sgd(rate, momentum=0.0), 100.0)):
        _, params, state = steps(scale_groups(make(0.1), [group("head/*", learning_rate=0.0)]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params["head"], PARAMS["head"])
        found = optim.evaluation_params(state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found["head"], PARAMS["head"])
        _, params, state = steps(scale_groups(make(0.1), [group("*", learning_rate=0.5)]))
        _, expected, expected_state = steps(make(0.05))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, expected)
        point, other = optim.evaluation_params(state, params), optim.evaluation_params(expected_state, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), point, other)


@pytest.mark.parametrize("make", [lambda: optim.adamw(0.1), lambda: optax.adam(0.1)])
def test_groups_within_a_batch_size_and_around_it(make):
    """The coupling's factor (4 times the batch: 2) and the share (a half) meet once, in either order."""
    members = [group("*", learning_rate=0.5)]
    plain, _, _ = steps(make(), count=1)
    for optimizer in (
        optim.adaptive_batch_size(scale_groups(make(), members), constant(4)),
        scale_groups(optim.adaptive_batch_size(make(), constant(4)), members),
    ):
        updates, _, _ = steps(optimizer, count=1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), updates, plain)


def test_groups_of_masked_and_partitioned_optimizers():
    """Multipliers stand also where a mask leaves nothing."""
    members = [group("head/*", learning_rate=0.5, weight_decay=0.0), group(axis="layers", weight_decay=0.0)]
    label = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "head" if path[0].key == "head" else "rest", params
    )
    for make in (optim.adamw, optim.lars, optim.schedule_free):
        parts = optax.partition({"head": make(0.1, weight_decay=0.3), "rest": make(0.1, weight_decay=0.3)}, label)
        apart, _, _ = steps(scale_groups(parts, members, AXES), count=2)
        together, _, _ = steps(scale_groups(make(0.1, weight_decay=0.3), members, AXES), count=2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), apart, together)


def test_what_mirrors_a_parameter_is_still_found():
    optimizer = scale_groups(optim.adamw(0.1), [group("head/*", weight_decay=0.0)], AXES)
    state = optimizer.init(PARAMS)
    marks = optax.tree_map_params(optimizer, lambda x: True, state, transform_non_params=lambda x: False)
    assert sum(jax.tree.leaves(marks)) == 2 * len(jax.tree.leaves(PARAMS))
