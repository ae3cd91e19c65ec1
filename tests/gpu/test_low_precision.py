"""Quantised products on an NVIDIA GPU that has 8-bit floating numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.models.layout import ONE_DEVICE
from crescendo.models.low_precision import RECIPES, Kernel, products, reference
from crescendo.pallas_kernels.op import explain, target_device
from crescendo.pallas_kernels.quantize import quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(target_device().compute_capability < 8.9, reason="needs compute capability 8.9"),
]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("of", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(3, 50, 70), (130, 66), (1024, 768), (1, 16)], ids=str)
def test_quantize_is_the_cast_in_both_orders(shape, of, dtype):
    x = jnp.asarray(np.random.default_rng().normal(size=shape), of).at[0].mul(1e-4).at[..., -1].mul(1e5)
    call = functools.partial(quantize, x, jnp.float32(8), dtype=dtype)
    assert explain(quantize, x, jnp.float32(8), dtype=dtype).chosen == "triton"
    for a, b in zip(call(), call(implementation="reference"), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


@pytest.mark.parametrize("name", ["fp8", "fp8-hadamard"])
def test_products_are_those_of_the_specification(name):
    random = np.random.default_rng()
    x, dy = (jnp.asarray(random.normal(size=(2, 512, n)), jnp.bfloat16) for n in (768, 1024))
    w = jnp.asarray(random.normal(size=(768, 1024)) / 28, jnp.float32)

    def both_passes(function, x, w, dy):
        y, back = jax.vjp(function, x, w)
        return y, *back(dy.astype(y.dtype))

    kernel = Kernel(("embed", "mlp"), 1)
    fast = functools.partial(both_passes, lambda x, w: products(RECIPES[name], x, [w], [kernel], ONE_DEVICE)[0])
    found = jax.jit(fast)(x, w, dy)
    wide = (x.reshape(-1, 768).astype(jnp.float32), w, dy.reshape(-1, 1024).astype(jnp.float32))
    with jax.default_matmul_precision("highest"):
        exact = both_passes(functools.partial(reference, RECIPES[name]), *wide)
    for a, b in zip(found, exact, strict=True):
        a, b = np.asarray(a, np.float64).reshape(b.shape), np.asarray(b, np.float64)
        # Hopper's sums of 8-bit products keep 14 bits; results are rounded to bfloat16's 8.
        assert np.linalg.norm(a - b) < (2e-2 if name == "fp8-hadamard" else 4e-3) * np.linalg.norm(b)
