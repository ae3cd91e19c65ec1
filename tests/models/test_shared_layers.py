"""Layers with one block's weights: against their maths in float64, and against the model that has them once a layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo import models, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.tasks.language_model import language_model
from crescendo.models import ModelConfig, upcycling
from crescendo.models.decode import decode, empty_cache
from crescendo.models.loss import next_token_loss
from crescendo.optim.masks import leaves_with_paths, stacked_axis

DENSE = ModelConfig(vocab_size=40, width=8, layers=3, heads=2, kv_heads=1, mlp_width=12, shared_layers=True)
EXPERTS = dataclasses.replace(DENSE, experts=4, expert_width=6)
SLOW = pytest.mark.slow


def drawn(config: ModelConfig) -> dict:
    """No two norms alike, and a router that is decided."""
    random = np.random.default_rng(0)
    parameters = models.initialize(config, jax.random.key(0))

    def vary(path, x):
        scale = 20 if "router" in jax.tree_util.keystr(path) else 1
        return jnp.asarray(x * random.uniform(0.5, 1.5, x.shape) * scale, jnp.float32)

    return jax.tree_util.tree_map_with_path(vary, parameters)


def once_a_layer(config: ModelConfig, parameters: dict) -> tuple[ModelConfig, dict]:
    """The same function, whose layers have each their own copy."""
    shared = jax.tree.map(lambda x: jnp.stack([x] * config.layers), parameters["shared_block"])
    own = parameters["blocks"]
    blocks = own | {part: shared[part] | own.get(part, {}) for part in shared}
    rest = {name: x for name, x in parameters.items() if name not in ("blocks", "shared_block")}
    return dataclasses.replace(config, shared_layers=False), rest | {"blocks": blocks}


def written_from_the_maths(config: ModelConfig, parameters: dict, tokens_T) -> np.ndarray:
    """The hidden states of one document in float64: one block's matrices L times, with L norms."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)
    block, norms = p["shared_block"], p["blocks"]
    normed = lambda x, scale: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_epsilon) * scale  # noqa: E731
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    angle = np.arange(len(tokens_T))[:, None] * 1e4 ** (-np.arange(0, 4, 2) / 4)

    def turned(x_THE):
        a, b = np.split(x_THE, 2, -1)
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    x = p["embedding"]["table"][tokens_T]
    for i in range(config.layers):
        y = normed(x, norms["attention_norm"]["scale"][i])
        q, k, v = (np.einsum("td,dhe->the", y, block["attention"][n]["kernel"]) for n in ("query", "key", "value"))
        q, k = (turned(normed(z, norms["attention"][f"{n}_norm"]["scale"][i])) for z, n in ((q, "query"), (k, "key")))
        scores = np.einsum("the,se->hts", q, k[:, 0]) / 2
        scores = np.exp(np.where(np.tril(np.ones(scores.shape[1:])) > 0, scores, -np.inf))
        mixed = np.einsum("hts,se->the", scores / scores.sum(-1, keepdims=True), v[:, 0])
        x = x + np.einsum("the,hed->td", mixed, block["attention"]["output"]["kernel"])
        y, mlp = normed(x, norms["mlp_norm"]["scale"][i]), block["mlp"]
        if config.experts is None:
            gate, up, down = (mlp[n]["kernel"] for n in ("gate", "up", "down"))
            x = x + (silu(y @ gate) * (y @ up)) @ down
            continue
        shares = np.exp(y @ mlp["router"]["kernel"])
        gate, up, down = (mlp[n] for n in ("gate", "up", "down"))
        of_experts = np.stack([(silu(y @ gate[e]) * (y @ up[e])) @ down[e] for e in range(config.experts)], 1)
        weights = np.where(shares >= np.sort(shares, -1)[:, [-config.experts_per_token]], shares, 0)
        x = x + np.einsum("tx,txd->td", weights / weights.sum(-1, keepdims=True), of_experts)
    return normed(x, p["final_norm"]["scale"])


@pytest.mark.parametrize("config", [pytest.param(DENSE, marks=SLOW), EXPERTS], ids=["dense", "experts"])
def test_the_model_equals_the_maths_in_float64(config):
    config = config.for_platform("cpu")
    parameters, tokens = drawn(config), jax.random.randint(jax.random.key(1), (1, 9), 0, 40)
    found = models.apply(config, parameters)(tokens, jnp.ones_like(tokens), jnp.arange(9)[None])
    expected = written_from_the_maths(config, parameters, np.asarray(tokens[0]))
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-5)


HOW = [{"scan_layers": True}, {"scan_layers": False}, {"scan_layers": True, "remat": "full"}, {"remat": "dots"}]


