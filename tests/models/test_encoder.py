"""The masked language model: what is chosen, and that attention goes both ways but never out of a document."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo import models
from crescendo.models import ModelConfig
from crescendo.models.encoder import mask_tokens, masked_lm_loss, masked_lm_scores

CONFIG = ModelConfig(vocab_size=40, width=16, layers=2, heads=2, kv_heads=2, mlp_width=24).for_platform("cpu")
MASK = 32
KEY = jax.random.key(3)


def keys(seen, count, key=KEY):
    """Of so many examples from `seen` on."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(seen + jnp.arange(count))


@jax.jit
def masked(tokens, segment_ids, seen):
    return mask_tokens(tokens, segment_ids, keys(seen, len(tokens)), mask_token=MASK)


@jax.jit
def hidden(parameters, tokens, batch):
    return models.apply(CONFIG, parameters)(tokens, batch["segment_ids"], batch["positions"], causal=False)


@jax.jit
def scores(parameters, batch, seen):
    """Loss in training, and what is measured in evaluation."""
    of_rows = keys(seen, len(batch["tokens"]))
    loss = masked_lm_loss(CONFIG, parameters, batch, of_rows, mask_token=MASK)
    return loss, masked_lm_scores(CONFIG, parameters, batch, of_rows, mask_token=MASK)


@pytest.fixture(scope="module")
def parameters():
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(models.initialize, CONFIG), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    segment_ids = np.repeat([[1] * 7 + [2] * 9 + [0] * 4], 6, axis=0)
    positions = np.repeat([[*range(7), *range(9), *range(4)]], 6, axis=0)
    tokens = random.integers(0, MASK, size=(6, 20))
    rows = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    return {name: jnp.asarray(x, jnp.int32) for name, x in rows.items()}


def test_shares_of_the_choice_are_those_of_bert():
    count = 400_000
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, MASK, size=(100, count // 100)), jnp.int32)
    inputs, chosen = masked(tokens, jnp.ones_like(tokens), 0)
    changed = inputs != tokens
    assert not np.any(changed & ~chosen)
    shares = {
        "chosen": (chosen, 0.15),
        "mask": (inputs == MASK, 0.12),
        # A random token is the token itself once in MASK times.
        "random": (changed & (inputs < MASK), 0.015 * (1 - 1 / MASK)),
    }
    for name, (found, expected) in shares.items():
        deviation = (expected * (1 - expected) / count) ** 0.5
        assert float(jnp.mean(found)) == pytest.approx(expected, abs=4 * deviation), name
    random_tokens = np.asarray(inputs)[np.asarray(changed & (inputs < MASK))]
    assert set(random_tokens.tolist()) == set(range(MASK))


def test_padding_is_never_chosen(batch):
    for seen in range(0, 300, 6):
        inputs, chosen = masked(batch["tokens"], batch["segment_ids"], seen)
        assert not np.any(chosen[:, 16:])
        np.testing.assert_array_equal(inputs[:, 16:], batch["tokens"][:, 16:])


def test_the_choice_follows_the_clock_and_not_the_cut_into_batches(batch):
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    whole, _ = masked(tokens, segment_ids, 100)
    first, _ = masked(tokens[:2], segment_ids[:2], 100)
    second, _ = masked(tokens[2:], segment_ids[2:], 102)
    np.testing.assert_array_equal(whole, jnp.concatenate([first, second]))
    of_another_key, _ = mask_tokens(tokens, segment_ids, keys(100, 6, jax.random.key(4)), mask_token=MASK)
    for other in (masked(tokens, segment_ids, 106)[0], of_another_key):
        assert np.any(other != whole)


def test_a_token_sees_both_ways_but_only_its_document(parameters, batch):
    tokens = batch["tokens"]
    before = hidden(parameters, tokens, batch)[0]
    after = hidden(parameters, tokens.at[0, 5].set((tokens[0, 5] + 1) % MASK), batch)[0]
    moved = np.any(before != after, axis=-1)
    np.testing.assert_array_equal(moved, np.asarray(batch["segment_ids"][0]) == 1)


def test_loss_and_accuracy_are_those_of_the_chosen_tokens(parameters, batch):
    (loss, weight), measured = scores(parameters, batch, 12)
    correct, count = measured["accuracy"]
    inputs, chosen = masked(batch["tokens"], batch["segment_ids"], 12)
    logits = np.float64(hidden(parameters, inputs, batch)) @ np.float64(parameters["embedding"]["table"]).T
    log_z = np.log(np.exp(logits).sum(-1))
    tokens, chosen = np.asarray(batch["tokens"]), np.asarray(chosen)
    losses = log_z - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    assert weight == count == chosen.sum() > 0
    np.testing.assert_allclose(loss, losses[chosen].sum(), rtol=1e-5)
    np.testing.assert_allclose(measured["loss"], (loss, weight), rtol=1e-6)
    assert correct == ((logits.argmax(-1) == tokens) & chosen).sum()


def test_a_mask_token_outside_the_vocabulary_is_refused(parameters, batch):
    for mask_token in (0, 40):
        with pytest.raises(ValueError, match=f"mask_token = {mask_token} must lie between 1 and 39"):
            masked_lm_loss(CONFIG, parameters, batch, keys(0, 6), mask_token=mask_token)
