"""Meshes, and the layouts of arrays on them."""

import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from crescendo.models import ModelConfig, logical_axes
from crescendo.models import axes as names
from crescendo.models.layout import ONE_DEVICE
from crescendo.parallel import STRATEGIES, Layout, MeshSpec, make_mesh, strategy
from crescendo.parallel.mesh import AXES, slow_factors
from crescendo.parallel.rules import ACTIVATIONS

DEBUG = ModelConfig.preset("debug").for_platform("cpu")


def above_one(mesh) -> dict[str, int]:
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def test_minus_one_takes_the_rest():
    assert above_one(make_mesh(data=-1, fsdp=2)) == {"data": 4, "fsdp": 2}
    assert above_one(make_mesh(data=1, fsdp=-1)) == {"fsdp": 8}
    assert above_one(make_mesh(data=2, tensor=2, sequence=-1)) == {"data": 2, "sequence": 2, "tensor": 2}
    assert set(make_mesh().shape) == set(AXES)
    # Where all links are alike, in the order of the devices: XLA wants no other for a GPU.
    assert make_mesh(stage=2, data=2, tensor=2).devices.ravel().tolist() == jax.devices()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data = 3, fsdp = 1 does not cover the 8 devices: their product must be 8"),
        ({"data": 4, "fsdp": 4}, "data = 4, fsdp = 4 does not cover the 8 devices"),
        ({"tensor": 3}, "tensor = 3 does not cover the 8 devices: 3 must divide 8"),
        ({"fsdp": -1}, "one of them may be -1"),
        ({"data": 0, "fsdp": 8}, "data = 0 must be .*at least 1"),
        ({"sequence": -2}, "sequence = -2 must be .*at least 1"),
    ],
)
def test_a_mesh_that_does_not_cover_the_devices_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def fake_devices(hosts: int, on_each: int) -> list:
    numbers = np.random.default_rng(0).permutation(hosts * on_each)  # in no order
    return [types.SimpleNamespace(id=i, process_index=i // on_each, platform="gpu") for i in numbers.tolist()]


@given(st.data())
def test_slow_links_are_crossed_by_the_fewest_axes(data):
    sizes = {axis: 2 ** data.draw(st.integers(0, 3)) for axis in AXES}
    groups = 2 ** data.draw(st.integers(0, sum(n.bit_length() - 1 for n in sizes.values())))
    factors = dict(zip(AXES, slow_factors(sizes, groups), strict=True))
    assert math.prod(factors.values()) == groups
    assert all(sizes[axis] % n == 0 for axis, n in factors.items())
    if groups <= sizes["data"]:
        assert factors["data"] == groups


def test_a_host_keeps_the_fast_axes_to_itself(monkeypatch):
    made = []
    monkeypatch.setattr("crescendo.parallel.mesh._mesh", lambda devices: made.append(devices))
    MeshSpec(data=4, fsdp=2, tensor=4).make(fake_devices(hosts=4, on_each=8))
    hosts = np.vectorize(lambda d: d.process_index)(made[0])
    for replica in range(4):
        assert len(set(hosts[:, replica].ravel())) == 1
    # Where data alone is too small, fsdp crosses hosts too, tensor still does not.
    MeshSpec(data=2, fsdp=4, tensor=4).make(fake_devices(hosts=4, on_each=8))
    hosts = np.vectorize(lambda d: d.process_index)(made[1])
    assert all(len(set(along.ravel())) == 1 for along in hosts.reshape(-1, 4))


def test_rules_name_axes_that_exist():
    for table in (ACTIVATIONS, *(t for s in STRATEGIES.values() for t in (s.parameters, s.gradients, s.optimizer))):
        assert set(table) <= set(names.ALL)
        assert all(axis in AXES for axes in table.values() for axis in axes)
    used = jax.tree.leaves(logical_axes(DEBUG))
    assert set(used) <= set(names.ALL)
    assert len(names.ALL) <= 18


@pytest.mark.parametrize(("name", "split"), [("data", ""), ("zero1", "o"), ("zero2", "go"), ("fsdp", "pgo")])
def test_what_each_strategy_splits(name, split):
    layout, axes = Layout(make_mesh(data=2, fsdp=4), name), logical_axes(DEBUG)
    for letter, shardings in (
        ("p", layout.parameters(axes)),
        ("g", layout.gradients(axes)),
        ("o", layout.optimizer(axes)),
    ):
        matrices = [s for s in jax.tree.leaves(shardings["blocks"]["mlp"])]
        assert all(s.is_fully_replicated == (letter not in split) for s in matrices)


def test_tensor_parallel_splits_columns_then_rows():
    layout = Layout(make_mesh(data=4, tensor=2), "data")
    specs = jax.tree.map(lambda s: s.spec, layout.parameters(logical_axes(DEBUG)))
    assert specs["blocks"]["mlp"]["up"]["kernel"] == PartitionSpec("stage", None, "tensor")
    assert specs["blocks"]["mlp"]["down"]["kernel"] == PartitionSpec("stage", "tensor", None)
    assert specs["embedding"]["table"] == PartitionSpec(("stage", "tensor"), None)


def test_a_batch_is_split_by_examples_and_tokens():
    layout = Layout(make_mesh(data=2, fsdp=2, sequence=2))
    array = jax.device_put(np.zeros((3, 8, 6)), layout.rows(("length",), leading=1))
    assert {shard.data.shape for shard in array.addressable_shards} == {(3, 2, 3)}


def test_rows_of_any_shape_are_split_by_examples():
    layout = Layout(make_mesh(data=2, fsdp=2, sequence=2))
    assert layout.rows(()).shard_shape((8,)) == (2,)  # labels
    assert layout.rows((None, None, None)).shard_shape((8, 28, 28, 3)) == (2, 28, 28, 3)  # pictures
    assert layout.rows(("length", None)).shard_shape((8, 6, 2)) == (2, 3, 2)


@pytest.mark.parametrize(("sizes", "ulysses"), [({"sequence": 4}, 1), ({"sequence": 4, "fsdp": 2}, 2), ({}, 1)])
def test_what_is_drawn_for_tokens_follows_them_into_the_order_of_rows(sizes, ulysses):
    layout = Layout(make_mesh(**{"data": -1} | sizes), strategy(ulysses=ulysses))
    natural = np.random.default_rng(0).normal(size=(8, 32, 3)).astype(np.float32)
    order = layout.order(32)
    expected = natural if order is None else natural[:, order]
    moved = jax.jit(layout.in_row_order, out_shardings=layout.rows(("length", None)))(natural)
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(layout.in_row_order(natural.T, axis=-2), expected.T)
    np.testing.assert_array_equal(ONE_DEVICE.in_row_order(natural), natural)
    # Inside of what is done part by part too, where some of the mesh's axes are manual.
    manual = jax.shard_map(
        layout.in_row_order,
        mesh=layout.mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(manual)(natural), expected)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "tensor": 4}, {"data": 4, "tensor": 2}])
