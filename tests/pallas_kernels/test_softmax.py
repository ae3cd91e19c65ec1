"""Softmax and log-softmax: masks, extremes, sums, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.pallas_kernels.softmax import log_softmax, softmax

pytestmark = pytest.mark.usefixtures("quick_compilation")
OPS = [softmax, log_softmax]


def value_and_gradient(op, implementation, options, x, cotangent):
    mask, fixed = options.get("mask"), {name: value for name, value in options.items() if name != "mask"}

    @jax.jit
    def both(x, mask, cotangent):
        y, back = jax.vjp(lambda x: op(x, mask=mask, **fixed, implementation=implementation), x)
        return y, back(cotangent.astype(y.dtype))[0]

    return both(x, mask, cotangent)


def exact(op, options, x, cotangent):
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    with jax.enable_x64(True):
        cotangent = jnp.asarray(np.asarray(cotangent, np.float64))
        return value_and_gradient(op, "reference", options, jnp.asarray(wide), cotangent)


def close(found, expected, tolerance) -> bool:
    """The same entries are -inf, none is NaN, and the others agree in the l2 norm."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    assert (np.isneginf(found) == ~finite).all()
    error = np.linalg.norm(found[finite] - expected[finite])
    return error <= tolerance * max(np.linalg.norm(expected[finite]), 1e-30)


def test_rows_where_one_entry_has_nearly_all_of_the_weight_keep_their_gradient():
    random = np.random.default_rng()
    x, cotangent = (jnp.asarray(scale * random.normal(size=(500, 300)), jnp.bfloat16) for scale in (4, 1))
    _, dx = value_and_gradient(softmax, "xla", {}, x, cotangent)
    for found, expected in zip(dx, exact(softmax, {}, x, cotangent)[1], strict=True):
        assert close(found, expected, 1e-2)


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.integers(0, 2),
    st.booleans(),
    st.floats(-1e4, 1e4, width=32),
    st.integers(0, 2**31 - 1),
)
def test_rows_add_up_to_one_and_a_shift_changes_nothing(shape, axis, masked, shift, seed):
    random = np.random.default_rng(seed)
    axis = min(axis, len(shape) - 1)
    x = np.where(random.random(shape) < 0.2, -np.inf, random.normal(size=shape) * 3).astype(np.float32)
    mask = jnp.asarray(random.random(shape) < 0.6) if masked else None
    seen = np.isfinite(x) & (np.asarray(mask) if masked else True)
    for implementation in ("xla", "reference"):
        run = functools.partial(jax.jit, static_argnums=1)(
            lambda x, op: op(x, axis, mask=mask, implementation=implementation)  # noqa: B023
        )
        y = run(jnp.asarray(x), softmax)
        np.testing.assert_allclose(jnp.sum(y, axis), seen.any(axis).astype(float), rtol=1e-5)
        assert (np.asarray(y)[~seen] == 0).all()
        # The shift rounds x itself: by 2^-24 of 1e4.
        shifted = run(jnp.asarray(x + np.float32(shift)), softmax)
        np.testing.assert_allclose(shifted, y, atol=2e-3)
        logs = run(jnp.asarray(x), log_softmax)
        np.testing.assert_allclose(jnp.exp(logs), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_extremes_give_no_nan(implementation):
    x = jnp.array([[1e4, -1e4, -jnp.inf], [-jnp.inf] * 3, [-1e4, -1e4, -1e4]])
    run = functools.partial(value_and_gradient, implementation=implementation, options={}, x=x)
    y, dx = run(softmax, cotangent=jnp.ones_like(x))
    np.testing.assert_allclose(y, [[1, 0, 0], [0, 0, 0], [1 / 3] * 3], rtol=1e-6)
    np.testing.assert_allclose(dx, 0, atol=1e-6)
    y, dx = run(log_softmax, cotangent=jnp.array([[1.0, 2.0, 3.0]] * 3))
    np.testing.assert_allclose(y, [[0, -2e4, -jnp.inf], [-jnp.inf] * 3, [-np.log(3)] * 3], rtol=1e-6)
    # An entry of -inf has no gradient and gives none.
    np.testing.assert_allclose(dx, [[-2, 2, 0], [0, 0, 0], [-1, 0, 1]], atol=1e-5)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 2.0])
