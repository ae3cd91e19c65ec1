"""Policies on statistics for which the right size is known in closed form."""

import functools
import itertools
import json
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as orbax

from crescendo import optim
from crescendo.optim import adaptive_batch_size, batch_size, policies
from crescendo.optim.batch_size import stays_throughout

K_MAX, MICROBATCH = 16, 4


def stats(noise_scale=16.0, size=8, *, squared_gradient=1.0, examples_seen=0, **changes):
    """What a batch in microbatches of 4 tells when every squared norm equals its mean."""
    count = size // MICROBATCH
    trace = noise_scale * squared_gradient
    small = jnp.where(jnp.arange(K_MAX) < count, squared_gradient + trace / MICROBATCH, 0.0)
    found = batch_size.BatchStats(
        examples_seen=jnp.int32(examples_seen),
        batch_size=jnp.int32(size),
        loss=jnp.float32(0),
        squared_norm=jnp.float32(squared_gradient + trace / size),
        microbatch_squared_norms=small,
        microbatches=jnp.int32(count),
    )
    return found._replace(**changes)


def clock(policy, examples_seen):
    """The size that a policy which only reads the clock decides when so many examples have been seen."""
    told = stats(examples_seen=examples_seen)._replace(batch_size=jnp.int32(0))
    return int(policy.update(policy.init(), told)[0])


def follow(policy, steps, stats_at):
    """The sizes decided in `steps` updates, each told `stats_at(size decided before, step)`; compiled once."""
    update, state, size, sizes = jax.jit(policy.update), policy.init(), policy.sizes[0], []
    for step in range(steps):
        decided, state = update(state, stats_at(size, step))
        size = int(decided)
        sizes.append(size)
    assert update._cache_size() == 1
    assert set(sizes) <= set(policy.sizes)
    return sizes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 64), st.integers(0, 8), st.integers(8, 10**6), st.floats(0, 1.2))
