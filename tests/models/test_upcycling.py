"""A model with experts that begins as a dense one: the same function, to the rounding of float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo import models
from crescendo.models import ModelConfig
from crescendo.models.upcycling import dense_shapes, upcycled

DENSE = ModelConfig(vocab_size=50, width=16, layers=4, heads=2, kv_heads=1, mlp_width=24)
KINDS = {
    "every other layer, a bias, a shared expert": {"moe_every": 2, "balance": "bias", "shared_expert_width": 10},
    "two of five": {},
    "unrolled, every other layer": {"moe_every": 2, "scan_layers": False},
    "all of three, sigmoid": {"experts": 3, "experts_per_token": 3, "router": "sigmoid", "expert_width": 24},
    "every fourth layer, room for all": {"experts": 4, "moe_every": 4, "expert_capacity": 2.0},
}
QUICK = next(iter(KINDS))
initialized = jax.jit(models.initialize, static_argnums=0)


def decided(**changes) -> ModelConfig:
    return dataclasses.replace(DENSE, **{"scan_layers": True, **changes}).for_platform("cpu")


def in_float64(config: ModelConfig) -> ModelConfig:
    """Float64 is for comparing, and no choice of a user's."""
    config = dataclasses.replace(config)
    object.__setattr__(config, "dtype", "float64")
    return config


def of_dense(config: ModelConfig) -> dict:
    """Far from a fresh model's, so that no layer is nearly nothing."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(x + random.normal(size=x.shape) / 4, x.dtype),
        initialized(config, jax.random.key(0)),
    )


TOKENS = np.random.default_rng(1).integers(0, DENSE.vocab_size, (2, 10))
SEGMENTS = np.where(np.arange(10) < 8, 1, 0) * np.ones_like(TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def hidden(config: ModelConfig, parameters: dict):
    rows = (jnp.asarray(x, jnp.int32) for x in (TOKENS, SEGMENTS, np.arange(10) * np.ones_like(TOKENS)))
    return models.apply(config, parameters)(*rows, implementation="reference")[:, :8]


@pytest.mark.parametrize(
    "kind", [kind if kind == QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_the_function_is_the_dense_models(kind):
    with jax.enable_x64(True):
        dense, config = in_float64(decided()), in_float64(decided(**{"experts": 5, **KINDS[kind]}))
        parameters = of_dense(dense)
        made = upcycled(config, parameters, jax.random.key(3))
        fresh = initialized(config, jax.random.key(3))
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, fresh)
        expected = hidden(dense, parameters)
        assert expected.dtype == jnp.float64
        np.testing.assert_allclose(hidden(config, made), expected, rtol=0, atol=1e-12)
        drawn = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(made)}
        for path, x in jax.tree_util.tree_leaves_with_path(fresh):
            if "router" in (name := jax.tree_util.keystr(path)) or "['shared']['up']" in name:
                np.testing.assert_array_equal(drawn[name], x)


@pytest.mark.slow
def test_experts_part_and_a_shared_one_learns():
    config = decided(experts=5, balance="bias", shared_expert_width=10)
    made = upcycled(config, of_dense(decided()), jax.random.key(3))
    aim = np.random.default_rng(2).normal(size=(2, 8, DENSE.width))
    mlp = jax.jit(jax.grad(lambda x: jnp.sum(aim * hidden(config, x))))(made)["blocks"]["mlp"]
    of_experts = np.asarray(mlp["down"])
    assert (np.abs(of_experts[:, 1:] - of_experts[:, :1]).max(axis=(2, 3)) > 1e-3).all()
    assert (np.abs(mlp["shared"]["down"]["kernel"]).max(axis=(1, 2)) > 1e-3).all()
    assert not made["blocks"]["mlp"]["shared"]["down"]["kernel"].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 1}, "experts_per_token = 1 scales what an expert makes .*: use at least 2"),
        ({"expert_width": 12}, "expert_width = 12, but .* have the width 24, .*: set expert_width = 24"),
        ({"mlp_width": 32}, "mlp_width = 32, but .* have the width 24, .*: set mlp_width = 24"),
        ({"mlp_width": 32, "expert_width": 24, "moe_every": 2}, "mlp_width = 32, .*: set mlp_width = 24"),
        ({"layers": 2}, "layers = 2, but the dense model has 4: set layers = 4"),
    ],
)
def test_what_would_be_another_function_is_refused(changes, message):
    shapes = jax.tree.map(lambda x: np.zeros(x.shape), dense_shapes(decided(experts=4)))
    with pytest.raises(ValueError, match=message):
        upcycled(decided(experts=4, **changes), shapes, jax.random.key(0))


def test_a_recipe_asks_nothing_of_the_dense_models_widths():
    ours = decided(experts=4, mlp_width=40, width=32, heads=2, kv_heads=2, head_width=16, matmul="fp8")
    assert dense_shapes(ours)["blocks"]["mlp"]["down"]["kernel"].shape[1] == 40
