"""The fixed policies against their definition, and what the transform does with a policy's size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo import optim
from crescendo.optim import batch_size, schedules
from crescendo.optim.batch_size import (
    BatchSizePolicy,
    BatchStats,
    adaptive_batch_size,
    constant,
    staged,
    stays_throughout,
)
from crescendo.optim.scaling import ScaleByLearningRateState, WithLearningRateState
from crescendo.optim.states import find_states


def stats(examples_seen=0, size=4):
    zero = jnp.float32(0)
    return BatchStats(jnp.int32(examples_seen), jnp.int32(size), zero, zero, jnp.zeros(1), jnp.int32(1))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 10**6)), min_size=1, max_size=6),
    seen=st.integers(0, 10**7),
    size=st.integers(1, 4096),
)
def test_staged_is_the_last_stage_that_has_begun(steps, seen, size):
    """By the clock after the batch, since the decision is for later ones."""
    sizes = [s for s, _ in steps]
    starts = [0, *np.cumsum([length for _, length in steps[:-1]])]
    policy = staged(sizes, starts_examples=starts)
    begun = [s for s, start in zip(sizes, starts, strict=True) if start <= seen + size]
    assert int(policy.update(policy.init(), stats(seen, size))[0]) == begun[-1]
    assert policy.sizes == tuple(sizes)


def test_starts_in_tokens_are_rounded_up_to_examples():
    policy = staged([2, 4], starts_tokens=[0, 1001], sequence_length=10)
    assert [int(policy.update((), stats(seen, 0))[0]) for seen in (100, 101)] == [2, 4]


def test_the_data_may_say_how_many_tokens_an_example_has():
    for_any = staged([2, 4], starts_tokens=[0, 1001])
    for tokens in (1, 10, 64):
        same = staged([2, 4], starts_tokens=[0, 1001], sequence_length=tokens)
        for policy in (for_any.for_rows(tokens), same, same.for_rows(tokens)):
            begin = -(-1001 // tokens)
            assert [int(policy.update((), stats(seen, 0))[0]) for seen in (begin - 1, begin)] == [2, 4]
    with pytest.raises(ValueError, match=r"staged\.sequence_length = 10, but the data's rows have 64 tokens"):
        staged([2, 4], starts_tokens=[0, 1001], sequence_length=10).for_rows(64)
    with pytest.raises(ValueError, match="give sequence_length"):
        for_any.update((), stats(0))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 100), st.integers(1, 120))
def test_a_policy_is_said_to_stay_exactly_where_no_batch_is_of_another_size(size, start, total):
    """Against a run followed batch by batch: what is decided after a batch is the size of the one after next."""
    policy = staged([size, 2 * size], starts_examples=[0, start])
    seen, sizes, decided = 0, [], [size, size]
    while seen < total:
        sizes.append(decided[-2])
        seen += sizes[-1]
        decided.append(2 * size if seen >= start else size)
    assert bool(stays_throughout(policy, total)) == (set(sizes) == {size})


def test_constant_never_moves():
    assert {int(constant(6).update((), stats(seen))[0]) for seen in (0, 10, 10**9)} == {6}


def test_a_start_past_the_clock_is_never_reached():
    assert int(staged([2, 4], starts_examples=[0, 2**40]).update((), stats(2**31 - 10))[0]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sizes=[2]), "either starts_examples or starts_tokens"),
        (dict(sizes=[2], starts_examples=[0], starts_tokens=[0]), "either starts_examples or starts_tokens"),
        (dict(sizes=[2], starts_tokens=[0], sequence_length=0), "sequence_length = 0 must be at least 1"),
        (dict(sizes=[2, 4], starts_examples=[0]), "2 sizes and 1 starts"),
        (dict(sizes=[], starts_examples=[]), r"sizes = \[\] must be at least 1 long"),
        (dict(sizes=[2, 0], starts_examples=[0, 8]), r"sizes = \[2, 0\] must each be at least 1"),
        (dict(sizes=[2, 4], starts_examples=[1, 8]), r"starts \[1, 8\] .* must begin with 0 and increase"),
        (dict(sizes=[2, 4, 8], starts_examples=[0, 8, 8]), "must begin with 0 and increase"),
    ],
)
def test_bad_stages(arguments, message):
    with pytest.raises(ValueError, match=message):
        staged(**arguments)


def test_a_batch_of_none_is_refused():
    with pytest.raises(ValueError, match="batch_size = 0 must be at least 1"):
        constant(0)


def counting(sizes):
    """A policy that decides on the next size at every update, and keeps how many there were."""
    table = jnp.array(sizes, jnp.int32)
    return BatchSizePolicy(lambda: jnp.int32(0), lambda n, _: (table[(n + 1) % len(sizes)], n + 1), tuple(sizes), "")


@pytest.mark.parametrize(
    ("coupling", "factors"), [("linear", [1, 4, 16]), ("sqrt", [1, 2, 4]), ("power", None), ("none", [1, 1, 1])]
)
def test_the_factor_is_of_the_batch_used_and_the_size_is_for_later(coupling, factors):
    """A decision takes effect with the batch that has its size, however late that comes."""
    if factors is None:
        factors = [1, 2, 4]  # the rule's own exponent is a half
    transform = adaptive_batch_size(optax.identity(), counting([2, 8, 32]), coupling)
    state, gradient = transform.init(None), {"a": jnp.ones(3), "b": jnp.ones((), jnp.bfloat16)}
    assert int(batch_size.current_batch_size(state)) == 2
    for used, factor, decided in zip([2, 8, 32], factors, [8, 32, 2], strict=True):
        updates, state = transform.update(gradient, state, batch_stats=stats(size=used))
        np.testing.assert_allclose(updates["a"], np.full(3, factor))
        assert updates["b"].dtype == jnp.bfloat16
        assert int(batch_size.current_batch_size(state)) == decided


def test_a_loop_that_lags_by_one_step_uses_what_update_n_decided_for_batch_n_plus_2():
    """The loop's order: a step is dispatched before the decision of the one before it is read."""
    transform = adaptive_batch_size(optim.scale_by_learning_rate(1.0), staged([2, 8], starts_examples=[0, 5]))
    state = transform.init(None)
    size = decided = int(batch_size.current_batch_size(state))
    used, factors, seen = [], [], 0
    for _ in range(7):
        _, after = transform.update((), state, batch_stats=stats(seen, size))
        used.append(size)
        factors.append(float(optax.tree_utils.tree_get(after, "learning_rate")))
        seen += size
        size, decided = decided, int(batch_size.current_batch_size(after))
        state = after
    # Update 2 (of batches 0, 1, 2) is the first to see 5 examples: batch 4 is the first of 8.
    assert used == [2, 2, 2, 2, 8, 8, 8]
    assert factors == [1, 1, 1, 1, 2, 2, 2]