def test_tokens_outside_of_the_table_have_zeros_on_every_layout(sizes):
    random = np.random.default_rng(0)
    table = jnp.float32(random.normal(size=(16, 4)))
    tokens = jnp.asarray(random.integers(0, 16, (8, 8)), jnp.int32).at[0, :4].set(jnp.array([16, -1, 1000, -100]))
    inside = (tokens >= 0) & (tokens < 16)
    cotangent = jnp.float32(random.normal(size=(8, 8, 4)))

    def run(layout):
        rows, pull = jax.vjp(jax.jit(lambda table: layout.look_up(table, tokens, jnp.float32)), table)
        return rows, pull(cotangent)[0]

    rows, gradient = run(Layout(make_mesh(**sizes)))
    np.testing.assert_array_equal(rows, np.where(inside[..., None], table[np.where(inside, tokens, 0)], 0))
    expected = np.zeros((16, 4))
    np.add.at(expected, tokens[inside], np.float64(cotangent[inside]))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    for result, array in zip(run(ONE_DEVICE), (rows, gradient), strict=True):
        np.testing.assert_allclose(result, array, rtol=1e-5, atol=1e-5)


def test_a_result_that_devices_do_not_share_is_not_taken_for_one_that_they_do():
    layout = Layout(MeshSpec(data=2).abstract(2))
    split, shared = ("batch", None), (None, None)
    double = lambda outputs: lambda x: layout.on_parts(lambda x: 2 * x, (x,), (split,), outputs)  # noqa: E731
    assert jax.eval_shape(double(split), jnp.ones((4, 2))).shape == (4, 2)
    with pytest.raises(ValueError, match=r"out_specs is P\(None, None\)"):
        jax.eval_shape(double(shared), jnp.ones((4, 2)))


def test_an_expert_axis_is_refused_for_a_model_without_experts():
    layout = Layout(make_mesh(data=2, fsdp=4))
    assert layout.with_experts(None) is layout
    with pytest.raises(
        ValueError, match=r"^mesh expert = 2: this model has no experts, and would .*: use expert = 1, "
    ):
        Layout(make_mesh(data=1, fsdp=4, expert=2)).with_experts(None)