def test_geometric_warmup_is_the_formula_rounded_down_to_the_ladder(start, doublings, warmup, share):
    policy = policies.geometric_warmup(start, start * 2**doublings, warmup_examples=warmup)
    seen = int(share * warmup)
    passed = min(doublings, seen * doublings // warmup)  # floor(log2 of (end / start)^(t / warmup))
    assert clock(policy, seen) == start * 2**passed
    assert policy.sizes == tuple(start * 2**i for i in range(doublings + 1))


@st.composite
def curves(draw):
    points = draw(st.lists(st.tuples(st.integers(1, 150), st.integers(0, 200)), min_size=1, max_size=6))
    tokens = np.cumsum([step for step, _ in points]) - draw(st.sampled_from([0, points[0][0]]))
    return {"tokens": tokens.tolist(), "critical_batch_size": [value for _, value in points], "fingerprint": "f"}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(curves(), st.integers(1, 8), st.integers(1, 7))
def test_critical_batch_following_doubles_when_the_curve_passes_twice_the_size(curve, start, sequence_length):
    """Against the rule followed one example at a time."""
    policy = policies.critical_batch_following(
        curve, start, 8 * start, sequence_length=sequence_length, fingerprint="f"
    )
    tokens, critical = np.array(curve["tokens"], float), np.array(curve["critical_batch_size"], float)
    size, expected, clocks = start, [], np.arange(910)  # past every curve
    for t in clocks * sequence_length:
        while t > tokens[0] and np.interp(t, tokens, critical) > 2 * size * (1 + 1e-12) and size < 8 * start:
            size *= 2
        expected.append(size)
    told = stats()._replace(batch_size=jnp.int32(0))
    decide = jax.vmap(lambda t: policy.update((), told._replace(examples_seen=t))[0])
    np.testing.assert_array_equal(decide(jnp.int32(clocks)), expected)
    assert policy.sizes[-1] == size  # no buffer is kept for sizes that the curve never asks for


def test_a_critical_batch_size_that_grows_linearly():
    """CBS = 8 t / 100 with t in examples: twice B = 4, 8, 16 is passed at 100, 200 and 400."""
    curve = {"tokens": [0, 10**6], "critical_batch_size": [0, 800], "interval": [[0, 400], [400, 900]]}
    policy = policies.critical_batch_following(curve, 4, 32, sequence_length=100)
    assert [clock(policy, t) for t in (100, 101, 200, 201, 400, 401, 9999)] == [4, 8, 8, 16, 16, 32, 32]
    careful = policies.critical_batch_following(curve, 4, 32, sequence_length=100, lower_bound=True)
    assert [clock(careful, t) for t in (200, 201, 400, 401)] == [4, 8, 8, 16]  # half the curve


def test_the_curve_may_be_a_file(tmp_path):
    path = tmp_path / "critical_batch.json"
    path.write_text(json.dumps({"fingerprint": "a", "tokens": [0, 100], "critical_batch_size": [0, 100]}))
    for curve in (path, str(path)):
        policy = policies.critical_batch_following(curve, 4, 8, sequence_length=1, fingerprint="a")
        assert [clock(policy, t) for t in (8, 9)] == [4, 8]


GOOD = {"fingerprint": "a", "tokens": [0, 10], "critical_batch_size": [1, 2]}


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (GOOD | {"tokens": [], "critical_batch_size": []}, "the curve is empty: measure at least one point"),
        (GOOD | {"tokens": [10, 10]}, "does not increase in tokens: 10 follows 10"),
        (GOOD | {"tokens": [10, 5]}, "does not increase in tokens: 5 follows 10"),
        (GOOD | {"tokens": [0, float("nan")]}, r"tokens\.1: input should be a finite number"),
        (GOOD | {"tokens": [0, 1e17]}, r"tokens\.1: input should be less than or equal to 9007199254740992"),
        (GOOD | {"critical_batch_size": [1]}, "has 2 tokens and 1 of critical_batch_size: give one for each"),
        (GOOD | {"critical_batch_size": [1, -2]}, r"batch_size\.1: input should be greater than or equal to 0"),
        (GOOD | {"critical_batch_size": [1, float("inf")]}, r"batch_size\.1: input should be a finite number"),
        (GOOD | {"critical_batch_size": ["many", 2]}, r"batch_size\.0: input should be a valid number"),
        (GOOD | {"critical_batch_size": [1, True]}, r"batch_size\.1: input should be a valid number"),
        (GOOD | {"interval": [[0, 1], [3, 4]]}, r"says 2 examples at 10 tokens, outside of its interval \[3, 4.0\]"),
        (GOOD | {"interval": [[0, 1]]}, "has 2 tokens and 1 of interval"),
        (GOOD | {"unit": "tokens"}, "unit isn't understood"),
        ({"tokens": [1]}, "it has no 'critical_batch_size'"),
        (GOOD | {"fingerprint": "b"}, r"another model or data \(fingerprint b, not a\)"),
        ({**GOOD, "fingerprint": None}, r"another model or data \(fingerprint None, not a\)"),
    ],
)
def test_bad_curves(curve, message):
    with pytest.raises(ValueError, match=message):
        policies.critical_batch_following(curve, 4, 8, sequence_length=1, fingerprint="a")