def test_an_entry_of_minus_infinity_counts_nothing_at_any_scale(op, soft_cap, scale):
    """The other entries' results and gradients are those of a row without it."""
    x = jnp.array([[1.0, -jnp.inf, 3.0, 2.0], [-20.0, 0.5, 0.0, -jnp.inf], [-jnp.inf] * 4])
    cotangent, counts = jnp.arange(12.0).reshape(3, 4), np.isfinite(x)
    options = {"scale": scale, "soft_cap": soft_cap}
    expected = exact(op, options, *(array[counts].reshape(2, 3) for array in (x, cotangent)))
    for implementation in ("xla", "reference"):
        results = map(np.asarray, value_and_gradient(op, implementation, options, x, cotangent))
        for found, right, nothing in zip(results, expected, (0 if op is softmax else -np.inf, 0), strict=True):
            np.testing.assert_array_equal(found[~counts], nothing)
            np.testing.assert_allclose(found[counts].reshape(2, 3), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_finite_entry_counts_however_far_the_scale_takes_it(implementation):
    y = softmax(jnp.array([-1e30, 0.0, -jnp.inf]), scale=1e10, soft_cap=5.0, implementation=implementation)
    np.testing.assert_allclose(y, np.array([np.exp(-5), 1, 0]) / (1 + np.exp(-5)), rtol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("options", [{}, {"soft_cap": 2.0}, {"scale": -1.0, "soft_cap": 2.0}], ids=str)
def test_what_a_mask_hides_does_not_matter(op, implementation, options):
    """Neither the entry nor its cotangent, such as that of weights times values of which some are NaN."""
    x, cotangent = jnp.array([[1.0, 7, 3], [2, 0, 1], [4, 5, 6]]), jnp.array([[1.0, 2, 3], [5, 4, 6], [7, 8, 9]])
    mask = jnp.array([[True, False, True], [True, True, False], [False] * 3])
    both = lambda value, of_cotangent: value_and_gradient(  # noqa: E731
        op,
        implementation,
        options | {"mask": mask},
        *(jnp.where(mask, *a) for a in ((x, value), (cotangent, of_cotangent))),
    )
    expected = both(0.0, 0.0)
    for value in (np.nan, np.inf, -np.inf, 1e38):
        for found, right in zip(both(value, value), expected, strict=True):
            np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_what_counts_and_is_nan_shows(op, implementation):
    options = {"mask": jnp.array([True, True, False])}
    y, dx = value_and_gradient(op, implementation, options, jnp.array([1.0, np.nan, 2.0]), jnp.ones(3))
    assert np.isnan(y[:2]).all()
    assert np.isnan(dx[:2]).all()


def test_vmap_and_empty_rows():
    x = jnp.asarray(np.random.default_rng().normal(size=(3, 4, 5)), jnp.float32)
    mapped = jax.vmap(lambda x: softmax(x, implementation="xla"))(x)
    np.testing.assert_allclose(mapped, jax.nn.softmax(x), rtol=1e-6)
    for shape in ((0, 4), (4, 0)):
        assert softmax(jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (jnp.ones(3, jnp.int32), {}, TypeError, "x is int32"),
        (jnp.ones(3), {"axis": (0,)}, TypeError, r"axis = \(0,\) must be an integer"),
        (jnp.ones((3, 4)), {"axis": 2}, ValueError, r"axis = 2 .* x \[3, 4\]"),
        (jnp.ones((3, 4)), {"mask": jnp.ones((3, 5), bool)}, ValueError, r"mask \[3, 5\] .* x \[3, 4\]"),
        (jnp.ones((3, 4)), {"mask": jnp.ones((2, 3, 4), bool)}, ValueError, r"mask \[2, 3, 4\]"),
        (jnp.ones(3), {"mask": jnp.ones(3)}, TypeError, "mask is float32"),
        (jnp.ones(3), {"soft_cap": -1.0}, ValueError, "soft_cap = -1.0"),
        (jnp.ones(3), {"scale": float("nan")}, ValueError, "scale = nan"),
        (jnp.ones(3), {"implementation": "triton"}, NotImplementedError, "triton: .*'xla' or 'reference' serves"),
    ],
)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_mistakes_are_named(op, x, options, error, message):
    with pytest.raises(error, match=message):
        op(x, **options)