# A mesh axis can split one dimension only.
NAMED = st.lists(st.tuples(st.sampled_from(("layers", "embed", "mlp")), st.integers(1, 4)), max_size=4)


@given(named=NAMED, data=st.data())
def test_an_optimizer_array_of_any_shape_has_a_place(named, data):
    layout = Layout(MeshSpec(data=1, fsdp=4, tensor=2).abstract(8))
    named = list(dict(named).items())
    axes, shape = tuple(name for name, _ in named), tuple(8 * n for _, n in named)
    table = layout.strategy.optimizer
    whole = layout.like_parameter(table, axes, shape, shape)
    assert whole == layout.optimizer({"w": axes})["w"]
    kept = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True).map(sorted) if shape else st.just([]))
    found = layout.like_parameter(table, axes, shape, tuple(shape[i] for i in kept))
    if len(set(shape)) == len(shape):  # which dimension is meant is then clear
        assert list(found.spec) == [whole.spec[i] for i in kept]
    other = tuple(data.draw(st.lists(st.integers(1, 40), max_size=4)))
    found = layout.like_parameter(table, axes, shape, other)
    assert len(found.spec) == len(other)
    found.shard_shape(other)  # raises where the mesh doesn't divide it
    assert all(size in shape for size, entry in zip(other, found.spec, strict=True) if entry is not None)


@pytest.mark.parametrize(
    ("sizes", "plan", "message"),
    [
        ({"sequence": 4}, strategy(ulysses=3), "ulysses = 3 does not divide the mesh's sequence = 4: use one of"),
        ({}, "zero", "name = 'zero' must be one of data, zero1, zero2, fsdp"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(sizes, plan, message):
    with pytest.raises(ValueError, match=message):
        Layout(make_mesh(**sizes), plan)


def test_rows_and_heads_that_the_mesh_cannot_divide_are_refused():
    layout = Layout(make_mesh(data=1, tensor=2, sequence=4))
    with pytest.raises(ValueError, match=r"sequence_length = 100 does not divide .* multiple of 8, such as 96 or 104"):
        layout.order(100)
    layout = Layout(make_mesh(data=1, sequence=8), strategy(ulysses=8))
    with pytest.raises(
        ValueError, match=r"ulysses = 8 can't split the 4 query and 2 key heads .* use one of \[1, 2, 4\]"
    ):
        layout.with_heads(4, 2)
    layout = Layout(make_mesh(data=1, tensor=8))
    with pytest.raises(
        ValueError,
        match=r"^neither of kv_heads = 3 and tensor = 8 divides the other: use a tensor of 1, 3, 6, 12 or 24$",
    ):
        layout.with_heads(24, 3)
    with pytest.raises(
        ValueError, match=r"^heads = 12 does not divide over tensor = 8: use a tensor of 1, 2, 4 or 12$"
    ):
        layout.with_heads(12, 4)


@given(
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from(list(STRATEGIES)),
    st.sampled_from([1, 2]),
)
def test_each_device_has_the_key_head_of_its_queries(tensor, kv_heads, group, plan, ulysses):
    layout = Layout(MeshSpec(data=1, tensor=tensor, sequence=2).abstract(2 * tensor), strategy(plan, ulysses=ulysses))
    heads = kv_heads * group
    possible = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    if tensor not in possible:
        with pytest.raises(ValueError, match=r"^[^\n]* tensor = \d+[^\n]*: use a tensor of [^\n]*$") as error:
            layout.with_heads(heads, kv_heads)
        assert [int(n) for n in re.findall(r"\d+", str(error.value).split(": use ")[1])] == possible
        return
    if heads // tensor % ulysses or (ulysses == 2 and kv_heads > tensor and kv_heads // tensor % 2):
        with pytest.raises(ValueError, match=r"^ulysses = 2 can't split the \d+ query and \d+ key heads of a device"):
            layout.with_heads(heads, kv_heads)
        return
    found = layout.with_heads(heads, kv_heads)
    assert found.with_heads(heads, kv_heads) is found
    assert (found is layout) == (tensor <= kv_heads)
    keys = np.repeat(np.arange(kv_heads), found.key_copies).reshape(tensor, -1)
    queries = np.arange(heads).reshape(tensor, -1) // group
    for of_keys, of_queries in zip(keys, queries, strict=True):
        repeated = np.repeat(of_keys, queries.shape[1] // keys.shape[1])
        np.testing.assert_array_equal(repeated, of_queries)
    for table in (found.strategy.parameters, found.strategy.gradients, found.strategy.optimizer):
        assert ("kv_heads" in table) == (tensor <= kv_heads)
