"""The fixed policies against their definition, and what the transform does with a policy's size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.optim import batch_size
from crescendo.optim.batch_size import BatchSizePolicy, BatchStats, adaptive_batch_size, constant, staged


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


def test_constant_never_moves():
    assert {int(constant(6).update((), stats(seen))[0]) for seen in (0, 10, 10**9)} == {6}


def test_a_start_past_the_clock_is_never_reached():
    assert int(staged([2, 4], starts_examples=[0, 2**40]).update((), stats(2**31 - 10))[0]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sizes=[2]), "either starts_examples or starts_tokens"),
        (dict(sizes=[2], starts_examples=[0], starts_tokens=[0]), "either starts_examples or starts_tokens"),
        (dict(sizes=[2], starts_tokens=[0]), "needs sequence_length"),
        (dict(sizes=[2, 4], starts_examples=[0]), "2 sizes and 1 starts"),
        (dict(sizes=[], starts_examples=[]), "0 sizes and 0 starts"),
        (dict(sizes=[2, 0], starts_examples=[0, 8]), r"sizes = \[2, 0\]: each must be at least 1"),
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
    transform = adaptive_batch_size(counting([2, 8, 32]), coupling)
    state, gradient = transform.init(None), {"a": jnp.ones(3), "b": jnp.ones((), jnp.bfloat16)}
    assert int(batch_size.current_batch_size(state)) == 2
    for used, factor, decided in zip([2, 8, 32], factors, [8, 32, 2], strict=True):
        updates, state = transform.update(gradient, state, batch_stats=stats(size=used))
        np.testing.assert_allclose(updates["a"], np.full(3, factor))
        assert updates["b"].dtype == jnp.bfloat16
        assert float(batch_size.current_learning_rate_factor(state)) == factor
        assert int(batch_size.current_batch_size(state)) == decided


def test_a_loop_that_lags_by_one_step_uses_what_update_n_decided_for_batch_n_plus_2():
    """The loop's order: a step is dispatched before the decision of the one before it is read."""
    transform = adaptive_batch_size(staged([2, 8], starts_examples=[0, 5]))
    state = transform.init(None)
    size = decided = int(batch_size.current_batch_size(state))
    used, factors, seen = [], [], 0
    for _ in range(7):
        _, after = transform.update((), state, batch_stats=stats(seen, size))
        used.append(size)
        factors.append(float(batch_size.current_learning_rate_factor(after)))
        seen += size
        size, decided = decided, int(batch_size.current_batch_size(after))
        state = after
    # Update 2 (of batches 0, 1, 2) is the first to see 5 examples: batch 4 is the first of 8.
    assert used == [2, 2, 2, 2, 8, 8, 8]
    assert factors == [1, 1, 1, 1, 2, 2, 2]


def test_another_base_and_another_size_compile_nothing():
    transform = adaptive_batch_size(staged([2, 8], starts_examples=[0, 64]), base_batch_size=8)
    step = jax.jit(lambda s, b: transform.update(jnp.ones(2), s, batch_stats=b))
    updates, state = step(transform.init(None), stats(0, 2))
    np.testing.assert_allclose(updates, np.full(2, 0.5))
    updates, state = step(state, stats(64, 8))
    np.testing.assert_allclose(updates, np.ones(2))
    assert step._cache_size() == 1


def test_the_transform_says_what_it_lacks():
    transform = adaptive_batch_size(constant(2))
    with pytest.raises(ValueError, match="needs the extra argument batch_stats"):
        transform.update((), transform.init(None))
    with pytest.raises(ValueError, match="unknown learning-rate rule 'cubic'"):
        adaptive_batch_size(constant(2), "cubic")
    with pytest.raises(ValueError, match="holds 0 adaptive_batch_size states"):
        batch_size.current_batch_size(optax.sgd(0.1).init(jnp.ones(1)))
    twice = optax.chain(transform, transform)
    with pytest.raises(ValueError, match="holds 2 adaptive_batch_size states; chain exactly one"):
        batch_size.current_batch_size(twice.init(jnp.ones(1)))
