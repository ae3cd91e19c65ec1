"""Attention under a mesh of eight devices, `vmap` and `remat`: equal to one device's, and nothing is gathered.

Kernels that XLA can't split go through `sharded`; here the chunked implementation stands in for them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from crescendo.pallas_kernels import conformance
from crescendo.pallas_kernels.attention import attention, xla
from crescendo.pallas_kernels.attention.contract import Kernels
from crescendo.pallas_kernels.attention.specs import spec

HEADS = P("data", None, "model")
# Batch and heads are split, or broadcast, each alone; two query heads share a key head.
BIASES = {
    "none": (None, None),
    "whole": ((4, 4, 24, 24), P("data", "model")),
    "of-examples": ((4, 1, 1, 24), P("data")),
    "of-heads": ((1, 4, 24, 24), P(None, "model")),
}


QUICK_BIASES = [pytest.param(name, marks=() if name == "of-heads" else pytest.mark.slow) for name in BIASES]


def backward(config, operands, lse, dout, delta, out):
    """As kernels may: dout.out is added here, and the gradient of bias not summed over examples and key heads."""
    delta = jnp.einsum("bthd,bthd->bht", dout, out) + (0 if delta is None else delta)
    bias, (batch, _, _, heads, kv_heads, _) = operands.bias, operands.dims
    if bias is None:
        return xla.backward(config, operands, lse, dout, delta)
    wide = operands._replace(bias=jnp.broadcast_to(bias, (batch, heads, *bias.shape[2:])))
    *rest, dbias = xla.backward(config, wide, lse, dout, delta)
    if bias.shape[1] == 1:
        dbias = dbias.reshape(batch, kv_heads, -1, *bias.shape[2:]).sum(2)
    return *rest, dbias


@pytest.fixture(params=["xla", "kernels"])
def who(request, monkeypatch):
    """XLA's own partitioning, and that of kernels."""
    if request.param == "kernels":
        pair = Kernels(xla.forward, backward, adds_out=True)
        monkeypatch.setattr(xla, "attention", lambda config, operands: pair)
    return request.param


def packed(bias_shape=None, kv_heads=2, **options):
    """A causal call of packed rows, its cotangents, and everything about it in float64."""
    call = spec(
        "packed",
        (4, 24, 24, 4, kv_heads, 16),
        mean_tokens=9,
        bias_shape=bias_shape,
        causal=True,
        return_lse=True,
        **options,
    )
    given = conformance.call_of(attention, call, 0, "float32")
    return given, conformance.cotangents_for(attention, given, 0), conformance.exactly(attention, call, 0, "float32")


def everything(given):
    return conformance.everything(attention, "xla", given.rebuild)


def check(results, exact):
    for name, result in results.items():
        assert conformance.error(result, exact[name]) < 2e-5, name


def check_gradients(gradients, exact):
    check({f"gradient of {name}": gradient for name, gradient in gradients.items()}, exact)


@pytest.mark.parametrize("bias", QUICK_BIASES)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharded_by_batch_and_heads_nothing_is_gathered(kind, bias, who, quick_compilation):
    bias_shape, of_bias = BIASES[bias]
    given, cotangents, exact = packed(bias_shape, soft_cap=5.0)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    arrays = given.arrays
    where = {name: of_bias if name == "bias" else HEADS for name in arrays.floating}, {"segment_ids": P("data")}
    places = conformance.Arrays(*where), [HEADS, HEADS]
    places = jax.tree.map(lambda place: NamedSharding(mesh, place), places, is_leaf=lambda x: isinstance(x, P))
    with jax.set_mesh(mesh):
        arguments = jax.device_put((arrays, cotangents), places)
        compiled = jax.jit(everything(given)).lower(*arguments).compile()
        results = compiled(*arguments)
    check(results, exact)
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    for name in ("result 0", "gradient of q", "gradient of k", "gradient of v"):
        assert tuple(results[name].sharding.spec)[:3] == ("data", None, "model")