@pytest.mark.parametrize("how", [HOW[0], *(pytest.param(how, marks=SLOW) for how in HOW[1:])], ids=str)
@pytest.mark.parametrize("config", [DENSE, pytest.param(EXPERTS, marks=SLOW)], ids=["dense", "experts"])
def test_gradients_of_what_is_shared_are_sums_over_layers(config, how):
    config = dataclasses.replace(config, **how).for_platform("cpu")
    parameters = drawn(config)
    random = np.random.default_rng(1)
    batch = {name: jnp.asarray(random.integers(0, 40, (2, 7)), jnp.int32) for name in ("tokens", "labels")}
    batch |= {"segment_ids": jnp.ones((2, 7), jnp.int32), "positions": jnp.arange(7)[None].repeat(2, 0)}
    grad = jax.jit(
        jax.value_and_grad(lambda config, p: next_token_loss(config, p, batch)[0], argnums=1), static_argnums=0
    )
    found, ours = grad(config, parameters)
    expected, theirs = grad(*once_a_layer(config, parameters))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for path, x in leaves_with_paths(ours["shared_block"]):
        close(x, np.sum(functools.reduce(lambda tree, name: tree[name], path, theirs["blocks"]), axis=0))
    for path, x in leaves_with_paths(ours["blocks"]):
        close(x, functools.reduce(lambda tree, name: tree[name], path, theirs["blocks"]))
    close(ours["embedding"]["table"], theirs["embedding"]["table"])


def test_a_block_is_counted_once_and_its_flops_for_every_layer():
    shared, own = EXPERTS.for_platform("cpu"), dataclasses.replace(EXPERTS, shared_layers=False).for_platform("cpu")
    shapes = [jax.eval_shape(lambda c=c: models.initialize(c, jax.random.key(0))) for c in (shared, own)]
    sizes = [sum(x.size for x in jax.tree.leaves(shape)) for shape in shapes]
    assert sizes[1] - sizes[0] == 2 * sum(x.size for x in jax.tree.leaves(shapes[0]["shared_block"]))
    assert shared.flops_per_token(64) == own.flops_per_token(64)
    assert {path[0]: stacked_axis(path) for path, _ in leaves_with_paths(shapes[0])}["shared_block"] is None
    assert all(stacked_axis(path) == 0 for path, _ in leaves_with_paths(shapes[0]) if path[0] == "blocks")


@SLOW
@pytest.mark.parametrize("capacity", [None, 0.5])
def test_decoding_is_the_model_without_a_capacity(capacity):
    config = dataclasses.replace(EXPERTS, expert_capacity=capacity).for_platform("cpu")
    parameters, tokens = drawn(config), jax.random.randint(jax.random.key(4), (2, 7), 0, config.vocab_size)
    model = models.apply(dataclasses.replace(config, expert_capacity=None), parameters)
    expected = model(tokens, jnp.ones_like(tokens), jnp.arange(7)[None].repeat(2, 0)) @ model.output_table().T
    cache, found = empty_cache(config, 2, 7), []
    for begin, end in ((0, 6), (6, 7)):
        logits, cache = decode(config, parameters, tokens[:, begin:end], begin, cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=2e-5)


@SLOW
def test_experts_may_begin_as_copies_of_the_block():
    config = dataclasses.replace(EXPERTS, expert_width=None, shared_expert_width=4).for_platform("cpu")
    dense = config.without_experts()
    parameters, tokens = drawn(dense), jnp.arange(9)[None]
    made = upcycling.upcycled(config, parameters, jax.random.key(1))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(
        jnp.shape, jax.eval_shape(lambda: models.initialize(config, jax.random.key(0)))
    )
    found, expected = (
        models.apply(c, jax.tree.map(jnp.asarray, p))(tokens, tokens + 1 - tokens, tokens)
        for c, p in ((config, made), (dense, parameters))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="layers = 6, but the dense model has 3"):
        upcycling.upcycled(dataclasses.replace(config, layers=6), parameters, jax.random.key(1))


def test_layers_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"^moe_every = 3 makes layers differ, to which shared_layers = True"):
        dataclasses.replace(EXPERTS, moe_every=3)


def test_stages_are_refused():
    mesh = parallel.make_mesh(stage=2, data=1, devices=jax.devices()[:2])
    with pytest.raises(
        ValueError, match=r"^mesh stage = 2: its layers share one block's weights, which .*: use stage = 1"
    ):
        language_model(RandomText(40, 8), DENSE.for_platform("cpu")).place(parallel.Layout(mesh))


def test_what_is_shared_is_no_part_of_other_models_identity():
    assert "shared_layers" not in ModelConfig().identity
    assert DENSE.identity["shared_layers"] is True
