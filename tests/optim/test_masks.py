"""Layers in a stack are told apart: by masks, by trust ratios, by Muon; and dtypes are kept."""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from crescendo import optim
from crescendo.optim import masks
from crescendo.optim.muon import matrix_dimensions
from crescendo.optim.noise_scale import group_indices


def ones(*shape):
    return jnp.ones(shape)


PARAMS = {
    "blocks": {
        "attention": {
            "query": {"kernel": ones(3, 4, 2, 2), "bias": ones(3, 2, 2)},
            "query_norm": {"scale": ones(3, 2)},
        },
        "mlp": {"kernel": ones(3, 4, 5), "bias": ones(3, 5)},
    },
    "embedding": {"table": ones(7, 4)},
    "final_norm": {"weight": ones(2, 2)},
    "temperature": ones(),
}


def by_path(tree):
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_default_mask():
    """Names and the rank per layer decide."""
    marked = [path for path, mark in by_path(masks.is_matrix(PARAMS)).items() if mark]
    assert marked == ["blocks/attention/query/kernel", "blocks/mlp/kernel", "embedding/table"]


STATE = nnx.State(jax.tree.map(nnx.Param, PARAMS))
BOXED = jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), PARAMS)


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def complaint(tree):
    with pytest.raises(ValueError, match="is complex64") as refused:
        optim.sophia(0.1).init(jax.tree.map(lambda x: x.astype(jnp.complex64), tree))
    return str(refused.value)


RULES = {
    "is_matrix": lambda tree: leaves(masks.is_matrix(tree)),
    "layer_axes": masks.layer_axes,
    "muon": lambda tree: leaves(matrix_dimensions(tree)),
    "groups of the noise scale": lambda tree: [group_indices(tree, by) for by in ("parameter", "layer")],
    "trust ratios": lambda tree: list(optim.trust_ratios(optim.scale_by_layer_trust_ratio().init(tree), tree)),
    "parameter groups": lambda tree: leaves(optim.frozen_mask([optim.group("*/query/bias", frozen=True)], tree)),
    "groups by axis": lambda tree: leaves(
        optim.frozen_mask(
            [optim.group(axis="2", frozen=True)], tree, jax.tree.map(lambda x: tuple("012"[: x.ndim]), tree)
        )
    ),
    "who is complex": complaint,
}


@pytest.mark.parametrize("tree", [STATE, BOXED], ids=["nnx.State", "linen boxes"])
@pytest.mark.parametrize("rule", RULES)
def test_what_holds_an_array_has_no_name_of_its_own(rule, tree):
    """Names decide alike in dicts and in the trees of flax, whose paths end in `value`."""
    assert RULES[rule](tree) == RULES[rule](PARAMS)


def test_a_field_named_value_beside_others_is_a_name():
    class Projections(NamedTuple):
        key: jax.Array
        value: jax.Array

    assert [path for path, _ in masks.leaves_with_paths(Projections(ones(), ones()))] == [("key",), ("value",)]


@pytest.mark.parametrize("make", [optim.muon, optim.adamw, optim.lamb], ids=["muon", "adamw", "lamb"])
def test_the_state_of_an_nnx_model_moves_like_its_parameters(make):
    """By itself, and by `nnx.Optimizer`; biases of shape [heads, size] don't decay."""
    model = nnx.LinearGeneral(4, (2, 3), bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    plain = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model)))
    grads = jax.tree.map(lambda x: x.at[0].multiply(2.0), plain)
    optimizer = make(0.1, weight_decay=0.5)
    updates, _ = optimizer.update(grads, optimizer.init(plain), plain)
    params, state = nnx.state(model), nnx.state(model)
    nnx.replace_by_pure_dict(state, grads)
    close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-6))
    close(nnx.to_pure_dict(optimizer.update(state, optimizer.init(params), params)[0]), updates)
    nnx.Optimizer(model, optimizer, wrt=nnx.Param).update(model, state)
    close(nnx.to_pure_dict(nnx.state(model)), optax.apply_updates(plain, updates))


@pytest.mark.parametrize("names", ["0", "layer_0"])
def test_a_list_of_layers_is_not_a_stack(names):
    """`blocks` that holds layers by number isn't stacked; by other names it is."""
    axes = masks.layer_axes({"blocks": {names: {"kernel": ones(3, 4)}}})
    assert axes == [None if names == "0" else 0]
    assert masks.layer_axes({"blocks": [{"kernel": ones(3, 4)}]}) == [None]


@pytest.mark.parametrize(
    "layer_axis", [1, {"a": 1, "b": 1}, {"a": {"kernel": 1}, "b": 1}, lambda path: 1 if path[-1] == "kernel" else None]
)
def test_layer_axis_can_be_given(layer_axis):
    """As a number, a prefix of the parameters, or a function of the path."""
    params = {"a": {"kernel": ones(4, 3, 5)}, "b": {"kernel": ones(4, 3)}}
    assert masks.layer_axes(params, layer_axis) == [1, 1]
    assert masks.is_matrix(params, layer_axis) == {"a": {"kernel": True}, "b": {"kernel": False}}


def test_layer_axis_out_of_range():
    with pytest.raises(ValueError, match=r"layer_axis 2 of head is not an axis of its shape \(4, 3\)"):
        optim.lamb(0.1, layer_axis={"head": 2}).init({"head": ones(4, 3)})


def test_masks_as_prefix_function_and_constant():
    prefix = {"a": True, "b": {"c": False, "d": True}}
    params = {"a": {"x": ones(1), "y": ones(2)}, "b": {"c": ones(1), "d": [ones(1)]}}
    full = {"a": {"x": True, "y": True}, "b": {"c": False, "d": [True]}}
    assert masks.as_mask(prefix)(params) == masks.as_mask(lambda _: prefix)(params) == full
    assert all(jax.tree.leaves(masks.as_mask(True)(params)))


