"""Rows sent to the devices that have their experts, and back, against all experts in one place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crescendo.models import ModelConfig
from crescendo.models.layout import ONE_DEVICE
from crescendo.models.moe import Moe
from crescendo.parallel import Layout, make_mesh, strategy
from crescendo.parallel.experts import Exchange

P, EXPERTS, ROWS, WIDTH = 4, 8, 12, 3
LOADS = {
    "random": None,
    "all to one": np.array([[0] * 7 + [12]] * 4),
    "one device has none": np.array([[0] * 8, [12] + [0] * 7, [0, 3, 0, 3, 0, 3, 0, 3], [1, 2, 1, 2, 1, 2, 1, 2]]),
    "rows of no expert": np.array([[0, 0, 1, 0, 4, 0, 0, 2]] * 4),
}


@pytest.fixture(autouse=True, scope="module")
def _quick(quick_compilation):
    """What is checked is arithmetic."""


SLOW = ("all to one", "one device has none")


def on_devices(most, sizes_PX, rows_PMD, weights_X):
    """Each expert multiplies its rows by a number of its own, and rows of none by NaN; sums of sines, for gradients."""

    def of_experts(weights_X, rows_RD, sizes_X):
        expert_R = jnp.sum(jnp.arange(len(rows_RD))[:, None] >= jnp.cumsum(sizes_X), axis=1)
        return jnp.where(
            (expert_R < len(sizes_X))[:, None], rows_RD * weights_X.at[expert_R].get(mode="clip")[:, None], 0
        )

    def local(sizes_PX, rows_PMD, weights_X):
        return Exchange(P)(functools.partial(of_experts, weights_X), rows_PMD[0], sizes_PX[0], most)[None]

    mesh = make_mesh(data=1, expert=P, devices=jax.devices()[:P])
    each = jax.P("expert")
    send = jax.shard_map(local, mesh=mesh, in_specs=(each, each, each), out_specs=each)
    return send(sizes_PX, rows_PMD, weights_X)


@pytest.mark.parametrize(
    "load", ["random", "rows of no expert", *(pytest.param(load, marks=pytest.mark.slow) for load in SLOW)]
)
def test_rows_come_back_from_their_experts(load):
    random = np.random.default_rng(0)
    sizes = LOADS[load]
    if sizes is None:
        sizes = random.multinomial(ROWS, np.ones(EXPERTS) / EXPERTS, size=P)
    rows, weights = random.normal(size=(P, ROWS, WIDTH)), random.normal(size=EXPERTS)
    sizes, rows, weights = (
        jnp.asarray(sizes, jnp.int32),
        jnp.asarray(rows, jnp.float32),
        jnp.asarray(weights, jnp.float32),
    )
    of_row = np.stack([np.repeat([*weights, 0.0], [*each, ROWS - each.sum()]) for each in np.asarray(sizes)])[..., None]
    most = int(sizes.max()) if load == "random" else None

    def total(rows, weights):
        return jnp.sum(jnp.sin(on_devices(most, sizes, rows, weights)))

    np.testing.assert_allclose(
        jax.jit(functools.partial(on_devices, most))(sizes, rows, weights), rows * of_row, rtol=1e-6
    )
    of_rows, of_weights = jax.jit(jax.grad(total, argnums=(0, 1)))(rows, weights)
    cosine = np.cos(rows * of_row)
    np.testing.assert_allclose(of_rows, cosine * of_row, rtol=1e-5, atol=1e-6)
    by_row = np.sum(cosine * rows, axis=-1)
    expected = np.zeros(EXPERTS)
    for each, values in zip(np.asarray(sizes), by_row, strict=True):
        np.add.at(expected, np.repeat(np.arange(EXPERTS), each), values[: each.sum()])
    np.testing.assert_allclose(of_weights, expected, rtol=1e-5, atol=1e-5)


CONFIG = ModelConfig(
    vocab_size=50, width=16, layers=2, heads=2, mlp_width=8, experts=4, experts_per_token=2, shared_expert_width=8
).for_platform("cpu")


@functools.cache
def of_layer(layout):
    """What a layer adds and says, and the gradients of sums of these, of rows with some padding."""
    made = Moe(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    structure, rest = nnx.split(made)
    x_BTD = jax.random.normal(jax.random.key(1), (8, 12, CONFIG.width))
    counted_BT = jax.random.uniform(jax.random.key(2), (8, 12)) < 0.8

    @jax.jit
    def total(rest, x_BTD):
        y_BTD, said = nnx.merge(structure, rest)(x_BTD, layout, counted_BT=counted_BT)
        return jnp.sum(jnp.sin(y_BTD)) + jnp.sum(said["balance_loss"]) + jnp.sum(said["router_z_loss"]), (y_BTD, said)

    (value, made_of_it), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(rest, x_BTD)
    return jax.device_get((value, made_of_it, jax.tree.map(lambda x: x, gradients)))


@pytest.mark.parametrize(
    ("axes", "plan"),
    [
        ({"data": 1, "expert": 2, "fsdp": 2, "tensor": 2}, "fsdp"),
        pytest.param({"data": 2, "expert": 4}, "data", marks=pytest.mark.slow),
        pytest.param({"data": 1, "expert": 2, "sequence": 2, "fsdp": 2}, "zero2", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_layer_over_devices_is_the_layer_on_one(axes, plan):
    ours, expected = of_layer(Layout(make_mesh(**axes), strategy(plan))), of_layer(ONE_DEVICE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, expected)


def test_experts_that_the_axis_cannot_divide_are_refused_with_those_that_can():
    layout = Layout(make_mesh(data=2, expert=4))
    message = "^experts = 6 does not divide over expert = 4: use an expert of 1, 2, 3 or 6, or experts = 4 or 8$"
    with pytest.raises(ValueError, match=message):
        layout.with_experts(6)
    assert layout.with_experts(8) is layout
