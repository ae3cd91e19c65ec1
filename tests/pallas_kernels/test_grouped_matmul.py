"""Grouped products: what groups keep from each other, sizes that are traced, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.pallas_kernels import grouped_matmul

pytestmark = pytest.mark.usefixtures("quick_compilation")
X, W = jnp.ones((6, 4)), jnp.ones((3, 4, 5))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_behind_the_groups_may_hold_anything_and_get_zeros(implementation):
    run = lambda x, w: grouped_matmul(x, w, jnp.array([3, 0, 1]), implementation=implementation)  # noqa: E731
    y, back = jax.vjp(run, X.at[4:].set(jnp.nan), W)
    dx, dw = back(jnp.ones_like(y).at[4:].set(jnp.nan))
    np.testing.assert_array_equal(y, [[4.0] * 5] * 4 + [[0.0] * 5] * 2)
    np.testing.assert_array_equal(dx, [[5.0] * 4] * 4 + [[0.0] * 4] * 2)
    np.testing.assert_array_equal(dw, np.multiply.outer([3.0, 0.0, 1.0], np.ones((4, 5))))


def test_sizes_are_traced():
    run = jax.jit(lambda *given: grouped_matmul(*given))
    w = jnp.arange(1.0, 4.0)[:, None, None] * W
    for sizes in ([6, 0, 0], [0, 1, 5], [2, 2, 2]):
        np.testing.assert_array_equal(run(X, w, jnp.array(sizes))[:, 0], 4.0 * np.repeat([1, 2, 3], sizes))
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ((X, W[:, :3], jnp.array([1, 2, 3])), ValueError, r"x \[6, 4\] must be \[M, D\] and w \[3, 3, 5\] \[E, D, F\]"),
        ((X, W[0], jnp.array([1, 2, 3])), ValueError, r"w \[4, 5\] \[E, D, F\] with the same D"),
        ((X, W, jnp.array([6])), ValueError, r"sizes \[1\] must be \[E\], one for each matrix of w \[3, 4, 5\]"),
        ((X, W[:0], jnp.zeros(0, int)), ValueError, "one or more"),
        ((X, W, jnp.ones(3)), TypeError, "sizes is float32 and must be an array of integers"),
        ((X, W, [2, 2, 2]), TypeError, "sizes is list and must be an array of integers"),
        ((X, W.astype(jnp.bfloat16), jnp.array([1, 2, 3])), TypeError, "must have one dtype: cast them first"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(given, error, says):
    with pytest.raises(error, match=says):
        grouped_matmul(*given)
