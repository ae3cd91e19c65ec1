"""What every exported optimizer and transform must do; new ones are found by themselves."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as orbax

from crescendo import optim

EXPORTED = optim.OPTIMIZERS | optim.TRANSFORMS
# Rates at which the test functions are solved; what isn't listed uses Adam's.
RATES = {
    **{"sgd": 0.02, "lars": 3.0, "lamb": 0.05, "adafactor": 0.1, "prodigy": 1.0, "muon": 0.3},
    **{"adagrad": 1.0, "adagrad_norm": 6.0},
}
ADAM_RATE = 0.05
ONLY_REAL = {"prodigy", "sophia"}


def rate(name):
    """The peak learning rate to test with."""
    return RATES.get(name, ADAM_RATE)


def make(name, **options):
    """The exported transform; one that takes a learning rate is given a schedule over 640 examples."""
    if "learning_rate" in inspect.signature(EXPORTED[name]).parameters:
        options.setdefault("learning_rate", optim.schedules.linear(rate(name), 640))
    return EXPORTED[name](**options)


def random_tree(seed, dtype=jnp.float32):
    """Stacked and single layers, matrices and vectors; every last axis can be cut in 8."""
    shapes = {"blocks": {"mlp": {"kernel": (2, 4, 8), "bias": (2, 8)}}, "head": {"kernel": (4, 8)}}
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def half_square(params):
    """A loss, for optimizers which ask for one."""
    return sum(jnp.sum(jnp.asarray(x, jnp.float32) ** 2) / 2 for x in jax.tree.leaves(params))


@functools.cache
def jitted(name):
    """(init, step) of one transform; the step is compiled once for all the tests."""
    transform = make(name)

    def step(grads, state, params, examples_seen):
        updates, state = transform.update(
            grads, state, params, examples_seen=examples_seen, loss=1.0, obj_fn=half_square, unknown="argument"
        )
        return updates, optax.apply_updates(params, updates), state

    return transform.init, jax.jit(step)


@functools.cache
def two_steps(name, dtype=jnp.float32):
    """Updates, parameters and state after two steps on random gradients."""
    init, step = jitted(name)
    params = random_tree(0, dtype)
    state = init(params)
    for i in (1, 2):
        updates, params, state = step(random_tree(i, dtype), state, params, jnp.int32(32 * i))
    return updates, params, state


def types(tree):
    """Shape, dtype and weak type of every leaf: what jit keys its cache on."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, jax.typeof(x).weak_type), tree)


def assert_close(actual, expected, tolerance):
    """The error of every leaf is at most `tolerance` times the leaf, in the l2 norm."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), f"{jax.tree_util.keystr(path)}: {a} {b}"


def test_every_public_name_is_documented_and_exported():
    assert set(optim.__all__) >= {*optim.OPTIMIZERS, *optim.TRANSFORMS, *optim.COMBINATORS}
    for name in optim.__all__:
        assert hasattr(optim, name), name
        assert inspect.getdoc(getattr(optim, name)), name


@pytest.mark.parametrize("name", EXPORTED)
def test_extra_arguments_and_no_recompilation(name):
    """Two steps with arguments the transform doesn't know, at two clocks: one compilation."""
    updates, params, state = two_steps(name)
    assert jitted(name)[1]._cache_size() == 1
    assert types(params) == types(random_tree(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, params, state)))


@pytest.mark.parametrize("name", EXPORTED)
def test_nothing_is_nan_where_everything_is_zero(name):
    """Parameters and gradients of 0: the state, an update and the reports; what runs eagerly, at any point of it."""
    zeros = jax.tree.map(jnp.zeros_like, random_tree(0))
    transform, (_, step) = make(name), jitted(name)
    with jax.debug_nans(True):
        state = transform.init(zeros)
        optim.reported(state)
        one = {"kernel": jnp.zeros((2, 2))}
        transform.update(one, transform.init(one), one, examples_seen=0, obj_fn=half_square)
        updates, params, state = step(zeros, state, zeros, jnp.int32(0))
        optim.reported(state)
    assert not any(np.isnan(x).any() for x in jax.tree.leaves((updates, params, state)))


@pytest.mark.parametrize("name", ["lars", "lamb", "scale_by_layer_trust_ratio", "scale_by_adagrad_norm"])
@pytest.mark.parametrize("still", ["parameters", "gradients"])
def test_the_derivative_of_a_step_is_finite_where_a_norm_is_zero(name, still):
    """By parameters and gradients both, such as a learned optimizer or a hypergradient takes it."""
    zeros = jax.tree.map(jnp.zeros_like, random_tree(0))
    params, grads = (zeros, random_tree(1)) if still == "parameters" else (random_tree(0), zeros)
    transform = make(name, **({"initial_accumulator": 0.0} if name == "scale_by_adagrad_norm" else {}))

    def total(params, grads):
        return half_square(transform.update(grads, transform.init(zeros), params, examples_seen=0)[0])

    by = (0,) if name == "lamb" else (0, 1)  # Adam's root has no derivative at a gradient of 0, in optax either
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(jax.grad(total, by))(params, grads)))


