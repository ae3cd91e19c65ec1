"""Grouped products: what groups keep from each other, sizes that are traced, and errors."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.pallas_kernels import grouped_matmul
from crescendo.pallas_kernels.conformance import HOMES
from crescendo.pallas_kernels.grouped_matmul.groups import borders, tiles_of
from crescendo.pallas_kernels.interpreter import interpreted

pytestmark = pytest.mark.usefixtures("quick_compilation")
X, W = jnp.ones((6, 4)), jnp.ones((3, 4, 5))


@pytest.mark.parametrize(
    "implementation",
    [
        "looped",
        "xla",
        "reference",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mosaic_gpu", "mosaic_tpu")),
    ],
)
def test_rows_behind_the_groups_may_hold_anything_and_get_zeros(implementation):
    x, w = jnp.ones((136, 64), jnp.bfloat16), jnp.ones((3, 64, 64), jnp.bfloat16)
    run = lambda x, w: grouped_matmul(x, w, jnp.array([40, 0, 33]), implementation=implementation)  # noqa: E731
    home = HOMES[implementation].stand_in
    with interpreted(home) if home else contextlib.nullcontext():
        y, back = jax.vjp(run, x.at[73:].set(jnp.nan), w)
        # The kernel for Hopper wants cotangents that are finite.
        dx, dw = back(jnp.ones_like(y).at[73:].set(1.0 if implementation == "mosaic_gpu" else jnp.nan))
    for result in (y, dx):
        np.testing.assert_array_equal(result, np.where(np.arange(136)[:, None] < 73, 64.0, np.zeros(64)))
    np.testing.assert_array_equal(dw, np.multiply.outer([40.0, 0.0, 33.0], np.ones((64, 64))))


@pytest.mark.parametrize("aligned", [1, 8])
def test_tiles_have_every_row_of_every_group_once(aligned):
    random = np.random.default_rng()
    for rows, experts in ((37, 1), (200, 50)):
        sizes = np.diff(np.sort(random.integers(0, rows + 1, experts)), prepend=0)
        begin, end = at = borders(jnp.asarray(sizes), rows)
        group, first, behind = tiles_of(at, rows, 16, aligned)
        assert behind[-1] <= len(group)
        found = []
        for own, row in zip(group.tolist()[: behind[-1]], first.tolist(), strict=False):
            assert row % aligned == 0
            found += [(own, i) for i in range(max(row, int(begin[own])), min(row + 16, int(end[own])))]
        groups = np.repeat(np.arange(experts + 1), [*sizes, rows - sizes.sum()])
        assert found == list(zip(groups.tolist(), range(rows), strict=True))


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
