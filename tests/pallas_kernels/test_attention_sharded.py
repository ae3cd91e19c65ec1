"""Attention under a mesh of eight devices, `vmap` and `remat`: equal to one device's, and nothing is gathered.

Kernels that XLA can't split go through `sharded`; here the chunked implementation stands in for them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from crescendo.pallas_kernels.attention import attention, checking, xla
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


def call_of(bias_shape, **options):
    """A packed causal call, its cotangents, and everything about it in float64."""
    packed = spec("packed", (4, 24, 24, 4, 2, 16), mean_tokens=9, bias_shape=bias_shape, causal=True, **options)
    given, cotangents = checking.case(packed, 0, jnp.float32), checking.cotangents(packed, 0)
    return given, cotangents, checking.exactly(given)(cotangents)


def check(results, exact):
    for name, result in results.items():
        assert checking.error(result, exact[name]) < 2e-5, name


@pytest.mark.parametrize("bias", QUICK_BIASES)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharded_by_batch_and_heads_nothing_is_gathered(kind, bias, who, quick_compilation):
    bias_shape, of_bias = BIASES[bias]
    given, cotangents, exact = call_of(bias_shape, soft_cap=5.0)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    places = {name: of_bias if name == "bias" else HEADS for name in given.arrays}, P("data"), (HEADS, HEADS)
    places = jax.tree.map(lambda place: NamedSharding(mesh, place), places, is_leaf=lambda x: isinstance(x, P))
    run = jax.jit(functools.partial(checking.everything, "xla", given.options))
    with jax.set_mesh(mesh):
        arguments = jax.device_put((given.arrays, given.metadata["segment_ids"], cotangents), places)
        arguments = arguments[0], {"segment_ids": arguments[1]}, arguments[2]
        compiled = run.lower(*arguments).compile()
        results = compiled(*arguments)
    check(results, exact)
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    for name in ("out", "dq", "dk", "dv"):
        assert tuple(results[name].sharding.spec)[:3] == ("data", None, "model")


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_heads_alone_and_heads_that_all_share_a_key_head(kv_heads, monkeypatch, quick_compilation):
    pair = Kernels(xla.forward, backward, adds_out=True)
    monkeypatch.setattr(xla, "attention", lambda config, operands: pair)
    packed = spec("packed", (4, 24, 24, 4, kv_heads, 16), mean_tokens=9, causal=True)
    given, cotangents = checking.case(packed, 0, jnp.float32), checking.cotangents(packed, 0)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    where = {name: P("data", None, "model" if array.shape[2] > 1 else None) for name, array in given.arrays.items()}
    arrays = {name: jax.device_put(array, NamedSharding(mesh, where[name])) for name, array in given.arrays.items()}
    run = jax.jit(functools.partial(checking.everything, "xla", given.options))
    check(run(arrays, given.metadata, cotangents), checking.exactly(given)(cotangents))


@pytest.mark.parametrize("bias", ["of-heads", pytest.param("none", marks=pytest.mark.slow)])
def test_inside_shard_map(bias, who, quick_compilation):
    bias_shape, of_bias = BIASES[bias]
    given, cotangents, exact = call_of(bias_shape)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    arrays = {name: of_bias if name == "bias" else HEADS for name in given.arrays}
    results = {"out": HEADS, "lse": HEADS, "seen": HEADS} | {f"d{name}": place for name, place in arrays.items()}

    def part(*arguments):
        found = checking.everything("xla", given.options, *arguments)
        if bias_shape:
            found["dbias"] = jax.lax.psum(found["dbias"], "data")
        return found

    specs = {"in_specs": (arrays, P("data"), (HEADS, HEADS)), "out_specs": results}
    run = jax.jit(jax.shard_map(part, mesh=mesh, check_vma=False, **specs))
    check(run(given.arrays, given.metadata, cotangents), exact)


@pytest.mark.parametrize("bias", QUICK_BIASES)
def test_under_vmap_and_remat(bias, who, quick_compilation):
    """Rows mapped one by one; a bias that all share is mapped over nothing."""
    given, cotangents, exact = call_of(BIASES[bias][0])
    rows = {name: array if len(array) == 1 else array[:, None] for name, array in given.arrays.items()}
    axes = {name: None if array.ndim == 4 else 0 for name, array in rows.items()}

    def total(arrays):
        def one(arrays, segment_ids, dout, dlse):
            out, lse = attention(
                **arrays, segment_ids=segment_ids, **given.options, return_lse=True, implementation="xla"
            )
            return (out * dout).sum() + (lse * dlse).sum()

        segment_ids = given.metadata["segment_ids"][:, None]
        mapped = jax.vmap(jax.checkpoint(one), (axes, 0, 0, 0))
        return mapped(arrays, segment_ids, *(array[:, None] for array in cotangents)).sum()

    gradients = jax.jit(jax.grad(total))(rows)
    check({f"d{name}": gradient.reshape(given.arrays[name].shape) for name, gradient in gradients.items()}, exact)


def test_a_shared_bias_that_vmap_maps(who, quick_compilation):
    """Calls that differ in a bias which all their rows share run one after the other."""
    given, _, _ = call_of((1, 4, 24, 24))
    biases = jnp.stack([given.arrays.pop("bias"), jnp.zeros((1, 4, 24, 24))])

    def total(bias):
        out = attention(**given.arrays, **given.metadata, **given.options, bias=bias, implementation="xla")
        return jnp.square(out).sum()

    mapped = jax.jit(jax.vmap(jax.value_and_grad(total)))(biases)
    for i, bias in enumerate(biases):
        value, gradient = jax.value_and_grad(total)(bias)
        np.testing.assert_allclose(mapped[0][i], value, rtol=1e-5)
        assert checking.error(mapped[1][i], gradient) < 2e-5


@pytest.mark.parametrize("of", ["out", "lse"])
def test_only_one_of_the_two_results_has_a_gradient(of, who, quick_compilation):
    given, cotangents, _ = call_of(None)
    both = dict(zip(("out", "lse"), cotangents, strict=True))
    zeros = {name: jnp.zeros_like(array) for name, array in both.items()}
    exact = checking.exactly(given)(tuple((zeros | {of: both[of]}).values()))

    def total(arrays):
        results = attention(**arrays, **given.metadata, **given.options, return_lse=True, implementation="xla")
        return (dict(zip(("out", "lse"), results, strict=True))[of] * both[of]).sum()

    gradients = jax.jit(jax.grad(total))(given.arrays)
    check({f"d{name}": gradient for name, gradient in gradients.items()}, exact)
