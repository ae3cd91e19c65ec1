"""Layers with experts against an independent float64 version of their maths, and what packing and batching need."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crescendo import models
from crescendo.models import ModelConfig
from crescendo.models.decode import decode, empty_cache
from crescendo.models.layout import ONE_DEVICE
from crescendo.models.loss import next_token_loss, next_token_parts
from crescendo.models.moe import TOLD, Moe, over_rows, through_experts, training_terms

SMALL = ModelConfig(
    vocab_size=50, width=16, layers=2, heads=2, kv_heads=1, mlp_width=24, experts=5, experts_per_token=2, expert_width=8
)
ROWS, LENGTH = 3, 12
COUNTED = np.array([[True] * 9 + [False] * 3, [True] * LENGTH, [True] + [False] * 11])
KINDS = {
    "softmax": {},
    "one expert a token": {"experts_per_token": 1},
    "all experts": {"experts": 3, "experts_per_token": 3},
    "sigmoid, bias, shared": {"router": "sigmoid", "balance": "bias", "shared_expert_width": 10},
    "capacity": {"expert_capacity": 0.7},
}
QUICK = ("softmax", "sigmoid, bias, shared", "capacity")


def small(**changes) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes).for_platform("cpu")


def layer(config: ModelConfig) -> Moe:
    made = Moe(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    made.router.kernel[...] *= 20  # decided, and far from even
    if config.balance == "bias":
        made.bias[...] = jnp.linspace(-0.4, 0.4, config.experts)
    return made


def silu(x):
    return x / (1 + np.exp(-x))


def written_from_the_maths(config: ModelConfig, made: Moe, x_BTD, counted_BT):
    """What a layer adds and says, in float64, one token and one expert at a time."""
    gate, up, down, router = (
        np.asarray(x, np.float64) for x in (made.gate[...], made.up[...], made.down[...], made.router.kernel[...])
    )
    bias = np.asarray(made.bias[...], np.float64) if config.balance == "bias" else np.zeros(config.experts)
    k, y, said = config.experts_per_token, np.zeros(x_BTD.shape), []
    for row, (x_TD, counted_T) in enumerate(zip(x_BTD.astype(np.float64), counted_BT, strict=True)):
        room = np.full(config.experts, config.expert_rows(len(x_TD)) or len(x_TD))
        load, mean, entropy, z, dropped = np.zeros(config.experts), np.zeros(config.experts), 0.0, 0.0, 0.0
        for t in np.flatnonzero(counted_T):
            logits = x_TD[t] @ router
            p = np.exp(logits) / np.exp(logits).sum() if config.router == "softmax" else 1 / (1 + np.exp(-logits))
            chosen = np.argsort(-(p + bias), kind="stable")[:k]
            weights = p[chosen] / p[chosen].sum() if k > 1 else p[chosen]
            for e, weight in zip(chosen, weights, strict=True):
                load[e] += 1 / k
                if room[e]:
                    y[row, t] += weight * (silu(x_TD[t] @ gate[e]) * (x_TD[t] @ up[e])) @ down[e]
                    room[e] -= 1
                else:
                    dropped += 1 / k
            share = p / p.sum()
            mean, entropy = mean + share, entropy - np.sum(share * np.log(share))
            z += np.log(np.exp(logits).sum()) ** 2
        n = counted_T.sum()
        said.append([config.experts * np.sum(load / n * mean / n), z / n, entropy / n, dropped / n, load / n])
        if config.shared_expert_width is not None:
            s = made.shared
            a, b, c = (np.asarray(m.kernel[...], np.float64) for m in (s.gate, s.up, s.down))
            y[row] += (silu(x_TD @ a) * (x_TD @ b)) @ c
    names = ("balance_loss", "router_z_loss", "router_entropy", "dropped_share", "expert_load")
    return y, {name: np.stack(values) for name, values in zip(names, zip(*said, strict=True), strict=True)}


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_layer_equals_the_maths_in_float64(kind):
    config = small(**KINDS[kind])
    made, x_BTD = layer(config), np.random.default_rng(0).normal(size=(ROWS, LENGTH, config.width)).astype(np.float32)
    ours, said = jax.jit(lambda x, counted: made(x, ONE_DEVICE, counted_BT=counted))(x_BTD, COUNTED)
    expected, expected_said = written_from_the_maths(config, made, x_BTD, COUNTED)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
    for name, values in expected_said.items():
        np.testing.assert_allclose(said[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    if kind == "capacity":
        assert 0.1 < said["dropped_share"][1] < 0.9


@pytest.mark.parametrize("chosen", [[0, 0, 0, 0], [3, 1, 3, 4], [4, 4, 4, 4]], ids=str)
def test_gradients_are_those_of_plain_indexing(chosen):
    """The permutation has a derivative rule of its own; experts without tokens, tokens without experts (4) too."""
    random = np.random.default_rng(1)
    x, gate_up, down = (random.normal(size=shape) for shape in ((1, 2, 6), (4, 6, 2, 5), (4, 5, 6)))
    with jax.enable_x64(True):
        weights = jnp.asarray(random.uniform(size=(1, 2, 2)))
        ids = jnp.array(chosen).reshape(1, 2, 2)

        def total(implementation, *arrays):
            x, weights, gate_up, down = arrays
            y = through_experts(x, ids, weights, gate_up, down, implementation=implementation)
            return jnp.sum(jnp.sin(y))

        arrays = tuple(map(jnp.asarray, (x, weights, gate_up, down)))
        ours, plain = (
            jax.grad(functools.partial(total, i), argnums=(0, 1, 2, 3))(*arrays) for i in (None, "reference")
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), ours, plain)
        assert (np.abs(plain[0]).max() > 0) == (chosen != [4, 4, 4, 4])


@pytest.fixture(scope="module")
def packed():
    random = np.random.default_rng(1)
    segment_ids = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12, [1] + [0] * 11])
    positions = np.array([[*range(5), *range(4), 0, 0, 0], [*range(12)], [0] * 12])
    draw = lambda: random.integers(0, SMALL.vocab_size, size=(ROWS, LENGTH))  # noqa: E731
    batch = {"tokens": draw(), "labels": draw(), "segment_ids": segment_ids, "positions": positions}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


@functools.partial(jax.jit, static_argnums=0)
def loss(config, parameters, batch):
    return next_token_loss(config, parameters, batch)


@functools.partial(jax.jit, static_argnums=0)
def scored(config, parameters, batch):
    return next_token_parts(config, scores=True)(parameters, batch)


SLOW = pytest.mark.slow


@SLOW
@pytest.mark.parametrize("changes", [{}, {"balance": "bias", "expert_capacity": 1.0}], ids=str)
def test_how_rows_are_grouped_changes_no_sum(packed, changes):
    config = small(scan_layers=True, **changes)
    parameters = models.initialize(config, jax.random.key(0))
    whole = loss(config, parameters, packed)
    rows = [loss(config, parameters, jax.tree.map(lambda x, i=i: x[i : i + 1], packed)) for i in range(ROWS)]
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), rtol=2e-6), whole, *rows)
    assert whole[1] == 22


def test_what_a_token_adds_to_the_loss_is_the_balance_and_the_routers_z_loss(packed):
    config = small(scan_layers=True)
    parameters = models.initialize(config, jax.random.key(0))
    total, weight, told = loss(config, parameters, packed)
    plain = scored(config, parameters, packed)["loss"][0]
    terms = config.layers * (0.01 * told["balance_loss"] + 0.001 * told["router_z_loss"])  # told are means over layers
    np.testing.assert_allclose(total - plain, terms, rtol=1e-4)
    assert 0 <= told["router_entropy"] / weight <= np.log(config.experts)
    assert told["dropped_share"] == 0


def test_the_gradient_of_a_balancing_bias_is_the_excess_of_its_load():
    made, weights = layer(small(balance="bias")), jnp.array([9.0, 12.0, 1.0])
    x_BTD = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, SMALL.width))
    structure, rest = nnx.split(made)

    @jax.jit
    def terms(rest):
        said = nnx.merge(structure, rest)(x_BTD, ONE_DEVICE, counted_BT=jnp.asarray(COUNTED))[1]
        summed = over_rows(jax.tree.map(lambda x: x[None], said), weights)
        return training_terms(small(balance="bias", balance_loss=0.1, router_z_loss=0.0), summed, 22.0)[0], summed

    (value, summed), of_all = jax.value_and_grad(terms, has_aux=True)(rest)
    gradient = nnx.to_pure_dict(of_all)["bias"]
    assert value == 0
    np.testing.assert_allclose(gradient, 0.1 * (summed["expert_load"][0] - 22 / 5), rtol=1e-5, atol=1e-6)
    assert np.abs(gradient).max() > 0.1


def test_what_is_told_is_a_mean_over_the_rows_that_layers_had():
    """Of two layers the second had a third of the rows, as where stages are skipped."""
    config = small(layers=2, balance_loss=0.5, router_z_loss=0.25)
    means, weight = np.array([1.5, 3.0]), np.array([12.0, 4.0])
    sums = {name: jnp.asarray(means * weight) for name in TOLD}
    terms, told = training_terms(config, sums | {"weight": jnp.asarray(weight)}, jnp.float32(12))
    assert terms == 0.75 * (1.5 * 12 + 3.0 * 4)
    np.testing.assert_allclose([x / 12 for x in told.values()], (1.5 * 12 + 3.0 * 4) / 16)
    nothing = {name: jnp.zeros(2) for name in (*TOLD, "weight")}
    assert not any(training_terms(config, nothing, jnp.float32(0))[1].values())


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "full"},
        {"scan_layers": False},
        {"remat": "dots"},
    ],
    ids=str,
)
@SLOW
def test_how_layers_run_changes_no_gradient(packed, changes):
    one, other = small(scan_layers=True), small(**({"scan_layers": True} | changes))
    parameters = models.initialize(one, jax.random.key(0))
    grad = jax.jit(jax.grad(lambda config, p: next_token_loss(config, p, packed)[0], argnums=1), static_argnums=0)
    ours, expected = grad(other, parameters), grad(one, parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, expected)


def test_every_second_layer_has_experts(packed):
    config = small(layers=4, moe_every=2, scan_layers=True)
    parameters = models.initialize(config, jax.random.key(0))
    first, second = parameters["blocks"]["layer_0"], parameters["blocks"]["layer_1"]
    assert first["mlp"]["gate"]["kernel"].shape == (2, 16, 24)
    assert second["mlp"]["gate"].shape == (2, 5, 16, 8)
    assert models.logical_axes(config)["blocks"]["layer_1"]["mlp"]["down"] == ("layers", "experts", "mlp", "embed")
    scores = jax.eval_shape(functools.partial(scored, config), parameters, packed)
    loads = {name for name in scores if name.startswith("expert_load_")}
    assert loads == {f"expert_load_{i}_{e}" for i in range(2) for e in range(5)}


@pytest.mark.parametrize(
    "changes", [{"layers": 1}, pytest.param({"layers": 4, "moe_every": 2, "expert_capacity": 0.5}, marks=SLOW)], ids=str
)
def test_decoding_is_the_model_without_a_capacity(changes):
    config = small(**changes)
    parameters = models.initialize(config, jax.random.key(3))
    tokens = jax.random.randint(jax.random.key(4), (2, 7), 0, config.vocab_size)
    ones, positions = jnp.ones_like(tokens), jnp.arange(7)[None].repeat(2, 0)
    dropless = dataclasses.replace(config, expert_capacity=None)

    @jax.jit
    def whole(parameters):
        model = models.apply(dropless, parameters)
        return model(tokens, ones, positions) @ model.output_table().T

    expected = whole(parameters)
    step = jax.jit(decode, static_argnums=0)
    cache, found = empty_cache(config, 2, 7), []
    for begin, end in ((0, 6), (6, 7)):
        logits, cache = step(config, parameters, tokens[:, begin:end], begin, cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid, bias, shared"])
def test_flops_are_those_of_the_matrices_that_a_token_meets(kind):
    config = small(layers=4, moe_every=2, **KINDS[kind])
    shapes = jax.eval_shape(functools.partial(models.initialize, config), jax.random.key(0))
    met = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("kernel", "table")):
            met += x.size
        elif name.split("/")[-1] in ("gate", "up", "down"):
            met += x.size * config.experts_per_token / config.experts
    mixing = config.layers * config.heads * config.head_size * 64
    assert config.flops_per_token(64) == 6 * met + 6 * mixing


def test_a_model_of_about_100_million_active_parameters():
    config = ModelConfig.preset("moe-300m")
    shapes = jax.eval_shape(functools.partial(models.initialize, config.for_platform("gpu")), jax.random.key(0))
    total = sum(x.size for x in jax.tree.leaves(shapes))
    idle = config.feed_forward_parameters(16) - config.feed_forward_parameters(2)
    assert 290e6 < total < 300e6
    assert 90e6 < total - idle < 100e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 6}, "experts_per_token = 6 is more than experts = 5: use at most 5"),
        ({"moe_every": 3}, "layers = 2 must be a multiple of moe_every = 3, as every so many layers one has experts"),
        ({"experts": 0}, "experts = 0"),
        ({"expert_capacity": 0.0}, "expert_capacity = 0"),
        (
            {"matmul": "fp8", "kv_heads": 2, "shared_expert_width": 24},
            "shared_expert_width = 24 must be a multiple of 16 with matmul = 'fp8': the nearest are 16 and 32",
        ),
        ({"experts": None}, "= .* says nothing of a model without experts: set experts, or leave it out"),
    ],
    ids=str,
)
def test_experts_that_do_not_fit_are_refused_in_a_line(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_a_recipe_is_the_shared_experts_and_not_that_of_the_products_of_groups():
    x_BTD = jax.random.normal(jax.random.key(0), (1, 8, 32), jnp.bfloat16)

    def made(matmul: str, shared: int | None):
        config = dataclasses.replace(SMALL, width=32, expert_width=24, shared_expert_width=shared, matmul=matmul)
        return np.asarray(Moe(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x_BTD, ONE_DEVICE)[0], np.float32)

    np.testing.assert_array_equal(made("fp8", None), made("dtype", None))
    exact = made("dtype", 32)
    error = np.linalg.norm(made("fp8", 32) - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.1


def test_a_capacity_below_one_token_is_refused_with_the_least_that_will_do():
    config = dataclasses.replace(SMALL, expert_capacity=0.1)
    message = r"expert_capacity = 0\.1 gives an expert 0\.48 of a row's 12 tokens, less than one: use at least 0\.2084"
    with pytest.raises(ValueError, match=message):
        config.expert_rows(12)
    assert dataclasses.replace(config, expert_capacity=0.2084).expert_rows(12) == 2


def test_what_is_about_experts_is_no_part_of_a_dense_models_identity():
    assert not {"experts", "experts_per_token", "balance_loss", "router"} & set(ModelConfig().identity)
    assert SMALL.identity["experts"] == 5
    assert SMALL.identity != dataclasses.replace(SMALL, balance="bias").identity


@pytest.mark.slow
def test_rows_may_be_mapped_over(packed):
    """As `Session.row_losses` does."""
    config = small(scan_layers=True)
    parameters = models.initialize(config, jax.random.key(0))
    mapped = jax.jit(jax.vmap(lambda row: scored(config, parameters, jax.tree.map(lambda x: x[None], row))))(packed)
    whole = scored(config, parameters, packed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(jnp.sum(a), b, rtol=2e-6, atol=1e-6), mapped, whole)


@pytest.mark.slow
def test_the_reference_has_second_derivatives(packed):
    config = small(scan_layers=True, experts=3, experts_per_token=3)  # whatever the step, no token changes its experts
    parameters = models.initialize(config, jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda p: next_token_loss(config, p, packed, implementation="reference")[0]))
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), parameters)
    change = jax.jit(lambda p: jax.jvp(gradient, (p,), (direction,))[1])(parameters)
    step = 1e-4
    ahead, behind = (
        gradient(jax.tree.map(lambda x, d, by=by: x + by * d, parameters, direction)) for by in (step, -step)
    )
    difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    found, expected = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (change, difference))
    assert jnp.linalg.norm(found - expected) < 0.02 * jnp.linalg.norm(found)
