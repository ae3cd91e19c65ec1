"""Decoding with a cache, and which tokens a sampler may take, against their definition in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.models import ModelConfig, initialize
from crescendo.models.decode import decode, empty_cache, sample

TOKENS, DRAWS = 6, 400
CONFIG = ModelConfig.preset("debug", layers=2, width=32, heads=2, kv_heads=1, mlp_width=32).for_platform("cpu")


def allowed(logits, top_k, top_p):
    """The tokens that may be drawn: likelier ones first, of equal ones the first."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    shares = np.exp(logits[order] - logits.max(), dtype=np.float64)
    before = np.cumsum(shares / shares.sum()) - shares / shares.sum()
    return {int(token) for token, sum_before in zip(order, before, strict=True) if sum_before < top_p - 1e-6}


def drawn(logits, **options):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return set(np.unique(jax.vmap(lambda key: sample(logits[None], key, **options)[0])(keys)).tolist())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    # Few values, so that many are equal, and near enough to one another that 400 draws see every token.
    logits=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=TOKENS, max_size=TOKENS),
    top_k=st.integers(1, TOKENS),
    top_p=st.sampled_from([1e-6, 0.23, 0.45, 0.7, 1.0]),
)
def test_exactly_the_allowed_tokens_are_drawn(logits, top_k, top_p):
    logits = np.array(logits, np.float32)
    assert drawn(jnp.asarray(logits), top_k=top_k, top_p=top_p) == allowed(logits, top_k, max(top_p, 1e-5))


def test_equal_logits_leave_one_token_to_the_greediest():
    logits = jnp.array([1.0, 3.0, 3.0, 3.0, 0.0])
    for options in ({"top_k": 1}, {"top_p": 1e-3}, {"temperature": 0.0}):
        assert drawn(logits, **options) == {1}


@pytest.mark.parametrize("temperature", [1e-50, 1e-39, 1e-30, 1e-10])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
def test_a_temperature_near_0_takes_the_greatest(temperature, options):
    """Divided by it, logits would be infinite, and so equal."""
    for logits in ([1.0, 3.0, 2.0], [-np.inf, 3e38, 1e38], [-np.inf, -4.0, -5.0]):
        assert drawn(jnp.array(logits), temperature=temperature, **options) == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "top_p = 0.0 must be above 0"),
        ({"top_p": float("nan")}, "top_p = nan must be above 0"),
        ({"top_k": 0}, "top_k = 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature = -1.0 must be at least 0"),
        ({"temperature": float("inf")}, "temperature = inf must be at least 0 and finite"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        sample(jnp.zeros((1, 3)), jax.random.key(0), **options)


def test_what_the_cache_holds_past_its_tokens_does_not_matter(quick_compilation):
    parameters = initialize(CONFIG, jax.random.key(0))
    tokens = jnp.array([[3, 1, 4, 1, 5, 9]])
    run = jax.jit(functools.partial(decode, CONFIG))

    def logits(value: float) -> list[np.ndarray]:
        cache = jax.tree.map(lambda x: jnp.full_like(x, value), empty_cache(CONFIG, 1, 8))
        first, cache = run(parameters, tokens[:, :3], 0, cache)
        second, cache = run(parameters, tokens[:, 3:], 3, cache)
        assert all(np.all(array[:, :, 6:] == value) for array in cache.values())  # nor is it written
        return [np.asarray(first), np.asarray(second)]

    for result, expected in zip(logits(3e38), logits(0.0), strict=True):
        np.testing.assert_array_equal(result, expected)
