"""SwiGLU's product: extremes and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.pallas_kernels import swiglu

pytestmark = pytest.mark.usefixtures("quick_compilation")


def both(implementation, gate, up, dy):
    y, back = jax.vjp(lambda gate, up: swiglu(gate, up, implementation=implementation), gate, up)
    return y, *back(dy)


def test_large_gates_neither_overflow_nor_lose_the_gradient():
    gate, up, dy = jnp.array([-200.0, -80.0, 80.0, 200.0]), jnp.full(4, 3.0), jnp.ones(4)
    y, dgate, dup = both("xla", gate, up, dy)
    np.testing.assert_allclose(y, [0, 0, 240, 600], atol=1e-30)
    np.testing.assert_allclose(dgate, [0, 0, 3, 3], atol=1e-30)
    np.testing.assert_allclose(dup, [0, 0, 80, 200], atol=1e-30)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_side_by_side_or_apart_is_the_same(implementation):
    gate, up, dy = np.random.default_rng().normal(size=(3, 4, 6, 10)).astype(np.float32)
    y, back = jax.vjp(lambda both: swiglu(both, implementation=implementation), jnp.stack([gate, up], axis=-2))
    expected, *gradients = both(implementation, gate, up, dy)
    # Rounded alike, but for what the compiler makes of another program: a few last bits.
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(back(dy)[0], np.stack(gradients, axis=-2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("gate", "up", "error", "says"),
    [
        (jnp.ones((2, 3)), jnp.ones((3, 2)), ValueError, r"gate \[2, 3\] and up \[3, 2\] must have one shape"),
        (jnp.ones(2), jnp.ones(2, jnp.bfloat16), TypeError, "must have one dtype: cast them first"),
        ([1.0, 2.0], jnp.ones(2), TypeError, r"gate is a list and must be an array: pass jnp.asarray\(gate\)"),
        (jnp.ones(2, int), jnp.ones(2, int), TypeError, "gate is int32 and must be floating"),
        (jnp.ones((2, 8)), None, ValueError, r"gate \[2, 8\] without up must be \[N, ..., 2, F\]"),
        (jnp.ones((4, 3, 8)), None, ValueError, r"gate \[4, 3, 8\] without up must be \[N, ..., 2, F\]"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(gate, up, error, says):
    with pytest.raises(error, match=says):
        swiglu(gate, up)