def test_another_base_and_another_size_compile_nothing():
    transform = adaptive_batch_size(optax.identity(), staged([2, 8], starts_examples=[0, 64]), base_batch_size=8)
    step = jax.jit(lambda s, b: transform.update(jnp.ones(2), s, batch_stats=b))
    updates, state = step(transform.init(None), stats(0, 2))
    np.testing.assert_allclose(updates, np.full(2, 0.5))
    updates, state = step(state, stats(64, 8))
    np.testing.assert_allclose(updates, np.ones(2))
    assert step._cache_size() == 1


def test_the_transform_says_what_it_lacks():
    transform = adaptive_batch_size(optax.identity(), constant(2))
    with pytest.raises(ValueError, match="needs the extra argument batch_stats"):
        transform.update((), transform.init(None))
    with pytest.raises(ValueError, match="unknown learning-rate rule 'cubic'"):
        adaptive_batch_size(optax.identity(), constant(2), "cubic")
    with pytest.raises(ValueError, match="holds 0 adaptive_batch_size states"):
        batch_size.current_batch_size(optax.sgd(0.1).init(jnp.ones(1)))
    twice = adaptive_batch_size(transform, constant(2))
    with pytest.raises(ValueError, match="holds 2 adaptive_batch_size states; wrap exactly one"):
        batch_size.current_batch_size(twice.init(jnp.ones(1)))


def quadratic(params):
    """A loss with another curvature in each direction."""
    return sum(jnp.sum(jnp.arange(1, x.size + 1).reshape(x.shape) * x**2) for x in jax.tree.leaves(params)) / 2


def halves(*shape):
    return jnp.full(shape, 0.5, jnp.float32)


PARAMS = {"blocks": {"kernel": halves(2, 4, 4), "bias": halves(2, 4)}, "head": halves(4, 4)}


def trained(optimizer, sizes, *, total=640):
    """Parameters, state and the rates used, after a step with each of the sizes, told all that a run tells."""
    step_of_batch = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(params, state, told):
        loss, gradient = jax.value_and_grad(quadratic)(params)
        updates, state = step_of_batch.update(
            gradient,
            state,
            params,
            examples_seen=told.examples_seen + told.batch_size / 2,
            total_examples=total,
            batch_stats=told,
            value=loss,
            obj_fn=quadratic,
        )
        return optax.apply_updates(params, updates), state

    params, state, seen, rates = PARAMS, step_of_batch.init(PARAMS), 0, []
    for size in sizes:
        params, state = step(params, state, stats(seen, size))
        rates += [float(x.learning_rate) for x in find_states(state, ScaleByLearningRateState, WithLearningRateState)]
        seen += size
    assert step._cache_size() == 1
    return params, state, rates