def test_the_derivative_of_a_lars_step_at_zero_is_that_of_its_decay():
    """There the trust ratio is 1: w - 0.1 (g + w)."""
    optimizer = optim.lars(0.1, weight_decay=1.0, momentum=0.0, mask=True, trust_mask=True)

    def moved(w):
        return optax.apply_updates(w, optimizer.update(jnp.ones(()), optimizer.init(w), w)[0])

    np.testing.assert_allclose(jax.grad(moved)(jnp.zeros(())), 0.9, rtol=1e-6)


@pytest.mark.parametrize("name", [*EXPORTED, "average_weights"])
def test_parameters_may_be_python_numbers(name):
    """As in optax: an update is that of arrays, and so are the state and its types."""
    plain = {"head": {"kernel": [[3.0, -4.0]], "bias": 2.0}}
    arrays = jax.tree.map(jnp.asarray, plain, is_leaf=lambda x: isinstance(x, list))
    plain["head"]["kernel"] = np.array(plain["head"]["kernel"], np.float32)
    transform = optim.average_weights(optim.sgd(0.1), 10) if name == "average_weights" else make(name)
    results = []
    for params in (plain, arrays):
        state = transform.init(params)
        updates, after = transform.update(params, state, params, examples_seen=0, obj_fn=half_square)
        assert types(after) == types(state)
        results.append((updates, after, optim.evaluation_params(after, params)))
    assert_close(*results, 1e-6)


@pytest.mark.parametrize("name", sorted(EXPORTED.keys() - ONLY_REAL))
def test_complex_numbers_are_taken_by_their_size(name):
    """Rows of parameters and gradients turned by a phase each have the same updates, turned alike.

    A square without a conjugate would know the phase. So would a matrix product, hence one phase for a matrix's row.
    """
    params, grads = random_tree(0), random_tree(1)
    phases = jax.tree.map(lambda x: jnp.resize(jnp.array([1, 1j, -1j]), x.shape[:-1])[..., None], params)
    phases["blocks"]["mlp"]["bias"] = jnp.complex64(1j)
    init, step = jitted(name)

    def two_updates(params, grads):
        state, moved = init(params), params
        for i in range(2):
            updates, moved, state = step(grads, state, moved, jnp.int32(32 * i))
        return updates, optim.reported(state)

    turned = [jax.tree.map(jnp.multiply, phases, tree) for tree in (params, grads)]
    (updates, report), (found, same_report) = two_updates(params, grads), two_updates(*turned)
    assert_close(found, jax.tree.map(jnp.multiply, phases, updates), 1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), same_report, report)


@pytest.mark.parametrize("name", sorted(ONLY_REAL))
def test_who_can_not_take_complex_numbers_refuses_them(name):
    with pytest.raises(ValueError, match=f"{name} takes real parameters and w is complex64"):
        make(name).init({"w": jnp.ones(2, jnp.complex64)})


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_the_rate_follows_examples_seen_and_is_in_the_state(name):
    """The second of two steps was at 64 of 640 examples."""
    used = optax.tree_utils.tree_get(two_steps(name)[2], "learning_rate")
    np.testing.assert_allclose(used, rate(name) * 0.9, rtol=1e-6)


@pytest.mark.parametrize("name", EXPORTED)
def test_dtype_is_preserved(name):
    """bfloat16 in, bfloat16 out, and a state whose types never change."""
    init, step = jitted(name)
    params = random_tree(0, jnp.bfloat16)
    state = jax.eval_shape(init, params)
    updates, _, after = jax.eval_shape(step, random_tree(1, jnp.bfloat16), state, params, jnp.int32(0))
    assert types(updates) == types(params)
    assert types(after) == types(state)


@pytest.mark.parametrize("name", EXPORTED)
def test_stable_under_cond(name):
    """A step that is sometimes skipped type-checks."""
    init, step = jitted(name)
    params = random_tree(0)

    def maybe(skip, state):
        return jax.lax.cond(skip, lambda: (params, state), lambda: step(params, state, params, jnp.int32(0))[1:])

    assert types(jax.eval_shape(maybe, True, init(params))[1]) == types(init(params))


@pytest.mark.parametrize("name", EXPORTED)
def test_tree_map_params(name):
    """Arrays that mirror the parameters can be found in the state and mapped, and nothing else is touched."""
    params = random_tree(0)
    state = jitted(name)[0](params)
    marked = optax.tree_map_params(make(name), lambda x: "param", state, transform_non_params=lambda x: "other")
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    shapes = {x.shape for x in jax.tree.leaves(params)}
    for mark, x in zip(jax.tree.leaves(marked), jax.tree.leaves(state), strict=True):
        # A placeholder of shape [1] is what optax's Adafactor keeps where it doesn't factor.
        assert mark == "other" or x.shape in shapes | {(1,)}, f"{x.shape} is taken for a parameter"
        assert mark == "param" or x.ndim <= 2


