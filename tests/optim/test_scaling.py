"""The rate that is applied, and the rules for its size."""

import inspect
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo import optim
from crescendo.optim import schedules
from crescendo.ranges import told

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


BOTH = [optim.scale_by_learning_rate, lambda rate: optim.with_learning_rate(optax.sgd, rate)]


@pytest.mark.parametrize("make", BOTH)
def test_a_schedule_without_a_total_ends_with_the_run(make):
    transform = make(schedules.linear(1.0, warmup=20))
    state = transform.init(PARAMS)
    assert state.learning_rate == 0
    update = jax.jit(transform.update, static_argnames="total_examples")
    for clock, rate in ((10, 0.5), (60, 0.5), (100, 0.0)):
        _, state = update(PARAMS, state, examples_seen=clock, total_examples=100)
        assert state.learning_rate == np.float32(rate)
    with pytest.raises(ValueError, match="length isn't known"):
        transform.update(PARAMS, state, examples_seen=10)
    with pytest.raises(optim.LengthError, match="warmup 20 don't fit total 16"):
        transform.update(PARAMS, state, examples_seen=10, total_examples=16)


@pytest.mark.parametrize("make", BOTH)
def test_a_schedule_that_ends_elsewhere_is_said(make):
    transform = make(schedules.linear(1.0, 6144))
    update = jax.jit(transform.update, static_argnames="total_examples")
    with pytest.warns(optim.LengthWarning, match="ends at 6144 and the run at 512: leave out the schedule's total"):
        _, state = update(PARAMS, transform.init(PARAMS), examples_seen=0, total_examples=512)
    assert state.learning_rate == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(PARAMS, state, examples_seen=0, total_examples=6144)
        make(schedules.constant(1.0, 3)).update(PARAMS, state, total_examples=512)


@pytest.mark.parametrize("make", BOTH)
def test_the_factor_multiplies_the_rate(make):
    transform = make(0.5)
    updates, state = transform.update(PARAMS, transform.init(PARAMS), learning_rate_factor=jnp.float32(4))
    assert state.learning_rate == 2
    np.testing.assert_array_equal(updates["hidden"], np.full((2, 3), np.float32(-2)))


def test_product_is_rounded_once():
    """A bfloat16 update times a float32 rate: 0.1 isn't rounded to bfloat16 first."""
    transform = optim.scale_by_learning_rate(0.1)
    updates, _ = transform.update(jnp.full(1, 3.0, jnp.bfloat16), transform.init(PARAMS))
    assert updates.dtype == jnp.bfloat16
    assert updates[0] == jnp.bfloat16(-0.3)


@pytest.mark.parametrize("name", [*optim.OPTIMIZERS, "scale_by_learning_rate"])
@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf, lambda count: -0.5])
def test_bad_learning_rate(name, rate):
    with pytest.raises(ValueError, match=r"learning_rate( at count 0)?.* must be at least 0 and finite"):
        (optim.OPTIMIZERS | optim.TRANSFORMS)[name](rate)


@pytest.mark.parametrize(("name", "mask"), MASKED)
def test_mask_that_matches_nothing(name, mask):
    for empty in (lambda params: jax.tree.map(lambda _: False, params), {"hidden": False}):
        with pytest.raises(ValueError, match=f"{mask} matches none of the 1 parameters: mark at least one True"):
            optim.OPTIMIZERS[name](0.1, **{mask: empty}).init(PARAMS)


@pytest.mark.parametrize("dtype", ["int32", "no such", ","])
def test_bad_moment_dtype(dtype):
    with pytest.raises(ValueError, match="moment_dtype must be a floating dtype"):
        optim.adamw(0.1, moment_dtype=dtype)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_moments_of_eight_bits_are_refused(name):
    for make in (optim.adamw, optim.muon, optim.schedule_free):
        with pytest.raises(ValueError, match=f"moment_dtype = {name} has too few bits .*: use float32 or bfloat16"):
            make(0.1, moment_dtype=name)


FRACTIONS = [
    ("b1", 1), ("b1", 1.0), ("b2", 1.0), ("b2", -0.1), ("adam_b1", 1.0), ("adam_b2", math.nan), ("momentum", math.nan),
    ("momentum", 1.0), ("decay_rate", 1.5), ("decay", 1.0), ("decay", math.nan),
]  # fmt: skip
OTHERS = [
    ("eps", -1), ("eps", math.nan), ("eps", math.inf), ("weight_decay", -0.1), ("weight_decay", math.inf), ("rms", 0.0),
    ("rms", math.nan), ("gamma", 0.0), ("gamma", math.nan), ("initial_rate", 0.0), ("initial_rate", -1e-6),
    ("rate_coefficient", 0.0), ("trust_coefficient", -1.0), ("trust_coefficient", math.nan), ("clip_threshold", 0.0),
    ("clipping_threshold", -1.0), ("weight_power", -1.0), ("initial_accumulator", math.inf),
    ("newton_schulz_steps", 0), ("update_interval", 0), ("min_dim_size_to_factor", 0),
]  # fmt: skip
EXPORTED = optim.OPTIMIZERS | optim.TRANSFORMS
LISTED = {key for key, _ in FRACTIONS + OTHERS}
NUMBERS = {
    key
    for make in EXPORTED.values()
    for key, parameter in inspect.signature(make).parameters.items()
    if type(parameter.default) in (int, float) and key != "learning_rate"
}
OUT_OF_RANGE = [
    (name, key, value)
    for key, value in [*FRACTIONS, *OTHERS, *((key, math.nan) for key in sorted(NUMBERS - LISTED))]
    for name, make in EXPORTED.items()
    if key in inspect.signature(make).parameters
]


@pytest.mark.parametrize(("name", "key", "value"), OUT_OF_RANGE)
def test_constants_out_of_range_are_refused_by_name(name, key, value):
    rate = {"learning_rate": 0.1} if "learning_rate" in inspect.signature(EXPORTED[name]).parameters else {}
    with pytest.raises(
        ValueError, match=rf"^{key} = {value} must be (at least|above) [0-9][^:]*(: the default is [0-9.e+-]+)?$"
    ):
        EXPORTED[name](**rate, **{key: value})


def test_every_number_has_a_range():
    """A new constant can't be forgotten: without a range at its parameter it would be in no help, and unchecked."""
    for name, make in EXPORTED.items():
        for key, parameter in inspect.signature(make).parameters.items():
            if type(parameter.default) in (int, float) and key != "learning_rate":
                assert told(parameter.annotation), (name, key)
                assert any((name, key) == case[:2] for case in OUT_OF_RANGE), (name, key)


def test_schedule_free_needs_momentum():
    with pytest.raises(ValueError, match=r"b1 = 0.0 must be above 0 and below 1"):
        optim.schedule_free(0.1, b1=0.0)


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