def test_bad_curve_files(tmp_path):
    (tmp_path / "curve.json").write_text("{")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("none.json", r"cannot read .*none.json: No such file"),
        ("curve.json", r"curve.json is not a curve .*invalid JSON"),
        ("pipe", "pipe is no file that can be read to its end"),
        ("", "cannot read .*: Is a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            policies.critical_batch_following(tmp_path / name, 4, 8, sequence_length=1)


@pytest.mark.parametrize(("noise_scale", "settled"), [(10.0, 8), (17.0, 8), (18.0, 16), (40.0, 32), (1e6, 64)])
@pytest.mark.parametrize("shrink", [False, True])
def test_noise_scale_following_settles_on_the_rung_below_the_noise_scale(noise_scale, settled, shrink):
    """Doubling is for 2 B (1 + 10%): 17 is within the hysteresis of 16, 18 is past it."""
    policy = policies.noise_scale_following(8, 64, shrink=shrink)
    sizes = follow(policy, 26, lambda size, _: stats(noise_scale, size))
    assert sizes[:19] == [8] * 19  # min_updates
    assert sizes[-1] == settled
    assert all(b <= 2 * a for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(("start", "decided"), [(4, 16), (8, 16), (16, 16), (32, 32)])
@pytest.mark.parametrize("make", [policies.noise_scale_following, functools.partial(policies.norm_test, eta=1.0)])
def test_a_state_goes_on_at_its_size_on_another_ladder(make, start, decided):
    """From 16 of 8, 16, 32, 64; a single microbatch decides nothing. At a ladder's first size where it lacks the 16."""
    earlier, policy = make(8, 64), make(start, 64)
    state, size, steps = earlier.init(), 8, 0
    while size < 16 and steps < 30:
        told = closed_form("norm") if isinstance(make, functools.partial) else stats(18.0, size)
        size, state = earlier.update(state, told)
        size, steps = int(size), steps + 1
    assert size == 16
    assert int(policy.update(state, stats(18.0, MICROBATCH))[0]) == decided


def test_the_ratio_scales_the_target():
    policy = policies.noise_scale_following(8, 64, ratio=2.0)
    assert follow(policy, 24, lambda size, _: stats(20.0, size))[-1] == 32


def test_the_batch_shrinks_only_if_it_may():
    """From a noise scale of 64 to one of 8."""
    falling = lambda size, step: stats(64.0 if step < 30 else 8.0, size)  # noqa: E731
    for shrink, last in ((False, 32), (True, 8)):
        policy = policies.noise_scale_following(8, 32, decay=0.8, shrink=shrink)
        sizes = follow(policy, 80, falling)
        assert max(sizes) == 32
        assert sizes[-1] == last


def test_noise_in_which_the_gradient_drowns_grows_the_batch():
    """Estimates of ||G||^2 that are negative in the mean have no ratio, but are far past doubt."""
    policy = policies.noise_scale_following(8, 32)

    def drowned(size, step):
        return stats(size=size)._replace(
            squared_norm=jnp.float32(0.1 + 0.01 * (step % 2)),
            microbatch_squared_norms=jnp.where(jnp.arange(K_MAX) < size // MICROBATCH, 0.5 * size, 0.0),
        )

    assert follow(policy, 24, drowned)[-1] == 32


def test_what_is_not_sure_is_not_followed():
    """||G||^2 estimates of +-20 about 1, of which the average says nothing yet; those of +-0.2 do."""
    for spread, last in ((20.0, 8), (0.2, 16)):

        def noisy(size, step, spread=spread):
            sign = 1 if step % 2 else -1
            trace, gradient = 30.0, 1 + sign * spread
            found = stats(size=size)
            small = jnp.where(jnp.arange(K_MAX) < size // MICROBATCH, gradient + trace / MICROBATCH, 0.0)
            return found._replace(squared_norm=jnp.float32(gradient + trace / size), microbatch_squared_norms=small)

        assert follow(policies.noise_scale_following(8, 64), 40, noisy)[-1] == last


def test_norm_layers_tell_with_a_single_microbatch():
    plain, layers = (policies.noise_scale_following(4, 16, source=source) for source in ("gradient", "norm_layers"))
    assert (plain.statistics, layers.statistics) == ((), ("norm_layers",))

    def one(size, step):
        large, small = jnp.float32(1 + 40 / size), jnp.float32(1 + 40)
        return stats(size=4)._replace(
            batch_size=jnp.int32(size), norm_squared_norm=large, norm_example_squared_norm=small
        )

    assert follow(plain, 30, one)[-1] == 4
    assert follow(layers, 30, one)[-1] == 16
    with pytest.raises(ValueError, match="statistic 'norm_layers'"):
        layers.update(layers.init(), stats())


def test_a_noisy_quadratic_in_the_loop_that_lags():
    """Sizes by `adaptive_batch_size`, used two batches later: B ends at the rung below the true noise scale of 24."""
    transform = adaptive_batch_size(optax.identity(), policies.noise_scale_following(4 * 2, 64), "none")
    gradient, deviation = jnp.full(16, 0.25), jnp.sqrt(24 / 16)

    @jax.jit
    def step(state, key, size):
        count = size // MICROBATCH
        noise = deviation / math.sqrt(MICROBATCH) * jax.random.normal(key, (K_MAX, 16))
        means = jnp.where((jnp.arange(K_MAX) < count)[:, None], gradient + noise, 0)
        told = stats()._replace(
            batch_size=size,
            microbatches=count,
            squared_norm=jnp.sum(jnp.square(means.sum(axis=0) / count)),
            microbatch_squared_norms=jnp.sum(jnp.square(means), axis=1),
        )
        return transform.update((), state, batch_stats=told)[1]

    state, size, used = transform.init(None), 8, []
    decided = size
    for key in jax.random.split(jax.random.key(0), 400):
        state = step(state, key, jnp.int32(size))
        used.append(size)
        size, decided = decided, int(batch_size.current_batch_size(state))
    assert step._cache_size() == 1
    assert used[-1] == 16
    assert used == sorted(used)


@pytest.mark.parametrize("confidence", [0.0, 2.0])
def test_noise_scale_following_decides_nothing_before_it_knows_an_error(confidence):
    policy = policies.noise_scale_following(8, 64, confidence=confidence, min_updates=2)
    with jax.debug_nans(True):
        state = policy.init()
        for told in (stats(100.0, MICROBATCH), stats(100.0, 8)):
            size, state = policy.update(state, told)
            assert int(size) == 8


def closed_form(variant):
    """Statistics of a batch of 8 in 2 microbatches for which the test asks for 12 / eta^2 examples."""
    found = stats(size=8)._replace(squared_norm=jnp.float32(2))
    if variant == "norm":  # 4 * (7 + 3 - 2 * 2) / 1 / 2
        return found._replace(microbatch_squared_norms=jnp.zeros(K_MAX).at[:2].set(jnp.array([7.0, 3.0])))
    if variant == "inner_product":  # 4 * (a^2 + a^2) / 1 / 2^2
        return found._replace(
            microbatch_dot_products=jnp.zeros(K_MAX).at[:2].set(2 + jnp.sqrt(6.0) * jnp.array([1, -1]))
        )
    return found._replace(coordinate_variance_ratio=jnp.float32(12))


VARIANTS = ("norm", "inner_product", "coordinate")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("eta", "size"), [(1.0, 16), (0.8, 32), (0.5, 64), (0.1, 64)])
def test_the_norm_test_asks_for_the_first_rung_that_passes(variant, eta, size):
    """12, 18.75, 48 and 1,200 examples, on a ladder of 8 to 64."""
    policy = policies.norm_test(8, 64, eta=eta, variant=variant)
    assert int(policy.update(policy.init(), closed_form(variant))[0]) == size
    assert (
        policy.statistics == {"norm": (), "inner_product": ("dot_products",), "coordinate": ("coordinates",)}[variant]
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 200), st.sampled_from([4, 8, 64])), min_size=1, max_size=12))
def test_the_norm_test_never_shrinks_the_batch(steps):
    """It is the running maximum of what each step asks for; a step with one microbatch asks for nothing."""
    update, policy = norm_test_update(), policies.norm_test(4, 64, eta=0.5)
    state, expected = policy.init(), 4
    for noise_scale, size in steps:
        decided, state = update(state, stats(noise_scale, size))
        required = noise_scale / (0.25 * (1 + noise_scale / size)) if size > 4 else 0
        while expected < min(required * (1 - 1e-4), 64):
            expected *= 2
        assert int(decided) == expected


