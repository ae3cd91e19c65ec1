"""Dropout: its masks are functions of key, layer and branch, however the layers are run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo import models
from crescendo.models import ModelConfig
from crescendo.models.layout import ONE_DEVICE
from crescendo.models.transformer import _drop

CONFIG = ModelConfig(
    vocab_size=40, width=16, layers=2, heads=2, kv_heads=1, mlp_width=24, dropout=0.25, scan_layers=True
).for_platform("cpu")


@pytest.fixture(scope="module")
def rows():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, size=(2, 12)), jnp.int32)
    return tokens, jnp.ones_like(tokens), jnp.arange(12) + 0 * tokens


@pytest.fixture(scope="module")
def parameters():
    return jax.tree.map(lambda x: 3 * x, jax.jit(models.initialize, static_argnums=0)(CONFIG, jax.random.key(0)))


def keys(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


def value_and_gradient(config, parameters, rows, keys_B):
    def loss(parameters):
        return jnp.sum(jnp.sin(models.apply(config, parameters)(*rows, dropout_keys_B=keys_B)))

    return jax.jit(jax.value_and_grad(loss))(parameters)


def test_elements_are_dropped_at_the_rate_and_the_rest_scaled():
    x = jnp.ones((2, 300, 100))
    found = [np.asarray(_drop(0.25, keys(0, 1), layer, ONE_DEVICE, x, branch)) for layer in (0, 1) for branch in (0, 1)]
    for dropped in found:
        assert set(np.unique(dropped).tolist()) == {0.0, np.float32(1 / 0.75)}
        np.testing.assert_allclose(np.mean(dropped == 0, axis=(1, 2)), 0.25, atol=0.01)
        assert np.mean(dropped[0] == dropped[1]) < 0.7  # each example has its own
    assert len({dropped.tobytes() for dropped in found}) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"scan_layers": False}, marks=pytest.mark.slow),
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        {"remat": "dots", "scan_layers": False},
    ],
)
def test_the_masks_are_the_same_however_layers_are_run(parameters, rows, changes):
    loss, gradient = value_and_gradient(CONFIG, parameters, rows, keys(3, 4))
    other_loss, other = value_and_gradient(dataclasses.replace(CONFIG, **changes), parameters, rows, keys(3, 4))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), other, gradient)


def test_an_example_has_the_masks_of_its_key_wherever_it_stands(parameters, rows):
    hidden = jax.jit(lambda rows, keys_B: models.apply(CONFIG, parameters)(*rows, dropout_keys_B=keys_B))
    found = hidden(rows, keys(3, 4))
    turned = hidden([x[::-1] for x in rows], keys(4, 3))
    np.testing.assert_allclose(found, turned[::-1], rtol=1e-5, atol=1e-5)
    assert np.any(np.abs(found - hidden(rows, keys(3, 5))) > 0.1)


def test_without_a_rate_or_keys_the_program_is_the_same(parameters, rows):
    without = dataclasses.replace(CONFIG, dropout=0.0)

    def program(config, keys_B):
        return str(jax.make_jaxpr(lambda p: models.apply(config, p)(*rows, dropout_keys_B=keys_B))(parameters))

    plain = program(without, None)
    assert program(without, keys(3, 4)) == program(CONFIG, None) == plain
    assert program(CONFIG, keys(3, 4)) != plain


def test_a_rate_of_zero_is_no_part_of_the_identity():
    assert "dropout" not in dataclasses.replace(CONFIG, dropout=0.0).identity
    assert CONFIG.identity["dropout"] == 0.25
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"dropout = {rate} must be at least 0 and below 1"):
            dataclasses.replace(CONFIG, dropout=rate)
