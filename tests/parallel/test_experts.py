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
        exchange = Exchange(("expert",), P)
        return exchange(functools.partial(of_experts, weights_X), rows_PMD, sizes_PX, most)[0][None]

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
    check_layer(Layout(make_mesh(**axes), plan))


FOLDED = [  # mesh, strategy, over which axes the experts are split
    ({"data": 2, "sequence": 2, "tensor": 2}, "fsdp", ("sequence", "tensor")),
    ({"expert": 2, "fsdp": 2, "tensor": 2}, "zero1", ("tensor", "expert")),
    ({"fsdp": 2, "sequence": 2, "tensor": 2}, "zero1", ("fsdp", "sequence")),
]


@pytest.mark.parametrize(
    ("axes", "plan", "over"),
    [FOLDED[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in FOLDED[1:])],
    ids=str,
)
def test_a_layer_whose_experts_are_split_along_attentions_axes_is_the_layer_on_one(axes, plan, over):
    check_layer(Layout(make_mesh(**{"data": 1} | axes), strategy(plan, experts=over)))


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [2, 3, 6])
@pytest.mark.parametrize("over", [("expert",), ("expert", "tensor")], ids=str)
def test_a_layer_whose_tokens_are_sent_in_chunks_is_the_layer_on_one(over, chunks):
    mesh = make_mesh(data=1, expert=2, fsdp=2, tensor=2)
    check_layer(Layout(mesh, strategy("zero1", experts=over, expert_chunks=chunks)))


def check_layer(layout):
    ours, expected = of_layer(layout), of_layer(ONE_DEVICE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, expected)


def test_experts_that_the_axis_cannot_divide_are_refused_with_those_that_can():
    layout = Layout(make_mesh(data=2, expert=4))
    message = "^experts = 6 does not divide over expert = 4: use an expert of 1, 2, 3 or 6, or experts = 4 or 8$"
    with pytest.raises(ValueError, match=message):
        layout.with_experts(6)
    assert layout.with_experts(8) is layout


@pytest.mark.parametrize(
    ("axes", "settings", "experts", "message"),
    [
        (
            {"sequence": 2, "tensor": 4},
            {"experts": ("sequence", "tensor")},
            12,
            "^experts = 12 does not divide over sequence = 2 x tensor = 4: use a sequence x tensor of 1, 2, 3, 4, 6 or "
            "12, or experts = 8 or 16$",
        ),
        (
            {"expert": 2, "tensor": 4},
            {"experts": ("tensor",)},
            8,
            "^mesh expert = 2, and strategy.experts = tensor doesn't name it: name it too, or use fsdp in its place$",
        ),
        ({"tensor": 8}, {"experts": ("tensor",)}, None, "^strategy.experts = tensor: this model has no experts: leave"),
        (
            {"tensor": 8},
            {"expert_chunks": 2},
            8,
            "^strategy.expert_chunks = 2 cuts what is sent .* sends nothing: use 1",
        ),
        ({"tensor": 8}, {"expert_chunks": 2}, None, "^strategy.expert_chunks = 2: this model has no experts: leave"),
        ({"expert": 2, "tensor": 4}, {"experts": ()}, 8, r"^mesh expert = 2, and strategy.experts = \[\] doesn't name"),
    ],
)
def test_a_table_of_experts_that_a_mesh_or_a_model_has_no_use_for_is_refused(axes, settings, experts, message):
    layout = Layout(make_mesh(**{"data": 1} | axes), strategy(**settings))
    with pytest.raises(ValueError, match=message):
        layout.with_experts(experts)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            ("tensor", "data"),
            "tensor, data: the mesh axis data holds replicas, .*: use mesh expert in place of data; ex",
        ),
        (("stage",), "stage: the mesh axis stage splits layers, .*split along fsdp, expert, sequence or tensor$"),
        (("model",), r"\(.model.,\) must each be one of stage, data, fsdp"),
        ("tensor", "t.* fsdp, expert, sequence"),
    ],
)
def test_axes_along_which_experts_cannot_be_split_are_refused(axes, message):
    with pytest.raises(ValueError, match=f"experts = {message}"):
        strategy(experts=axes)


def test_optimizers_that_ask_for_second_derivatives_have_none_along_axes_that_split_experts():
    layout = Layout(make_mesh(data=4, tensor=2), strategy(experts=("tensor",)))
    with pytest.raises(
        ValueError,
        match=r"^mesh tensor = 2: rows .* no second derivatives, .*: use tensor = 1, or strategy.experts wit",
    ):
        layout.for_second_derivatives()


def test_rows_are_as_long_as_their_chunks_need():
    layout = Layout(make_mesh(data=1, sequence=2, tensor=4), strategy(experts=("tensor",), expert_chunks=4))
    with pytest.raises(ValueError, match=r"^sequence_length = 40 .* and strategy.expert_chunks = 4: .*32 or 64$"):
        layout.order(40)