@functools.cache
def norm_test_update():
    return jax.jit(policies.norm_test(4, 64, eta=0.5).update)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_broken_step_and_one_without_noise_ask_for_nothing(variant):
    policy = policies.norm_test(8, 64, variant=variant)
    found = closed_form(variant)
    broken = found._replace(
        squared_norm=jnp.float32(jnp.nan), coordinate_variance_ratio=jnp.float32(jnp.nan), microbatches=jnp.int32(2)
    )
    still = stats(
        0.0, 8, microbatch_dot_products=jnp.zeros(K_MAX).at[:2].set(1), coordinate_variance_ratio=jnp.float32(0)
    )
    zeros = {"microbatch_dot_products": jnp.zeros(K_MAX), "coordinate_variance_ratio": jnp.float32(0)}
    nothing, alone = (stats(0.0, size, squared_gradient=0.0, **zeros) for size in (2 * MICROBATCH, MICROBATCH))
    for told in (broken, still, nothing, alone):
        # Looks at every operation; of what is broken already there is nothing to look for.
        with jax.debug_nans(told is not broken):
            size, state = policy.update(policy.init(), told)
        assert int(size) == 8
        assert all(np.isfinite(x) for x in state)


def test_an_infinite_coordinate_asks_for_the_cap_and_leaves_finite_averages():
    policy = policies.norm_test(8, 64, variant="coordinate", decay=0.5)
    size, state = policy.update(policy.init(), stats(size=8, coordinate_variance_ratio=jnp.float32(jnp.inf)))
    assert int(size) == 64
    assert all(np.isfinite(x) for x in state)