def test_arrays_that_lie_in_ways_of_their_own_under_an_explicit_mesh(quick_compilation):
    """They are laid out as q, and the gradients as what they are of."""
    given, cotangents, exact = packed()
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    where = {"q": HEADS, "k": P(None, "data"), "v": P(), "segment_ids[0]": P("model"), "segment_ids[1]": P("data")}
    where = {name: where.get(name, P("data")) for name in (*given.arrays.floating, *given.arrays.others)}

    def placed(arrays):
        return {name: jax.device_put(array, NamedSharding(mesh, where[name])) for name, array in arrays.items()}

    with jax.set_mesh(mesh):
        arrays = conformance.Arrays(*map(placed, given.arrays))
        results = jax.jit(everything(given))(arrays, jax.device_put(cotangents, NamedSharding(mesh, HEADS)))
    check(results, exact)
    for name in given.arrays.floating:
        assert results[f"gradient of {name}"].sharding.is_equivalent_to(NamedSharding(mesh, where[name]), 4)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_heads_alone_and_heads_that_all_share_a_key_head(kv_heads, monkeypatch, quick_compilation):
    pair = Kernels(xla.forward, backward, adds_out=True)
    monkeypatch.setattr(xla, "attention", lambda config, operands: pair)
    given, cotangents, exact = packed(kv_heads=kv_heads)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def placed(array):
        return jax.device_put(array, NamedSharding(mesh, P("data", None, "model" if array.shape[2] > 1 else None)))

    arrays = given.arrays._replace(floating=jax.tree.map(placed, given.arrays.floating))
    check(jax.jit(everything(given))(arrays, cotangents), exact)


@pytest.mark.parametrize("bias", ["of-heads", pytest.param("none", marks=pytest.mark.slow)])
def test_inside_shard_map(bias, who, quick_compilation):
    bias_shape, of_bias = BIASES[bias]
    given, cotangents, exact = packed(bias_shape)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    floating = {name: of_bias if name == "bias" else HEADS for name in given.arrays.floating}
    results = {"result 0": HEADS, "result 1": HEADS} | {f"gradient of {name}": at for name, at in floating.items()}

    def part(*arguments):
        found = everything(given)(*arguments)
        if bias_shape:
            found["gradient of bias"] = jax.lax.psum(found["gradient of bias"], "data")
        return found

    in_specs = conformance.Arrays(floating, {"segment_ids": P("data")}), [HEADS, HEADS]
    run = jax.jit(jax.shard_map(part, mesh=mesh, check_vma=False, in_specs=in_specs, out_specs=results))
    check(run(given.arrays, cotangents), exact)


@pytest.mark.parametrize("bias", QUICK_BIASES)
def test_under_vmap_and_remat(bias, who, quick_compilation):
    """Rows mapped one by one; a bias that all share is mapped over nothing."""
    given, cotangents, exact = packed(BIASES[bias][0])
    rows = {name: a if len(a) == 1 else a[:, None] for name, a in given.arrays.floating.items()}
    axes = {name: None if array.ndim == 4 else 0 for name, array in rows.items()}

    def total(arrays):
        def one(arrays, segment_ids, dout, dlse):
            out, lse = attention(**arrays, segment_ids=segment_ids, causal=True, return_lse=True, implementation="xla")
            return (out * dout).sum() + (lse * dlse).sum()

        segment_ids = given.arrays.others["segment_ids"][:, None]
        mapped = jax.vmap(jax.checkpoint(one), (axes, 0, 0, 0))
        return mapped(arrays, segment_ids, *(array[:, None] for array in cotangents)).sum()

    gradients = jax.jit(jax.grad(total))(rows)
    check_gradients({name: g.reshape(given.arrays.floating[name].shape) for name, g in gradients.items()}, exact)


def test_a_shared_bias_that_vmap_maps(who, quick_compilation):
    """Calls that differ in a bias which all their rows share run one after the other."""
    given, _, _ = packed((1, 4, 24, 24))
    arrays = given.arrays.floating
    biases = jnp.stack([arrays.pop("bias"), jnp.zeros((1, 4, 24, 24))])

    def total(bias):
        out = attention(**arrays, **given.arrays.others, causal=True, bias=bias, implementation="xla")
        return jnp.square(out).sum()

    mapped = jax.jit(jax.vmap(jax.value_and_grad(total)))(biases)
    for i, bias in enumerate(biases):
        value, gradient = jax.value_and_grad(total)(bias)
        np.testing.assert_allclose(mapped[0][i], value, rtol=1e-5)
        assert conformance.error(mapped[1][i], np.asarray(gradient)) < 2e-5


@pytest.mark.parametrize("of", [0, 1], ids=["out", "lse"])
def test_only_one_of_the_two_results_has_a_gradient(of, who, quick_compilation):
    given, cotangents, _ = packed()
    alone = [cotangent if i == of else 0 * cotangent for i, cotangent in enumerate(cotangents)]
    exact = conformance.in_float64(attention, given, alone)

    def total(floating):
        results = attention(**floating, **given.arrays.others, causal=True, return_lse=True, implementation="xla")
        return (results[of] * cotangents[of]).sum()

    check_gradients(jax.jit(jax.grad(total))(given.arrays.floating), exact)
