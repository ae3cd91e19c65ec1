"""Attention on an NVIDIA GPU: what serves, on fresh inputs, against float64 and beside cuDNN's error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.pallas_kernels.attention import attention
from crescendo.pallas_kernels.attention.specs import SPECS
from crescendo.pallas_kernels.op import explain

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
CHECKED = [spec for spec in SPECS if spec.tags & {"small", "awkward"}]
# bfloat16 keeps 8 bits: rounding the weights and the results alone costs about 2e-3.
TOLERANCE = 1e-2


def error(array, exact) -> float:
    array, exact = np.asarray(array, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(array - exact) / max(np.linalg.norm(exact), 1e-30))


def everything(implementation, arrays, kwargs, cotangents, return_lse=True):
    """Result, finite part of the log-sum-exp, and gradients."""

    def call(q, k, v):
        result = attention(q, k, v, **kwargs, return_lse=return_lse, implementation=implementation)
        return result if return_lse else (result, jnp.zeros(q.shape[:3]))

    (out, lse), pull = jax.vjp(call, *arrays)
    finite = jnp.isfinite(lse)
    dout, dlse = cotangents
    gradients = pull((dout.astype(out.dtype), jnp.where(finite, dlse, 0).astype(lse.dtype) * return_lse))
    return out, jnp.where(finite, lse, 0), *gradients


def draw(spec):
    """Fresh inputs at every run, and what is exact about them (computed in float64 on the host)."""
    arrays, kwargs = spec.inputs(int(np.random.default_rng().integers(2**31)))
    rng = np.random.default_rng()
    cotangents = rng.normal(size=arrays[0].shape), rng.normal(size=arrays[0].shape[:3])
    cotangents = tuple(jnp.asarray(c, jnp.bfloat16).astype(jnp.float32) for c in cotangents)
    return arrays, kwargs, cotangents


def exactly(arrays, kwargs, cotangents, return_lse=True):
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        doubles = [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]
        cotangents = tuple(jnp.asarray(np.asarray(c, np.float64)) for c in cotangents)
        kwargs = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, kwargs)
        results = jax.jit(functools.partial(everything, "reference", kwargs=kwargs, return_lse=return_lse))(
            doubles, cotangents=cotangents
        )
        return [np.asarray(result) for result in results]


def run(implementation, arrays, kwargs, cotangents, return_lse=True):
    compiled = jax.jit(functools.partial(everything, implementation, kwargs=kwargs, return_lse=return_lse))
    poison = [jnp.full(array.shape, jnp.nan, array.dtype) for array in (*arrays, *arrays)]
    del poison  # freed memory full of NaN: a result that nobody wrote shows
    return compiled(arrays, cotangents=cotangents)


@pytest.mark.parametrize("spec", CHECKED, ids=lambda spec: spec.name)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla"])
def test_forward_gradients_and_log_sum_exp(implementation, spec):
    arrays, kwargs, cotangents = draw(spec)
    answer = {a.implementation: a.reason for a in explain(attention, *arrays, **kwargs).answers}[implementation]
    if answer:
        pytest.skip(answer)
    results = run(implementation, arrays, kwargs, cotangents)
    for result, exact in zip(results, exactly(arrays, kwargs, cotangents), strict=True):
        assert np.isfinite(np.asarray(result, np.float64)).all()
        assert error(result, exact) < TOLERANCE


@pytest.mark.parametrize("name", ["square", "packed", "packed-wide"])
def test_no_worse_than_cudnn_on_the_same_inputs(name):
    (spec,) = (spec for spec in SPECS if spec.name == name)
    arrays, kwargs, cotangents = draw(spec)
    exact = exactly(arrays, kwargs, cotangents, return_lse=False)
    ours, theirs = (run(who, arrays, kwargs, cotangents, return_lse=False) for who in ("mosaic_gpu", "cudnn"))
    for mine, other, wanted in zip(ours, theirs, exact, strict=True):
        assert error(mine, wanted) <= 1.3 * error(other, wanted) + 1e-6


def test_the_same_bits_every_time():
    (spec,) = (spec for spec in SPECS if spec.name == "packed")
    arrays, kwargs, cotangents = draw(spec)
    first = run("mosaic_gpu", arrays, kwargs, cotangents)
    for _ in range(5):
        for one, other in zip(first, run("mosaic_gpu", arrays, kwargs, cotangents), strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_under_vmap():
    (spec,) = (spec for spec in SPECS if spec.name == "packed")
    (q, k, v), kwargs = spec.inputs()
    segment_ids = kwargs.pop("segment_ids")

    def call(q, k, v, segment_ids):
        return attention(q, k, v, segment_ids=segment_ids, implementation="mosaic_gpu", **kwargs)

    rows = jax.vmap(call)(*(array[:, None] for array in (q, k, v, segment_ids)))
    np.testing.assert_array_equal(
        np.asarray(rows[:, 0], np.float32), np.asarray(call(q, k, v, segment_ids), np.float32)
    )
