"""The rate that is applied, and the rules for its size."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo import optim
from crescendo.optim import schedules

PARAMS = {"hidden": jnp.ones((2, 3))}
MASKED = [
    (name, key) for name, f in optim.OPTIMIZERS.items() for key in inspect.signature(f).parameters if "mask" in key
]


@pytest.mark.parametrize("make", [optim.scale_by_learning_rate, lambda rate: optim.with_learning_rate(optax.sgd, rate)])
def test_the_rate_follows_the_clock(make):
    """`examples_seen` when passed, the number of updates when not."""
    transform = make(schedules.linear(1.0, 100))
    state = transform.init(PARAMS)
    assert state.learning_rate == 1.0
    for clock, rate in (({}, 1.0), ({}, 0.99), ({"examples_seen": 75}, 0.25), ({}, 0.97)):
        updates, state = transform.update(PARAMS, state, **clock)
        assert state.learning_rate == np.float32(rate)
        np.testing.assert_array_equal(updates["hidden"], np.full((2, 3), np.float32(-rate)))


def test_product_is_rounded_once():
    """A bfloat16 update times a float32 rate: 0.1 isn't rounded to bfloat16 first."""
    transform = optim.scale_by_learning_rate(0.1)
    updates, _ = transform.update(jnp.full(1, 3.0, jnp.bfloat16), transform.init(PARAMS))
    assert updates.dtype == jnp.bfloat16
    assert updates[0] == jnp.bfloat16(-0.3)


@pytest.mark.parametrize("name", [*optim.OPTIMIZERS, "scale_by_learning_rate"])
@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf, lambda count: -0.5])
def test_bad_learning_rate(name, rate):
    with pytest.raises(ValueError, match=r"learning_rate.* must be at least 0 and finite, got (-|nan|inf)"):
        (optim.OPTIMIZERS | optim.TRANSFORMS)[name](rate)


@pytest.mark.parametrize(("name", "mask"), MASKED)
def test_mask_that_matches_nothing(name, mask):
    for empty in (lambda params: jax.tree.map(lambda _: False, params), {"hidden": False}):
        with pytest.raises(ValueError, match=f"{mask} matches none of the 1 parameters: mark at least one True"):
            optim.OPTIMIZERS[name](0.1, **{mask: empty}).init(PARAMS)


@pytest.mark.parametrize("dtype", ["int32", "no such"])
def test_bad_moment_dtype(dtype):
    with pytest.raises((ValueError, TypeError), match=r"moment_dtype must be a floating dtype|no such"):
        optim.adamw(0.1, moment_dtype=dtype)


def test_learning_rate_factor():
    """Each rule, on Python numbers and on traced ones."""
    cases = {"linear": 8.0, "sqrt": math.sqrt(8), "power": 2.0, "none": 1.0}
    for rule, factor in cases.items():
        assert float(optim.learning_rate_factor(rule, 256, 32, exponent=1 / 3)) == pytest.approx(factor, rel=1e-6)
        traced = jax.jit(lambda size, rule=rule: optim.learning_rate_factor(rule, size, 32, exponent=1 / 3))
        assert float(traced(jnp.int32(256))) == pytest.approx(factor, rel=1e-6)
    with pytest.raises(ValueError, match="unknown learning-rate rule 'cubic': use linear, sqrt, power or none"):
        optim.learning_rate_factor("cubic", 2, 1)
    with pytest.raises(ValueError, match="base_batch_size must be above 0, got 0"):
        optim.learning_rate_factor("sqrt", 2, 0)


# Batch, rate and warmup as printed in table 4 of the LAMB paper.
BERT_TABLE = [
    (512, 5 / (2**3 * 1e3), 1 / 320),
    (1024, 5 / (2**2.5 * 1e3), 1 / 160),
    (2048, 5 / (2**2 * 1e3), 1 / 80),
    (4096, 5 / (2**1.5 * 1e3), 1 / 40),
    (8192, 5 / (2**1 * 1e3), 1 / 20),
    (16384, 5 / (2**0.5 * 1e3), 1 / 10),
    (32768, 5 / (2**0 * 1e3), 1 / 5),
]


@pytest.mark.parametrize(("batch_size", "rate", "warmup"), BERT_TABLE)
def test_bert_recipe(batch_size, rate, warmup):
    np.testing.assert_allclose(optim.bert_recipe(batch_size), (rate, warmup), rtol=1e-12)


def test_bert_in_76_minutes():
    """One stage is the recipe's linear schedule; two are warmed up one after the other."""
    counts = np.arange(0, 1001, 10)
    np.testing.assert_array_equal(
        optim.bert_76_minutes(1000, batch_sizes=(8192,))(counts), schedules.linear(2.5e-3, 1000, warmup=50)(counts)
    )
    two = optim.bert_76_minutes(1000)
    rates = [two(t) for t in (0, 180, 360, 630, 900, 910, 920, 960, 1000)]
    first, second = 5e-3 * math.sqrt(2), 5e-3
    expected = [0, first / 2, first, first / 2, 0, second / 2, second, second / 2, 0]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)
    for bad in ({"batch_sizes": (512, 512, 512)}, {"boundaries": (1200,)}, {"boundaries": ()}):
        with pytest.raises(ValueError, match="don't fit"):
            optim.bert_76_minutes(1000, **bad)
    for bad_batch in (0, 163_840):
        with pytest.raises(ValueError, match=f"batch_size must be above 0 and below 163840.*{bad_batch}"):
            optim.bert_recipe(bad_batch)


def test_step_law():
    """The example of the paper: 1B parameters on 100B tokens."""
    rate, batch_size_tokens = optim.step_law(1e9, 1e11)
    assert f"{rate:.2e}" == "1.63e-03"
    assert f"{batch_size_tokens:.2e}" == "1.11e+06"
    for bad in ((0, 1e11), (1e9, math.nan)):
        with pytest.raises(ValueError, match="params and tokens must be above 0 and finite"):
            optim.step_law(*bad)
