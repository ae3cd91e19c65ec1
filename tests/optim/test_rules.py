"""Parameters after 50 steps against NumPy versions of each rule, written from the maths one layer at a time."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from optax import contrib

from crescendo import optim

STEPS, WARMUP, BATCH = 50, 10, 32
# path -> (shape, stacked on axis 0?, a matrix per layer?); by hand, so that the masks are tested too.
LEAVES = {
    ("blocks", "attention", "query", "kernel"): ((3, 4, 2, 2), True, True),
    ("blocks", "attention", "query", "bias"): ((3, 2, 2), True, False),
    ("blocks", "attention", "query_norm", "scale"): ((3, 2), True, False),
    ("embedding", "table"): ((7, 4), False, True),
    ("zero", "kernel"): ((4, 3), False, True),
    ("still", "kernel"): ((2, 3), False, True),
    ("temperature",): ((), False, False),
}


def learning_rate(peak, t):
    """Warmup and linear decay to 0 over STEPS, at step t = 0, 1, ...; from the maths."""
    return peak * (t / WARMUP if t < WARMUP else (STEPS - t) / (STEPS - WARMUP))


def norm(x):
    return np.sqrt((x * x).sum())


def adam_direction(m, v, g, t, b1, b2, eps, nesterov=False):
    """New moments and the bias-corrected direction at step t = 1, 2, ..."""
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    m_hat = m / (1 - b1**t)
    if nesterov:
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    return m, v, m_hat / (np.sqrt(v / (1 - b2**t)) + eps)


def adamw(w, moments, g, t, eta, matrix, nesterov=False):
    m, v, u = adam_direction(*moments, g, t, 0.9, 0.95, 1e-8, nesterov)
    return -eta * (u + 0.1 * matrix * w), (m, v)


def lamb(w, moments, g, t, eta, matrix, low=0.0, high=np.inf):
    m, v, u = adam_direction(*moments, g, t, 0.9, 0.999, 1e-6)
    if matrix:
        u = u + 0.01 * w
        if norm(w) > 0 and norm(u) > 0:
            u = u * np.clip(norm(w), low, high) / norm(u)
    return -eta * u, (m, v)


def lars(w, moments, g, t, eta, matrix):
    local = 1.0
    if matrix:
        if norm(w) > 0 and norm(g) > 0:
            local = 0.001 * norm(w) / (norm(g) + 1e-4 * norm(w))
        g = g + 1e-4 * w
    velocity = 0.9 * moments[0] + eta * local * g
    return -velocity, (velocity, moments[1])


def lion(w, moments, g, t, eta, matrix):
    c = 0.9 * moments[0] + 0.1 * g
    return -eta * (np.sign(c) + 1.0 * matrix * w), (0.99 * moments[0] + 0.01 * g, moments[1])


def sgd(w, moments, g, t, eta, matrix):
    velocity = 0.9 * moments[0] + g + 0.05 * matrix * w
    return -eta * velocity, (velocity, moments[1])


# name -> (rule, options of ours that it stands for, peak rate)
RULES = {
    "adamw": (adamw, {}, 0.02),
    "nadamw": (functools.partial(adamw, nesterov=True), {}, 0.02),
    "lamb": (lamb, {}, 0.02),
    "lamb-clipped": (functools.partial(lamb, low=0.5, high=1.5), {"phi_clip": (0.5, 1.5)}, 0.02),
    "lars": (lars, {}, 0.5),
    "lion": (lion, {}, 0.002),
    "sgd": (sgd, {"weight_decay": 0.05}, 0.02),
}


def draw(seed, scale, *leading):
    """Random values per path that bfloat16 holds exactly; `zero` starts at 0, `still` has no gradient."""
    rng = np.random.default_rng(seed)
    values = {
        path: (scale * rng.standard_normal((*leading, *shape))).astype(ml_dtypes.bfloat16).astype(np.float64)
        for path, (shape, _, _) in LEAVES.items()
    }
    values["still" if leading else "zero", "kernel"] *= 0
    if not leading:
        values["blocks", "attention", "query", "kernel"][1] = 0  # one layer of a stack is zero
    return values


def as_tree(values, dtype):
    """Nested dicts of arrays from values by path."""
    tree = {}
    for path, value in values.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(value, dtype)
    return tree


def expected(rule, peak, dtype, moment_dtype):
    """The reference: float64, rounded where the optimizer stores something."""

    def stored(x, dtype):
        return np.asarray(x).astype(dtype).astype(np.float64)

    def run(w, gradients, matrix):
        moments = (np.zeros_like(w), np.zeros_like(w))
        for t, g in enumerate(gradients):
            update, moments = rule(w, moments, g, t + 1, learning_rate(peak, t), matrix)
            moments = tuple(stored(x, moment_dtype) for x in moments)
            w = stored(w + stored(update, dtype), dtype)
        return w

    start, gradients = draw(0, 0.5), draw(1, 1.0, STEPS)
    return {
        path: np.stack([run(start[path][i], gradients[path][:, i], matrix) for i in range(shape[0])])
        if stacked
        else run(start[path], gradients[path], matrix)
        for path, (shape, stacked, matrix) in LEAVES.items()
    }


def trained(optimizer, dtype):
    """Parameters by path after STEPS updates on the same gradients."""

    def step(carry, inputs):
        params, state = carry
        t, grads = inputs
        updates, state = optimizer.update(grads, state, params, examples_seen=BATCH * t)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params, gradients):
        return jax.lax.scan(step, (params, optimizer.init(params)), (jnp.arange(STEPS), gradients))[0][0]

    params = train(as_tree(draw(0, 0.5), dtype), as_tree(draw(1, 1.0, STEPS), dtype))
    return {path: np.asarray(functools.reduce(lambda tree, key: tree[key], path, params)) for path in LEAVES}


# optax computes 1 - b2^t in float32: 1.5e-5 off at the second step for b2 = 0.999. A layer that starts at 0 takes the
# length of its first step from it, and LAMB makes all later steps proportional to that.
FLOAT32, FLOAT32_LAMB_FROM_ZERO = 1e-5, 2e-5


def compare(name, dtype, tolerance, moment_dtype=None):
    rule, options, peak = RULES[name]
    rate = optim.schedules.linear(peak, STEPS * BATCH, warmup=WARMUP * BATCH)
    optimizer = optim.OPTIMIZERS[name.split("-")[0]](rate, moment_dtype=moment_dtype, **options)
    actual = trained(optimizer, dtype)
    for path, w in expected(rule, peak, dtype, moment_dtype or dtype).items():
        assert actual[path].dtype == dtype
        assert norm(w) > 0
        allowed = FLOAT32_LAMB_FROM_ZERO if (name, path[0], tolerance) == ("lamb", "zero", FLOAT32) else tolerance
        assert norm(actual[path].astype(np.float64) - w) <= allowed * norm(w), "/".join(path)


# Adam's and LAMB's roots and quotients round most; that every rule is right is quick to see in float64.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("adamw", "lamb") else pytest.mark.slow) for name in RULES]
)
def test_float32(name):
    compare(name, np.dtype(np.float32), FLOAT32)


@pytest.mark.parametrize("name", RULES)
def test_float64(name):
    with jax.enable_x64(True):
        compare(name, np.dtype(np.float64), 1e-10)


# Where float32 and float64 round to different neighbours the parameters differ by one unit in bfloat16's last place.
ONE_PLACE = 2.0**-8


@pytest.mark.parametrize(
    ("name", "moment_dtype"), [("adamw", np.float32), ("lamb", None), ("lamb", np.float32), ("lion", None)]
)
def test_bfloat16(name, moment_dtype):
    compare(name, np.dtype(ml_dtypes.bfloat16), ONE_PLACE, moment_dtype)


def test_bfloat16_moments():
    compare("adamw", np.dtype(np.float32), ONE_PLACE, ml_dtypes.bfloat16)


def matrices(params):
    """The default mask, as optax takes it."""
    return optim.masks.is_matrix(params)


def two_dimensional(params):
    """optax's choice for Muon: whatever has two axes."""
    return jax.tree.map(lambda x: contrib.MuonDimensionNumbers() if x.ndim == 2 else None, params)


