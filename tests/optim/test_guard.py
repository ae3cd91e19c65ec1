"""Guards: the rule against one written with NumPy, and the wrapper that leaves batches out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo import optim
from crescendo.optim.batch_size import BatchStats


def stats_of(loss: float, norm: float, batch_size: int = 8) -> BatchStats:
    square = jnp.float32(norm**2)
    return BatchStats(jnp.int32(0), jnp.int32(batch_size), jnp.float32(loss), square, square[None], jnp.int32(1))


def reference(losses, norms, sizes, window, threshold):
    """Which batches pass: medians of the last ones that did."""
    kept: list[tuple[float, float]] = []
    passed, size = [], None
    for loss, norm, batch_size in zip(losses, norms, sizes, strict=True):
        kept, size = kept if batch_size == size else [], batch_size
        x, last = np.array([loss, np.log(norm)]), np.array(kept[-window:]).reshape(-1, 2)
        ok = True
        if len(last) >= window // 4:
            middle = np.quantile(last, 0.5, axis=0, method="lower")
            deviation = 1.4826 * np.quantile(np.abs(last - middle), 0.5, axis=0, method="lower")
            scores = (x - middle) / np.maximum(deviation, [0.02 * abs(middle[0]), 0.1])
            ok = bool((scores <= threshold).all())
        if ok:
            kept.append(tuple(x))
        passed.append(ok)
    return passed


@pytest.mark.parametrize("window", [4, 17, 64])
def test_the_rule(window):
    random = np.random.default_rng(window)
    losses = 3 + 2 * np.exp(-np.arange(300) / 50) + 0.1 * random.standard_t(3, size=300)
    norms = np.exp(0.4 * random.standard_normal(300))
    sizes = np.where(np.arange(300) < 150, 8, 16)
    losses[[90, 91, 200]] += 4
    norms[[120, 260]] *= 50
    rule = optim.guard(window, z=6.0)
    update, state, passed = jax.jit(rule.update), rule.init(), []
    for each in zip(losses, norms, sizes, strict=True):
        ok, state = update(state, stats_of(*each))
        passed.append(bool(ok))
    assert passed == reference(losses, norms, sizes, window, 6.0)
    assert not np.array(passed)[[90, 91, 120, 200, 260]].any()
    assert 1 < sum(map(bool, passed)) < 300


def test_a_batch_that_does_not_pass_changes_nothing_but_the_guard():
    optimizer = optim.guarded(optim.adamw(0.1), optim.guard(4))
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    for loss in (3.0, 3.0, 3.0, 9.0, 3.0):
        updates, new = optimizer.update(params, state, params, batch_stats=stats_of(loss, 1.0))
        assert bool(optim.passed(new)) == (loss == 3.0)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), new.inner_state, state.inner_state)
        if loss == 9.0:
            assert all(jax.tree.leaves(same))
            assert not jnp.any(updates["w"])
        else:
            assert not all(jax.tree.leaves(same))
        state = new
    reported = optim.reported(state)
    assert {"learning_rate", "loss_z", "gradient_norm_z"} <= reported.keys()


def test_a_guard_needs_to_know_the_batch():
    optimizer = optim.guarded(optax.sgd(0.1), optim.guard())
    with pytest.raises(ValueError, match="batch_stats"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


@pytest.mark.parametrize(
    "options", [{"window": 3}, {"z": 0.0}, {"z": float("nan")}, {"patience": 0}, {"max_rollbacks": -1}]
)
def test_options_out_of_their_range_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} = .* must be"):
        optim.guard(**options)