@pytest.mark.parametrize("name", EXPORTED)
def test_injectable(name):
    """Float options can be injected as state (counts and flags are structure), and nothing changes by it."""
    factory, parameters = EXPORTED[name], inspect.signature(EXPORTED[name]).parameters
    structural = [key for key, p in parameters.items() if isinstance(p.default, int)]
    options = {"learning_rate": rate(name)} if "learning_rate" in parameters else {}
    injected = optax.inject_hyperparams(factory, static_args=structural)(**options)

    @jax.jit
    def step(grads, params):
        return injected.update(grads, injected.init(params), params, obj_fn=half_square, unknown=1)[0]

    init, plain = jitted(name)
    params, grads = random_tree(0), random_tree(1)
    expected = plain(grads, init(params), params, jnp.int32(0))[0]
    assert_close(step(grads, params), expected, 1e-5)  # 1 - b in float32 instead of Python's float64


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """The states of all transforms after two steps, through one orbax checkpoint."""
    states = {name: two_steps(name)[2] for name in EXPORTED}
    path = tmp_path_factory.mktemp("checkpoint") / "states"
    orbax.save_pytree(path, states)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
    return orbax.load_pytree(path, abstract)


@pytest.mark.parametrize("name", EXPORTED)
def test_orbax_round_trip(name, restored):
    state = two_steps(name)[2]
    assert jax.tree.structure(restored[name]) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored[name], state)


@pytest.mark.parametrize("name", EXPORTED)
def test_sharded_equals_unsharded(name):
    """Everything cut in 8 along its last axis: norms must still be those of the whole layer."""
    init, step = jitted(name)
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def cut(x):
        axes = [*[None] * (x.ndim - 1), "x"] if x.ndim and x.shape[-1] % 8 == 0 else []
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    arguments = random_tree(1), init(random_tree(0)), random_tree(0), jnp.int32(32)
    assert_close(step(*jax.tree.map(cut, arguments))[:2], step(*arguments)[:2], 1e-6)


def problems():
    """Test functions by name, each (loss, start): a skewed quadratic, a ravine, least squares with stacked layers."""
    rng = np.random.default_rng(0)
    skew = jnp.asarray(np.logspace(-1, 1, 8).reshape(2, 4), jnp.float32)
    inputs = jnp.asarray(rng.standard_normal((32, 4)), jnp.float32)
    targets = jnp.tanh(inputs @ jnp.asarray(rng.standard_normal((4, 4)), jnp.float32))

    def quadratic(w):
        return jnp.sum(skew * (w["kernel"] - 1) ** 2) / 2

    def ravine(w):
        x, y = w["x_y"]
        return jnp.sum((1 - x) ** 2 + 10 * (y - x**2) ** 2) / 10

    def network(w):
        hidden = jnp.tanh(inputs @ w["blocks"]["kernel"][0] + w["blocks"]["bias"][0])
        return jnp.mean((hidden @ w["blocks"]["kernel"][1] + w["blocks"]["bias"][1] - targets) ** 2)

    kernels = jnp.asarray(rng.standard_normal((2, 4, 4)) / 2, jnp.float32)
    return {
        "quadratic": (quadratic, {"kernel": jnp.full((2, 4), 3.0)}),
        "ravine": (ravine, {"x_y": jnp.array([[-0.5, 0.5, 1.5, 2.0], [1.0, -1.0, 0.0, 2.0]])}),
        "network": (network, {"blocks": {"kernel": kernels, "bias": jnp.zeros((2, 4))}}),
    }


# Whose every step is that of the maths in float64 (`test_rules.py`).
BY_THE_MATHS = {"adamw", "nadamw", "lamb", "lars", "lion", "sgd"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in BY_THE_MATHS else ()) for name in optim.OPTIMIZERS],
)
def test_converges(name):
    """Linear decay to 0 over 400 steps brings every test function below 5% of where it started."""
    functions = problems()
    start = {key: params for key, (_, params) in functions.items()}

    def losses(params):
        return {key: loss(params[key]) for key, (loss, _) in functions.items()}

    def total(params):
        return sum(losses(params).values())

    steps = 400
    decay = {"weight_decay": 0.0} if "weight_decay" in inspect.signature(EXPORTED[name]).parameters else {}
    optimizer = make(name, learning_rate=optim.schedules.linear(rate(name), steps), **decay)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(total)(params), state, params, obj_fn=total)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return losses(optim.evaluation_params(state, params))

    before, after = losses(start), train(start)
    print(name, {key: float(after[key] / before[key]) for key in before})
    for key in before:
        assert after[key] < 0.05 * before[key], f"{key}: {before[key]} -> {after[key]}"
