"""LayerNorm: what it does to a mean and a length, its vectors' gradients by example, how it calls, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.pallas_kernels import layer_norm, rms_norm

pytestmark = pytest.mark.usefixtures("quick_compilation")


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(3, 9), st.integers(0, 2**31 - 1))
def test_neither_mean_nor_length_matters_and_what_is_left_has_neither(shape, width, seed):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(*shape, width)), jnp.float32)
    norm = jax.jit(lambda x: layer_norm(x, jnp.ones(width), jnp.zeros(width), eps=1e-12, implementation="xla"))
    y = norm(x)
    np.testing.assert_allclose(jnp.mean(y, -1), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.mean(y * y, -1), 1, rtol=1e-4)
    # Rounding 8 away leaves 5e-7 of each x, of rows whose deviations may be a tenth.
    np.testing.assert_allclose(norm(8 - 4 * x), -y, rtol=1e-4, atol=1e-4)
    dx = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(norm(x)))))(x)
    size = np.maximum(1, np.linalg.norm(dx, axis=-1))
    np.testing.assert_allclose(jnp.sum(dx, -1) / size, 0, atol=1e-4)  # so the gradient is orthogonal to ones
    np.testing.assert_allclose(jnp.sum(dx * x, -1) / size, 0, atol=1e-4)  # and to x


def test_of_centered_rows_it_is_rms_norm():
    random = np.random.default_rng()
    x, scale = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((3, 5, 16), (3, 16)))
    x = x - jnp.mean(x, -1, keepdims=True)
    y = layer_norm(x, scale, jnp.zeros((3, 16)), eps=1e-5, implementation="xla")
    np.testing.assert_allclose(y, rms_norm(x, scale, eps=1e-5, implementation="xla"), rtol=1e-5, atol=1e-5)


X, S = jnp.ones((2, 3, 4)), jnp.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layer_norm(X, jnp.ones(3), S, eps=0), ValueError, r"scale \[3\] .* x \[2, 3, 4\]"),
        (lambda: layer_norm(X, S, jnp.ones((3, 4)), eps=0), ValueError, r"bias \[3, 4\]"),
        (lambda: layer_norm(X, S, jnp.ones((2, 4)), eps=0), ValueError, r"scale \[4\] and bias \[2, 4\]"),
        (lambda: layer_norm(X, S, S, eps=float("nan")), ValueError, "eps = nan"),
        (lambda: layer_norm(X, S, S, eps=0, residual=X[0]), ValueError, r"residual float32\[3, 4\]"),
        (lambda: layer_norm(X, S, S, eps=0, residual=X.astype(jnp.bfloat16)), TypeError, "residual bfloat16"),
        (lambda: layer_norm(X, S, S.astype(int), eps=0), TypeError, "bias is int32"),
        (
            lambda: layer_norm(X, S, S, eps=0, implementation="triton"),
            NotImplementedError,
            "'xla' or 'reference' serves",
        ),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