def test_decay_of_parts():
    """Under `mask` only those decay; the default leaves vectors alone, True doesn't."""
    zero = jax.tree.map(jnp.zeros_like, PARAMS)

    def decayed(**options):
        optimizer = optim.adamw(1.0, weight_decay=0.5, **options)
        step = jax.jit(lambda params: optimizer.update(zero, optimizer.init(params), params)[0])
        updates = jax.tree.map(np.asarray, by_path(step(PARAMS)))
        assert {x for u in updates.values() for x in u.flat} <= {0.0, -0.5}
        return {path for path, u in updates.items() if (u != 0).any()}

    assert decayed() == {"blocks/attention/query/kernel", "blocks/mlp/kernel", "embedding/table"}
    assert decayed(mask=True) == set(by_path(PARAMS))
    assert decayed(mask=lambda params: jax.tree.map(lambda x: x.ndim == 0, params)) == {"temperature"}


def test_trust_ratios_by_name():
    """One per layer of a stack; 1 where excluded, where a norm is 0, and in the limits of phi."""
    kernel = ones(3, 4, 4) * jnp.array([1.0, 0.0, 8.0])[:, None, None]
    params = {"blocks": {"kernel": kernel, "bias": ones(3, 2)}, "head": ones(2, 2), "still": ones(2, 2)}
    grads = jax.tree.map(jnp.ones_like, params) | {"still": jnp.zeros((2, 2))}

    def ratios(**options):
        transform = optax.chain(optax.identity(), optim.scale_by_layer_trust_ratio(**options))
        updates, state = jax.jit(transform.update)(grads, transform.init(params), params)
        found = optim.trust_ratios(state, params)
        np.testing.assert_allclose(updates["blocks"]["kernel"][:, 0, 0], found["blocks/kernel"])
        return {path: np.asarray(x).tolist() for path, x in found.items()}

    assert ratios() == {"blocks/bias": [1, 1, 1], "blocks/kernel": [1, 1, 8], "head": 1, "still": 1}
    assert ratios(phi_clip=(6.0, 16.0))["blocks/kernel"] == [1.5, 1, 4]
    assert ratios(phi_clip=(6.0, 16.0))["head"] == 3
    with pytest.raises(ValueError, match="holds no trust ratio"):
        optim.trust_ratios(optax.adam(0.1).init(params), params)
    with pytest.raises(ValueError, match=r"holds 8 trust ratios but the parameters have 1"):
        optim.trust_ratios(optim.scale_by_layer_trust_ratio().init(params), {"head": ones(2, 2)})


@pytest.mark.parametrize("transform", [optim.scale_by_layer_trust_ratio, optim.scale_by_lars])
def test_a_trust_ratio_needs_the_parameters(transform):
    with pytest.raises(ValueError, match="a trust ratio needs the parameters"):
        transform().update(PARAMS, transform().init(PARAMS))


@pytest.mark.parametrize("clip", [(2.0, 1.0), (-1.0, 1.0), (0.0, float("nan"))])
def test_bad_phi_clip(clip):
    with pytest.raises(
        ValueError, match=r"phi_clip must be \(lo, hi\) with 0 <= lo <= hi|phi_clip = .* must each be at least 0"
    ):
        optim.lamb(0.1, phi_clip=clip)


def test_muon_takes_layers_and_heads_apart():
    """A stack moves like its layers one by one, and heads are flattened on the right side."""
    rng = np.random.default_rng(0)
    shapes = {"query": (4, 2, 3), "output": (2, 3, 4)}
    stacked = {name: {"kernel": jnp.asarray(rng.standard_normal((2, *s)), jnp.float32)} for name, s in shapes.items()}
    flat = {
        f"{name}{i}": stacked[name]["kernel"][i].reshape((6, 4) if name == "output" else (4, 6))
        for name in shapes
        for i in range(2)
    }
    optimizer = optim.muon(0.1)

    @jax.jit
    def update(params):
        return optimizer.update(params, optimizer.init(params), params)[0]

    layered, single = update({"blocks": stacked})["blocks"], update(flat)
    for name in shapes:
        for i in range(2):
            a, b = layered[name]["kernel"][i], single[f"{name}{i}"]
            np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-4, atol=1e-6)  # five iterations in float32


@pytest.mark.parametrize(
    ("dtype", "moment_dtype"), [("bfloat16", None), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_moment_dtype(dtype, moment_dtype):
    """Every array that mirrors a parameter is stored so, in every optimizer; Lion's state is one such copy."""
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    for name, make in optim.OPTIMIZERS.items():
        takes_dtype = "moment_dtype" in inspect.signature(make).parameters
        optimizer = make(0.1, moment_dtype=moment_dtype) if takes_dtype else make(0.1)
        state = jax.eval_shape(optimizer.init, params)
        if not takes_dtype:  # only one that keeps nothing of a parameter's size may do without
            assert all(x.ndim == 0 for x in jax.tree.leaves(state)), name
            continue
        mirrors = optax.tree_map_params(optimizer, lambda x: x.dtype, state, transform_non_params=lambda x: None)
        assert set(jax.tree.leaves(mirrors)) == {jnp.dtype(moment_dtype or dtype)}, name
        if name == "lion":
            assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == sum(
                x.size for x in jax.tree.leaves(params) if x.ndim
            )


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_and_parameters_can_be_donated_together(name):
    """No array of a fresh state is a parameter itself."""
    params = {"head": ones(2, 2)}
    state = optim.OPTIMIZERS[name](0.1).init(params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(pointers)) == len(pointers)
