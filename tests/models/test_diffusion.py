"""Masked diffusion: the times, the masks, and that the bound's estimate is unbiased."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo import models
from crescendo.models import ModelConfig
from crescendo.models.diffusion import diffusion_loss, diffusion_scores, even_times, mask_tokens, random_times

CONFIG = ModelConfig(vocab_size=40, width=16, layers=1, heads=2, kv_heads=2, mlp_width=24).for_platform("cpu")
MASK = 32


def keys(first, count):
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(3), number))(first + jnp.arange(count))


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    segment_ids = np.repeat([[1] * 7 + [2] * 9 + [0] * 4], 64, axis=0)
    positions = np.repeat([[*range(7), *range(9), *range(4)]], 64, axis=0)
    rows = {
        "tokens": random.integers(0, MASK, size=(64, 20)),
        "segment_ids": segment_ids,
        "positions": positions,
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in rows.items()}


def test_times_are_uniform_and_never_zero():
    for times in (
        random_times(keys(0, 4000)),
        even_times(jnp.arange(4000)),
        even_times(jnp.arange(4000) + (2**31 - 4001)),
    ):
        assert float(times.min()) > 0
        assert float(times.max()) <= 1
        np.testing.assert_allclose(np.quantile(times, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


def test_even_times_are_more_even_than_random_ones():
    times = np.sort(even_times(jnp.arange(1000, 1256)))
    assert np.max(np.abs(times - (np.arange(256) + 0.5) / 256)) < 3 / 256


def test_each_token_is_masked_with_its_rows_probability_and_padding_never():
    times = jnp.array([0.1, 0.5, 1.0])
    tokens = jnp.zeros((3, 20_000), jnp.int32)
    segment_ids = jnp.ones_like(tokens).at[:, -100:].set(0)
    inputs, masked = mask_tokens(tokens, segment_ids, keys(0, 3), times, mask_token=MASK)
    np.testing.assert_array_equal(inputs, np.where(masked, MASK, 0))
    assert not np.any(masked[:, -100:])
    np.testing.assert_allclose(np.mean(masked[:, :-100], axis=1), times, atol=0.015)
    assert np.all(masked[2, :-100])


def test_draws_follow_the_example_and_not_the_cut(batch):
    @jax.jit
    def masked(tokens, segment_ids, first):
        drawn = keys(first, len(tokens))
        return mask_tokens(tokens, segment_ids, drawn, random_times(drawn), mask_token=MASK)[0]

    whole, first, second = (
        masked(batch["tokens"][part], batch["segment_ids"][part], part.start)
        for part in (slice(0, 64), slice(0, 10), slice(10, 64))
    )
    np.testing.assert_array_equal(whole, np.concatenate([first, second]))


@pytest.mark.slow
def test_the_estimate_of_a_model_that_knows_nothing_is_log_vocabulary(batch):
    """All logits are 0, so the bound is log V whatever t; its estimates must average to it."""
    nothing = jax.tree.map(jnp.zeros_like, models.initialize(CONFIG, jax.random.key(0)))

    @jax.jit
    @jax.vmap
    def estimate(first):
        of_rows = keys(first, 64)
        return diffusion_loss(CONFIG, nothing, batch, of_rows, random_times(of_rows), mask_token=MASK)

    sums, weights = estimate(64 * jnp.arange(400))
    assert set(np.asarray(weights).tolist()) == {64 * 16.0}
    means = np.asarray(sums / weights)
    error = float(np.std(means)) / len(means) ** 0.5
    assert error < 0.02
    assert float(np.mean(means)) == pytest.approx(np.log(40), abs=4 * error)


def test_loss_and_accuracy_are_those_of_the_masked_tokens(batch):
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(models.initialize, CONFIG), jax.random.key(0))
    parameters = jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), shapes)
    of_rows, times = keys(0, 64), even_times(jnp.arange(64))

    @jax.jit
    def call(parameters):
        arguments = (CONFIG, parameters, batch, of_rows, times)
        inputs, masked = mask_tokens(batch["tokens"], batch["segment_ids"], of_rows, times, mask_token=MASK)
        hidden = models.apply(CONFIG, parameters)(inputs, batch["segment_ids"], batch["positions"], causal=False)
        found = diffusion_loss(*arguments, mask_token=MASK), diffusion_scores(*arguments, mask_token=MASK)
        return found, masked, hidden

    (loss, measured), masked, hidden = call(parameters)
    logits = np.float64(hidden) @ np.float64(parameters["embedding"]["table"]).T
    tokens, masked = np.asarray(batch["tokens"]), np.asarray(masked)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    expected = np.sum(losses * masked / np.float64(times)[:, None]), 64 * 16
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(measured["loss"], expected, rtol=1e-5)
    correct, count = measured["accuracy"]
    assert (correct, count) == (((logits.argmax(-1) == tokens) & masked).sum(), masked.sum())


def test_a_mask_token_outside_the_vocabulary_is_refused(batch):
    parameters = models.initialize(CONFIG, jax.random.key(0))
    with pytest.raises(ValueError, match="mask_token = 40 must lie between 1 and 39"):
        diffusion_loss(CONFIG, parameters, batch, keys(0, 64), jnp.ones(64), mask_token=40)
