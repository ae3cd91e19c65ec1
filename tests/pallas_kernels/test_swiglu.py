"""SwiGLU's product: values and gradients in float64, under vmap and over a mesh, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.pallas_kernels import swiglu
from crescendo.pallas_kernels.swiglu.specs import SPECS

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = [spec for spec in SPECS if "small" in spec.tags]
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 2**-8}


def both(implementation, gate, up, dy):
    y, back = jax.vjp(lambda gate, up: swiglu(gate, up, implementation=implementation), gate, up)
    return y, *back(dy)


def exact(*arrays):
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(array.astype(jnp.float32), np.float64)) for array in arrays)
        return tuple(map(np.asarray, both("reference", *wide)))


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_values_and_gradients(spec, implementation):
    seed = int(np.random.default_rng().integers(2**31))
    (gate, up), _ = spec.inputs(seed)
    dy = jax.random.normal(jax.random.key(seed), gate.shape, gate.dtype)
    for found, expected in zip(both(implementation, gate, up, dy), exact(gate, up, dy), strict=True):
        assert found.dtype == gate.dtype
        error = np.linalg.norm(np.asarray(found, np.float64) - expected)
        assert error <= TOLERANCE[gate.dtype.name] * np.linalg.norm(expected)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2**31 - 1))
def test_mapping_it_changes_nothing(shape, seed):
    gate, up = (jax.random.normal(key, (3, *shape)) for key in jax.random.split(jax.random.key(seed)))
    whole = swiglu(gate, up, implementation="xla")
    np.testing.assert_allclose(jax.vmap(lambda g, u: swiglu(g, u, implementation="xla"))(gate, up), whole, rtol=1e-6)


def test_large_gates_neither_overflow_nor_lose_the_gradient():
    gate, up, dy = jnp.array([-200.0, -80.0, 80.0, 200.0]), jnp.full(4, 3.0), jnp.ones(4)
    y, dgate, dup = both("xla", gate, up, dy)
    np.testing.assert_allclose(y, [0, 0, 240, 600], atol=1e-30)
    np.testing.assert_allclose(dgate, [0, 0, 3, 3], atol=1e-30)
    np.testing.assert_allclose(dup, [0, 0, 80, 200], atol=1e-30)


@pytest.mark.parametrize(
    ("gate", "up", "error", "says"),
    [
        (jnp.ones((2, 3)), jnp.ones((3, 2)), ValueError, r"gate \[2, 3\] and up \[3, 2\] must have one shape"),
        (jnp.ones(2), jnp.ones(2, jnp.bfloat16), TypeError, "must have one dtype: cast them first"),
        (jnp.ones(2, int), jnp.ones(2, int), TypeError, "gate is int32 and must be floating"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(gate, up, error, says):
    with pytest.raises(error, match=says):
        swiglu(gate, up)