# They read their rate as others do which a quick run has: as AdamW but for LAMB, which does as LARS.
ALIKE = {"adafactor", "adagrad", "adagrad_norm", "nadamw", "lion", "sgd", "sophia", "lamb"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in optim.OPTIMIZERS]
)
def test_every_optimizer_sees_the_rate_that_follows_the_batch(name):
    """Two steps at 4 times the batch are two steps at twice the rate, in every number of the state too."""
    make = optim.OPTIMIZERS[name]
    grown, state, rates = trained(adaptive_batch_size(make(0.01), constant(4)), [16, 16])
    faster, expected, _ = trained(make(0.02), [16, 16])
    np.testing.assert_allclose(rates, [0.02, 0.02], rtol=1e-6)
    for a, b in zip(jax.tree.leaves((grown, state.inner_state)), jax.tree.leaves((faster, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


def label(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


FOREIGN = {
    "optax adamw": lambda: optax.adamw(0.01),
    "optax masked": lambda: optax.masked(optim.adamw(0.01), label_is_matrix),
    "optax partition": lambda: optax.partition({"matrix": optim.adamw(0.01), "vector": optim.sgd(0.1)}, label),
    "optax partition of optax's": lambda: optax.partition(
        {"matrix": optax.adam(0.01), "vector": optax.sgd(0.1)}, label
    ),
    "optax muon": lambda: optax.contrib.muon(0.01),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optim.adamw, static_args=("nesterov",))(0.01),
    "inject_hyperparams of optax's": lambda: optax.inject_hyperparams(optax.adamw)(0.01),
    "dog": lambda: optax.contrib.dog(),
    "dadapt_adamw": lambda: optax.contrib.dadapt_adamw(),
    "momo": lambda: optax.contrib.momo(0.01),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optim.lamb(0.01)),
}


def label_is_matrix(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


# A quick run has a mask, a partition, an injection, an optimizer of two rules and one without a rate.
LIKE_THESE = {
    "optax adamw",
    "optax partition of optax's",
    "inject_hyperparams of optax's",
    "dadapt_adamw",
    "momo",
    "chain",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LIKE_THESE else ()) for name in FOREIGN]
)
def test_any_optimizer_can_be_wrapped(name):
    """Optax's own and what optax wraps, under jit, told all that a run tells; the factor counts once."""
    once, _, _ = trained(adaptive_batch_size(FOREIGN[name](), constant(4)), [4])
    grown, _, _ = trained(adaptive_batch_size(FOREIGN[name](), constant(4)), [16])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grown))
    if name != "optax masked":  # what a mask leaves out passes as the gradient itself
        for start, a, b in zip(*map(jax.tree.leaves, (PARAMS, once, grown)), strict=True):
            np.testing.assert_allclose(b - start, 2 * (a - start), rtol=1e-4, atol=1e-7)
    trained(adaptive_batch_size(FOREIGN[name](), counting([4, 16])), [4, 16, 4])


def test_a_schedule_that_follows_the_batch_gets_no_coupling():
    """Power at 256 from 16, n = 1.28e8 tokens at the first step: min(0.02, 256 a n^b), never four times the cap."""
    for own_batch_size in (None, 16):
        schedule = schedules.power(0.02, batch_size=own_batch_size, tokens_per_count=1e6)
        optimizer = adaptive_batch_size(optim.adamw(schedule), counting([16, 256]))
        rates = trained(optimizer, [16, 256, 256], total=10**4)[2]
        counts = [8, 16 + 128, 16 + 256 + 128]
        expected = [min(0.02, b * 4.6 * (t * 1e6) ** -0.51) for b, t in zip([16, 256, 256], counts, strict=True)]
        np.testing.assert_allclose(rates, expected, rtol=1e-4)


def test_updates_are_bit_for_bit_those_of_the_optimizer_alone_while_the_batch_is_the_base():
    wrapped = trained(adaptive_batch_size(optim.adamw(schedules.linear(0.01)), constant(8)), [8] * 5)
    alone = trained(optim.adamw(schedules.linear(0.01)), [8] * 5)
    jax.tree.map(np.testing.assert_array_equal, (wrapped[0], wrapped[1].inner_state), alone[:2])


def test_prodigy_from_a_rate_of_zero_is_finite():
    """A warmup read at its start, and gradients that are all 0, estimate nothing; afterwards it goes on."""
    optimizer = optim.prodigy(schedules.linear(1.0, 640, warmup=64))
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    params, state = PARAMS, optimizer.init(PARAMS)
    for clock, scale in ((0, 1.0), (0, 1.0), (8, 0.0), (16, 1.0), (32, 1.0), (640, 1.0)):
        updates, state = optimizer.update(
            jax.tree.map(lambda g, s=scale: s * g, gradient), state, params, examples_seen=clock
        )
        params = optax.apply_updates(params, updates)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
    assert (params["head"] < PARAMS["head"]).all()


def test_prodigy_under_a_warmup_learns():
    optimizer = adaptive_batch_size(optim.prodigy(schedules.linear(1.0, warmup=64)), constant(8))
    params, _, _ = trained(optimizer, [8] * 80)
    assert quadratic(params) < 0.1 * quadratic(PARAMS)


def test_sophia_takes_the_callers_loss():
    optimizer = adaptive_batch_size(optim.sophia(schedules.linear(0.02)), constant(8))
    params, _, _ = trained(optimizer, [8] * 80)
    assert quadratic(params) < 0.1 * quadratic(PARAMS)
