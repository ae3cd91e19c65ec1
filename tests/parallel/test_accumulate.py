"""Accumulation over microbatches against one gradient of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.parallel import Layout, accumulate, deviations, make_mesh
from crescendo.parallel.accumulate import over_weight, squared_norm


def loss_fn(parameters, rows):
    residual = jnp.tanh(rows["x"] @ parameters["w"]) - rows["y"]
    extra = {"absolute": jnp.sum(jnp.abs(residual)), "rows": jnp.float32(residual.size)}
    return jnp.sum(rows["weight"] * jnp.square(residual)), jnp.sum(rows["weight"]), extra


def mean_loss(parameters, rows):
    loss_sum, weight, _ = loss_fn(parameters, rows)
    return loss_sum / weight


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)
    rows = {
        "x": random.normal(size=(4, 3, 5)).astype(np.float32),
        "y": random.normal(size=(4, 3)).astype(np.float32),
        "weight": random.integers(0, 2, size=(4, 3)).astype(np.float32),
    }
    rows["weight"][:, 0] = 1
    return {"w": random.normal(size=5).astype(np.float32)}, rows


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(lambda parameters, rows, count: accumulate(loss_fn, parameters, rows, count))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sums_equal_those_of_the_whole_batch(problem, compiled, count):
    parameters, rows = problem
    total = compiled(parameters, rows, jnp.int32(count))
    whole = jax.tree.map(lambda x: x[:count].reshape(-1, *x.shape[2:]), rows)
    loss, weight, extra = loss_fn(parameters, whole)
    gradients = jax.grad(lambda p: loss_fn(p, whole)[0])(parameters)
    np.testing.assert_allclose(total.loss_sum, loss, rtol=1e-6)
    np.testing.assert_allclose(total.weight, weight)
    assert total.extra.keys() == extra.keys()
    for name, expected in extra.items():
        np.testing.assert_allclose(total.extra[name], expected, rtol=1e-6)
    np.testing.assert_allclose(total.gradients["w"], gradients["w"], rtol=1e-5, atol=1e-6)


def test_squared_norms_are_those_of_each_mean_gradient(problem, compiled):
    parameters, rows = problem
    total = compiled(parameters, rows, jnp.int32(3))
    for i in range(3):
        mean = jax.grad(mean_loss)(parameters, jax.tree.map(lambda x, i=i: x[i], rows))
        np.testing.assert_allclose(total.squared_norms[i], np.sum(np.square(mean["w"])), rtol=1e-5)
    assert total.squared_norms[3] == 0


def test_deviations_are_those_of_each_mean_gradient_from_the_whole(problem):
    parameters, rows = problem
    total = accumulate(loss_fn, parameters, rows, jnp.int32(3))
    mean = jax.tree.map(lambda g: g / total.weight, total.gradients)
    found = deviations(loss_fn, parameters, rows, jnp.int32(3), mean)
    means = [jax.grad(mean_loss)(parameters, jax.tree.map(lambda x, i=i: x[i], rows))["w"] for i in range(3)]
    np.testing.assert_allclose(found.dot_products, [*(g @ mean["w"] for g in means), 0], rtol=1e-5)
    np.testing.assert_allclose(found.squares["w"], sum((g - mean["w"]) ** 2 for g in means), rtol=1e-4)


@pytest.mark.parametrize("factor", [2.0**-10, 0.25, 8.0])
def test_the_unit_of_the_weights_does_not_matter(problem, compiled, factor):
    """Means and what is measured of them are those of the same rows at any scale of the weights, below 1 too."""
    parameters, rows = problem
    scaled = rows | {"weight": rows["weight"] * factor}
    expected, total = (compiled(parameters, r, jnp.int32(3)) for r in (rows, scaled))
    np.testing.assert_array_equal(total.squared_norms, expected.squared_norms)
    mean = over_weight(expected.gradients, expected.weight)
    np.testing.assert_array_equal(over_weight(total.gradients, total.weight)["w"], mean["w"])
    for a, b in zip(*(deviations(loss_fn, parameters, r, jnp.int32(3), mean) for r in (rows, scaled)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_microbatch_without_weight_has_a_gradient_of_zero(problem, compiled):
    parameters, rows = problem
    rows = rows | {"weight": rows["weight"] * np.array([[1.0], [0.0], [1.0], [1.0]], np.float32)}
    total = compiled(parameters, rows, jnp.int32(3))
    assert total.squared_norms[1] == 0
    assert total.squared_norms[0] > 0
    assert np.isfinite(over_weight(total.gradients, total.weight)["w"]).all()


def test_complex_gradients_have_the_norms_of_their_parts():
    """Of complex numbers `|g|^2`, as of the real and imaginary parts side by side."""
    random = np.random.default_rng(1)
    a, b = (random.normal(size=(3, 2, 5)).astype(np.float32) for _ in range(2))

    def whole(z, rows):
        return jnp.sum(jnp.tanh(rows["a"] * z.real) + jnp.sin(rows["b"] * z.imag)), jnp.float32(2), {}

    def parts(xy, rows):
        return whole(xy[0] + 1j * xy[1], rows)

    x, rows, count = random.normal(size=(2, 5)).astype(np.float32), {"a": a, "b": b}, jnp.int32(2)
    expected, total = accumulate(parts, x, rows, count), accumulate(whole, x[0] + 1j * x[1], rows, count)
    np.testing.assert_allclose(total.gradients, expected.gradients[0] - 1j * expected.gradients[1], rtol=1e-6)
    np.testing.assert_allclose(total.squared_norms, expected.squared_norms, rtol=1e-6)
    np.testing.assert_allclose(squared_norm(total.gradients), squared_norm(expected.gradients), rtol=1e-6)
    found = deviations(whole, x[0] + 1j * x[1], rows, count, total.gradients)
    right = deviations(parts, x, rows, count, expected.gradients)
    np.testing.assert_allclose(found.dot_products, right.dot_products, rtol=1e-6)
    np.testing.assert_allclose(found.squares, right.squares.sum(axis=0), rtol=1e-6)


def test_another_count_compiles_nothing(problem, compiled):
    parameters, rows = problem
    compiled(parameters, rows, jnp.int32(1))
    before = compiled._cache_size()
    compiled(parameters, rows, jnp.int32(4))
    assert compiled._cache_size() == before


def test_one_microbatch_needs_no_loop(problem):
    parameters, rows = problem
    first = jax.tree.map(lambda x: x[:1], rows)
    text = jax.jit(lambda p, r: accumulate(loss_fn, p, r, jnp.int32(1))).lower(parameters, first).as_text()
    assert "while" not in text


def test_parts_that_wait_for_the_end_of_the_step_add_up_the_same(problem):
    parameters, rows = problem
    rows = jax.tree.map(lambda x: x.repeat(8, axis=1), rows)
    layout = Layout(make_mesh(data=4, fsdp=2), "zero1")
    spread = layout.spread({"w": ("embed",)})
    assert spread.parts == 8
    alone = accumulate(loss_fn, parameters, rows, jnp.int32(3))
    parts = jax.jit(lambda p, r: accumulate(loss_fn, p, r, jnp.int32(3), spread=spread))
    padded = {"w": np.pad(parameters["w"], (0, 3))}
    inputs = rows | {"x": np.pad(rows["x"], ((0, 0), (0, 0), (0, 3)))}
    found = parts(padded, inputs)
    for name in ("loss_sum", "weight", "extra"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), getattr(found, name), getattr(alone, name)
        )
    np.testing.assert_allclose(found.gradients["w"][:5], alone.gradients["w"], rtol=1e-5, atol=1e-5)