# Where the rule is optax's own: (ours, optax's) at the same options.
PEERS = {
    "adamw": (
        lambda: optim.adamw(0.01),
        lambda: optax.adamw(0.01, b2=0.95, weight_decay=0.1, mask=matrices),
    ),
    "nadamw": (
        lambda: optim.nadamw(0.01, mask=True),
        lambda: optax.nadamw(0.01, b2=0.95, weight_decay=0.1),
    ),
    "lamb": (
        lambda: optim.lamb(0.01, mask=True, trust_mask=True, layer_axis=lambda path: None),
        lambda: optax.lamb(0.01, weight_decay=0.01),
    ),
    "lars without decay": (
        lambda: optim.lars(0.5, weight_decay=0.0, layer_axis=lambda path: None),
        lambda: optax.lars(0.5, trust_ratio_mask=matrices),
    ),
    "lion": (
        lambda: optim.lion(0.01),
        lambda: optax.lion(0.01, weight_decay=1.0, mask=matrices),
    ),
    "sgd": (lambda: optim.sgd(0.01, nesterov=True), lambda: optax.sgd(0.01, momentum=0.9, nesterov=True)),
    "adafactor": (lambda: optim.adafactor(0.01), lambda: optax.adafactor(0.01)),
    "muon": (
        lambda: optim.muon(0.01, mask=True, dimensions=two_dimensional),
        lambda: contrib.muon(0.01, weight_decay=0.1, adam_b2=0.95, consistent_rms=0.2),
    ),
    "schedule_free": (
        lambda: optim.schedule_free(0.01, mask=True),
        lambda: contrib.schedule_free_adamw(0.01, b2=0.95, weight_decay=0.1),
    ),
    "prodigy": (lambda: optim.prodigy(), lambda: contrib.prodigy()),
    "sophia": (
        lambda: optim.sophia(0.01, mask=True),
        lambda: contrib.sophia(0.01, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_same_as_optax(name):
    """Three steps in float32 agree with optax's own optimizer on optax's own clock."""
    paths = [("embedding", "table"), ("zero", "kernel"), ("blocks", "attention", "query_norm", "scale")]

    def loss(params):
        return sum(jnp.vdot(x, x) for x in jax.tree.leaves(params))

    def train(optimizer, params, gradients):
        def step(carry, grads):
            params, state = carry
            updates, state = optax.with_extra_args_support(optimizer).update(grads, state, params, obj_fn=loss)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[0][0]

    ours, theirs = (make() for make in PEERS[name])
    start, gradients = draw(0, 0.5), draw(1, 1.0, 3)
    a, b = jax.jit(lambda *args: (train(ours, *args), train(theirs, *args)))(
        as_tree({path: start[path] for path in paths}, jnp.float32),
        as_tree({path: gradients[path] for path in paths}, jnp.float32),
    )
    # Muon's five Newton-Schulz steps in float32 multiply the rounding; the others only sum in another order.
    tolerance = 1e-4 if name == "muon" else 1e-5
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=1e-6), a, b)