def test_averages_let_one_loud_step_pass():
    """9 steps that ask for 8 and one that asks for 16: alone it counts, in an average it doesn't."""
    for decay, last in ((0.0, 16), (0.95, 8)):
        policy = policies.norm_test(8, 64, eta=1.0, decay=decay)
        quiet = stats(4.0, 8)
        loud = quiet._replace(microbatch_squared_norms=quiet.microbatch_squared_norms * 2)
        assert follow(policy, 10, lambda _, step, q=quiet, x=loud: x if step == 9 else q)[-1] == last


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_a_variant_says_which_statistic_it_lacks(variant):
    policy = policies.norm_test(8, 64, variant=variant)
    with pytest.raises(ValueError, match=f"needs the statistic '{policy.statistics[0]}'"):
        policy.update(policy.init(), stats())


EVERY = {
    "geometric": policies.geometric_warmup(8, 64, warmup_examples=100),
    "curve": policies.critical_batch_following(
        {"tokens": [0, 9], "critical_batch_size": [0, 99]}, 8, 64, sequence_length=1
    ),
    "noise": policies.noise_scale_following(8, 64, min_updates=3),
    "norm": policies.norm_test(8, 64, decay=0.9),
}


def test_a_run_resumed_from_a_checkpoint_decides_the_same(tmp_path):
    """Each policy after 4 of 12 updates, through one orbax checkpoint, within the transform's state."""
    chains = {name: adaptive_batch_size(optax.identity(), policy) for name, policy in EVERY.items()}

    def advance(states, steps):
        decided = []
        for step in steps:
            told = stats(20.0 + 3 * (step % 5), 8, examples_seen=8 * step)
            states = {name: chains[name].update((), state, batch_stats=told)[1] for name, state in states.items()}
            decided.append({name: int(batch_size.current_batch_size(state)) for name, state in states.items()})
        return states, decided

    states, _ = advance({name: chain.init(None) for name, chain in chains.items()}, range(4))
    orbax.save_pytree(tmp_path / "states", states)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
    restored = orbax.load_pytree(tmp_path / "states", abstract)
    (one, sizes), (other, same) = advance(states, range(4, 12)), advance(restored, range(4, 12))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert sizes == same
    assert all(sizes[-1][name] > 8 for name in EVERY)


def test_policies_that_compare_microbatches_ask_for_two():
    """The fixed ones and the normalisation layers' noise scale learn from one as well."""
    several = [policies.noise_scale_following(8, 64)]
    several += [policies.norm_test(8, 64, variant=variant) for variant in ("norm", "inner_product", "coordinate")]
    assert [policy.min_microbatches for policy in several] == [2] * 4
    one = [batch_size.constant(8), EVERY["geometric"], EVERY["curve"]]
    one += [policies.noise_scale_following(8, 64, source="norm_layers")]
    assert [policy.min_microbatches for policy in one] == [1] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policies.geometric_warmup(8, 4, warmup_examples=9), "cap = 4 is under start = 8"),
        (lambda: policies.geometric_warmup(0, 4, warmup_examples=9), "start = 0 must be at least 1"),
        (lambda: policies.geometric_warmup(4, 12, warmup_examples=9), "end = 12 is not start = 4 .* use 8 or 16"),
        (
            lambda: policies.geometric_warmup(4, 32, warmup_examples=2),
            "warmup_examples = 2 is too short for 3 doublings",
        ),
        (lambda: policies.noise_scale_following(8, 4), "cap = 4 is under start = 8: raise the cap"),
        (lambda: policies.noise_scale_following(8, 16, ratio=math.nan), "ratio = nan must be above 0 and finite"),
        (lambda: policies.noise_scale_following(8, 16, ratio=0.0), r"ratio = 0.0 must be above 0 and finite"),
        (
            lambda: policies.noise_scale_following(8, 16, hysteresis=-0.1),
            "hysteresis = -0.1 must be at least 0 and finite",
        ),
        (
            lambda: policies.noise_scale_following(8, 16, confidence=math.inf),
            "confidence = inf must be at least 0 and finite",
        ),
        (lambda: policies.noise_scale_following(8, 16, decay=1.0), "decay = 1.0 must be above 0 and below 1"),
        (lambda: policies.noise_scale_following(8, 16, decay=0.0), "decay = 0.0 must be above 0 and below 1"),
        (lambda: policies.noise_scale_following(8, 16, min_updates=1), "min_updates = 1 must be at least 2"),
        (lambda: policies.noise_scale_following(8, 16, source="loss"), "source = 'loss' must be 'gradient'"),
        (lambda: policies.norm_test(8, 4), "cap = 4 is under start = 8"),
        (lambda: policies.norm_test(8, 16, eta=0.0), "eta = 0.0 must be above 0 and at most 1"),
        (lambda: policies.norm_test(8, 16, eta=math.nan), "eta = nan must be above 0 and at most 1"),
        (
            lambda: policies.norm_test(8, 16, variant="dot"),
            "variant = 'dot' must be 'norm', 'inner_product' or 'coordinate'",
        ),
        (lambda: policies.norm_test(8, 16, decay=-1.0), "decay = -1.0 must be at least 0"),
        (lambda: policies.critical_batch_following(GOOD, 8, 4, sequence_length=1), "cap = 4 is under start = 8"),
        (
            lambda: policies.critical_batch_following(GOOD, 4, 8, sequence_length=0),
            "sequence_length = 0 must be at least",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


FLAT = {"tokens": [0, 10**6], "critical_batch_size": [0, 15]}
RISING = {"tokens": [0, 10**6], "critical_batch_size": [0, 800]}
STUCK = {
    "constant": [],
    "staged": [(batch_size.staged([8], starts_examples=[0]), "its only size is 8")],
    "geometric_warmup": [
        (policies.geometric_warmup(8, 8, warmup_examples=64), "its only size is 8"),
        (policies.geometric_warmup(8, 16, warmup_examples=1024), "changes it at 1,024 examples at the earliest"),
    ],
    "critical_batch_following": [
        (policies.critical_batch_following(FLAT, 8, 64), r"largest value is 15, not above 2 start = 16"),
        (policies.critical_batch_following(RISING, 8, 12), r"cap = 12 is below 2 start = 16"),
        (policies.critical_batch_following(RISING, 8, 64).for_rows(10), r"at 2,001 examples at the earliest"),
    ],
    "noise_scale_following": [
        (policies.noise_scale_following(8, 12), r"cap = 12 is below 2 start = 16"),
        (policies.noise_scale_following(8, 64, min_updates=128), r"at 1,024 examples at the earliest"),
    ],
    "norm_test": [(policies.norm_test(8, 12), r"cap = 12 is below 2 start = 16")],
}
MOVING = (
    batch_size.constant(8),
    batch_size.staged([8, 16], starts_examples=[0, 64]),
    policies.geometric_warmup(8, 16, warmup_examples=64),
    policies.critical_batch_following(RISING, 8, 64),
    policies.critical_batch_following(RISING, 8, 64).for_rows(100),
    policies.noise_scale_following(8, 64),
    policies.norm_test(8, 64),
)


def test_every_policy_that_cannot_move_says_so():
    assert set(STUCK) == set(optim.POLICIES)
    for policy, why in (case for cases in STUCK.values() for case in cases):
        assert re.search(f"stays at 8 in the whole run: .*{why}", stays_throughout(policy, 1024))
    assert not any(stays_throughout(policy, 1024) for policy in MOVING)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(curves(), st.integers(1, 8), st.integers(1, 7))
def test_a_curve_follows_the_rows_of_the_data(curve, start, tokens):
    for_any = policies.critical_batch_following(curve, start, 8 * start)
    given_them = policies.critical_batch_following(curve, start, 8 * start, sequence_length=tokens)
    followed = for_any.for_rows(tokens)
    assert (followed.sizes, followed.stays) == (given_them.sizes, given_them.stays)
    assert for_any.sizes == followed.sizes
    assert followed.measured_on == for_any.measured_on == "f"
    for policy in (followed, given_them.for_rows(tokens)):
        assert [clock(policy, t) for t in (0, 50, 200, 900)] == [clock(given_them, t) for t in (0, 50, 200, 900)]
    with pytest.raises(ValueError, match=rf"sequence_length = {tokens}, but the data's rows have {tokens + 1} tokens"):
        given_them.for_rows(tokens + 1)


def test_the_noise_scale_that_is_followed_is_reported():
    for source, name in (("gradient", "noise_scale"), ("norm_layers", "norm_layers_noise_scale")):
        optimizer = optim.adaptive_batch_size(optax.sgd(0.1), policies.noise_scale_following(8, 64, source=source))
        assert optim.reported(optimizer.init(jnp.ones(2))).keys() == {name, f"{name}_error"}
