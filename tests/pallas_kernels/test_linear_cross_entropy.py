"""Linear cross-entropy: precision, chunks, meshes, memory, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from jax.sharding import AbstractDevice, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from crescendo.pallas_kernels import tiles
from crescendo.pallas_kernels.linear_cross_entropy import linear_cross_entropy
from crescendo.pallas_kernels.linear_cross_entropy.specs import FINE, SPECS
from crescendo.pallas_kernels.op import explain, target

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = [spec for spec in SPECS if "small" in spec.tags]
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
EVERY_OPTION = {"z_loss": 1e-2, "label_smoothing": 0.1, "soft_cap": 3.0}


@pytest.fixture
def small_chunks():
    """At most four rows a chunk."""
    with tiles.cut("linear_cross_entropy", "chunks", **FINE["chunks"]):
        yield


def distance(found, expected) -> float:
    """The relative l2 distance; NaN if either has one."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


def scored(implementation, labels, options, x, w, weights, pull=1.0):
    """A loss that pulls at all results, or with `pull` 0 at the loss alone."""
    found = linear_cross_entropy(
        x, w, labels, **{**options, "weights": weights}, return_lse=True, implementation=implementation
    )
    return found[0] + (0.5 * found[1] + jnp.sum(jnp.sin(found[2])) if pull else 0)


def value_and_gradients(implementation, labels, options, *arrays, pull=1.0):
    run = jax.value_and_grad(functools.partial(scored, implementation, labels, options, pull=pull), (0, 1, 2))
    return jax.tree.leaves(jax.jit(run)(*arrays))


def exact(labels, options, *arrays, pull=1.0):
    """By the reference, in float64."""
    wide = [np.asarray(a.astype(jnp.float32), np.float64) for a in arrays]
    with jax.enable_x64(True):
        return value_and_gradients("reference", labels, options, *map(jnp.asarray, wide), pull=pull)


def plain(labels, options, *arrays):
    """What JAX makes of the formula in the inputs' dtype, logits included."""

    def loss(x, w, weights):
        logits = jnp.dot(x, w.T).astype(jnp.float32)
        if (cap := options.get("soft_cap")) is not None:
            logits = cap * jnp.tanh(logits / cap)
        lse = jax.nn.logsumexp(logits, axis=-1)
        smoothing = options.get("label_smoothing", 0.0)
        target = (1 - smoothing) * jax.nn.one_hot(labels, w.shape[0]) + smoothing / w.shape[0]
        losses = lse - jnp.sum(target * logits, axis=-1) + options.get("z_loss", 0.0) * lse**2
        return jnp.sum(losses * weights)

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays))


def unpacked(spec, seed: int):
    """Labels, options and arrays `(x, w, weights)` of a spec's call."""
    (x, w, labels), options = spec.inputs(seed)
    weights = options.pop("weights", jnp.ones(len(labels)))
    if (ignored := options.pop("ignore_id", None)) is not None:
        weights = jnp.where(labels == ignored, 0, weights)
    return labels, options, (x, w, weights)


@pytest.mark.parametrize(
    "spec", [pytest.param(s, id=s.name, marks=() if s.name == "capped" else pytest.mark.slow) for s in SMALL]
)
def test_bfloat16_is_as_exact_as_what_autodiff_makes_of_the_formula(spec, small_chunks):
    labels, options, arrays = unpacked(spec, np.random.default_rng().integers(2**31))
    expected = exact(labels, options, *arrays, pull=0)
    of = lambda results: np.array([distance(f, e) for f, e in zip(results, expected, strict=True)])  # noqa: E731
    errors, of_plain = (
        of(value_and_gradients("xla", labels, options, *arrays, pull=0)),
        of(plain(labels, options, *arrays)),
    )
    assert max(errors) < 1e-2
    # The compiler may keep float32 where the formula says bfloat16: then the results' own rounding alone is left.
    # In a few rows the luck of single roundings shows, up to 1.4 in twelve draws; from 17 rows on 1.05 was the most.
    assert (errors <= (1.2 if len(labels) > 16 else 2.0) * np.maximum(of_plain, 2**-9)).all()


def test_a_scaled_loss_rounds_no_gradient_twice(small_chunks):
    """0.37 is no power of two: gradients that were rounded to bfloat16 before would be off by 2.4e-3."""
    random = np.random.default_rng()
    x, w = (jnp.asarray(random.normal(size=size), jnp.bfloat16) for size in ((64, 96), (200, 96)))
    x, labels = x.at[0].mul(1e-20).at[1].mul(1e-30), jnp.asarray(random.integers(0, 200, 64))

    def gradients(implementation, x, w):
        loss = lambda x, w: 0.37 * linear_cross_entropy(x, w, labels, implementation=implementation)[0]  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(x, w)

    with jax.enable_x64(True):
        expected = gradients("reference", *(jnp.asarray(np.asarray(a, np.float64)) for a in (x, w)))
    for found, exact_one in zip(gradients("xla", x, w), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        assert distance(found, exact_one) < 1.1 * 2**-9


def test_a_row_that_is_not_finite_keeps_its_gradient_so():
    x = jnp.ones((3, 4), jnp.bfloat16).at[1, 0].set(jnp.nan)
    w, labels = jnp.ones((5, 4), jnp.bfloat16), jnp.arange(3)
    dx = jax.grad(lambda x: linear_cross_entropy(x, w, labels, implementation="xla")[0])(x)
    assert jnp.isnan(dx[1]).all()
    assert jnp.isfinite(dx[jnp.array([0, 2])]).all()


@settings(max_examples=4, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([{}, {"z_loss": 0.1}, {"soft_cap": 2.0, "label_smoothing": 0.3}]),
    st.integers(0, 2**31 - 1),
)
def test_any_shape_and_any_ignored_rows(n, d, v, options, seed):
    random = np.random.default_rng(seed)
    x, w = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((n, d), (v, d)))
    labels = jnp.asarray(np.where(random.random(n) < 0.3, -100, random.integers(0, v, n)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *arrays):
        return jax.value_and_grad(functools.partial(losses, implementation), (0, 1), has_aux=True)(*arrays)

    def losses(implementation, *arrays):
        sums = linear_cross_entropy(*arrays, labels, ignore_id=-100, **options, implementation=implementation)
        return sums[0], sums

    found, expected = (run(name, x, w) for name in ("xla", "reference"))
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=2e-5, atol=2e-5), found, expected)
    assert found[0][1][1] == jnp.sum(labels != -100)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("by", ["ignore_id", "weights"])
def test_rows_that_count_nothing_may_hold_anything(implementation, by, small_chunks):
    random = np.random.default_rng(0)
    x, w = (jnp.float32(random.normal(size=shape)) for shape in ((9, 4), (11, 4)))
    ignored = jnp.asarray(random.random(9) < 0.4)
    labels = jnp.where(ignored, -100, jnp.asarray(random.integers(0, 11, 9)))
    options = {"ignore_id": -100} if by == "ignore_id" else {"weights": jnp.where(ignored, 0.0, 0.5)}

    @jax.jit
    def run(value):
        loss = lambda x, w: linear_cross_entropy(  # noqa: E731
            x, w, labels, **options, **EVERY_OPTION, implementation=implementation
        )[0]
        return jax.value_and_grad(loss, (0, 1))(jnp.where(ignored[:, None], value, x), w)

    expected = jax.tree.leaves(run(0.0))
    assert not np.any(expected[1][ignored])
    for value in (np.nan, np.inf, -np.inf, 3e38):
        for result, array in zip(jax.tree.leaves(run(value)), expected, strict=True):
            np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_float16_loses_no_gradients(implementation):
    """One label in 60,000, weights of a mean over 4,096 rows: gradients of logits are below float16's least number."""
    random = np.random.default_rng(0)
    labels, weights = jnp.arange(4), jnp.full(4, 1 / 4096)
    x, w = (jnp.asarray(random.normal(size=shape), jnp.float16) for shape in ((4, 8), (60_000, 8)))

    def gradients(implementation, *arrays):
        loss = lambda x, w: linear_cross_entropy(x, w, labels, weights=weights, implementation=implementation)[0]  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(*arrays)

    exact_dx, exact_dw = gradients("reference", x.astype(jnp.float32), w.astype(jnp.float32))
    dx, dw = gradients(implementation, x, w.astype(jnp.float32))
    assert distance(dx, exact_dx) < 2e-3  # its own rounding, at 1e-5 or so
    assert distance(dw[4:], exact_dw[4:]) < 1e-3


def test_derivatives_that_are_not_there_are_refused_by_name():
    x, w, labels = jnp.ones((2, 3)), jnp.ones((5, 3)), jnp.array([1, 4])
    loss = lambda x, implementation: linear_cross_entropy(x, w, labels, implementation=implementation)[0]  # noqa: E731
    second = lambda x, implementation: jnp.sum(jax.grad(loss)(x, implementation) ** 2)  # noqa: E731
    for differentiate in (jax.grad(second), jax.jit(jax.grad(second), static_argnums=1)):
        with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivatives: pass implement"):
            differentiate(x, "xla")
        assert jnp.isfinite(differentiate(x, "reference")).all()
    with pytest.raises(TypeError, match=r"linear_cross_entropy by xla has no forward-mode derivative .*'reference'"):
        jax.jvp(lambda x: loss(x, "xla"), (x,), (x,))
    assert jnp.isfinite(jax.jvp(lambda x: loss(x, "reference"), (x,), (x,))[1])


def test_results_do_not_depend_on_the_chunks(small_chunks):
    labels, options, arrays = unpacked(SPECS[-1], 3)
    many = value_and_gradients("xla", labels, options, *arrays)
    with tiles.cut("linear_cross_entropy", "chunks", least_rows=10**6):
        one = value_and_gradients("xla", labels, options, *arrays)
    # The chunks' parts of dW are added in another order.
    assert max(distance(f, e) for f, e in zip(many, one, strict=True)) < 2**-9


def test_logits_are_of_one_chunk_at_a_time_and_dw_is_computed_where_wanted(small_chunks):
    n, d, v = 64, 8, 4096
    x, w = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((v, d), jnp.float32)
    labels = jnp.zeros(n, jnp.int32)
    loss = lambda x, w: linear_cross_entropy(x, w, labels, implementation="xla")[0]  # noqa: E731

    def compiled(argnums):
        return jax.jit(jax.grad(loss, argnums)).lower(x, w).compile()

    both, of_x = compiled((0, 1)), compiled(0)
    assert both.memory_analysis().temp_size_in_bytes < n * v * 4 / 2
    assert f"f32[{n},{v}]" not in both.as_text()
    assert f"f32[{v},{d}]{{1,0}} dot" in both.as_text()
    assert f"f32[{v},{d}]{{1,0}} dot" not in of_x.as_text()


def test_leading_axes_and_vmap(small_chunks):
    random = np.random.default_rng()
    x, w = jnp.asarray(random.normal(size=(2, 3, 8))), jnp.asarray(random.normal(size=(11, 8)))
    labels = jnp.asarray(random.integers(0, 11, (2, 3)))
    loss = lambda x, w, labels: linear_cross_entropy(x, w, labels, implementation="xla")[0]  # noqa: E731
    flat = jax.grad(loss, (0, 1))(x.reshape(6, 8), w, labels.ravel())
    together = jax.grad(loss, (0, 1))(x, w, labels)
    mapped = jax.vmap(jax.grad(loss, (0, 1)), (0, None, 0))(x, w, labels)
    alone = jax.grad(loss, (0, 1))(x[1, 2], w, labels[1, 2])
    np.testing.assert_allclose(alone[0], flat[0][5], atol=1e-6)
    np.testing.assert_allclose(together[0].reshape(6, 8), flat[0], atol=1e-6)
    np.testing.assert_allclose(mapped[0], together[0], atol=1e-6)
    np.testing.assert_allclose(mapped[1].sum(0), flat[1], atol=1e-5)
    np.testing.assert_allclose(together[1], flat[1], atol=1e-5)


@pytest.fixture(scope="module")
def call():
    random = np.random.default_rng(5)
    x, w = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((48, 16), (64, 16)))
    return jnp.asarray(random.integers(0, 64, 48)), (x, w, jnp.asarray(random.random(48), jnp.float32))


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def test_rows_and_vocabulary_split_by_the_partitioner(call, small_chunks):
    labels, arrays = call
    mesh = mesh_of(AxisType.Auto)
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(arrays, (P("data"), P("model"), P("data")), strict=True)
    ]
    run = jax.jit(jax.value_and_grad(functools.partial(scored, "xla", labels, EVERY_OPTION), (0, 1, 2)))
    compiled = run.lower(*placed).compile()
    found = jax.tree.leaves(compiled(*placed))
    for f, e in zip(found, exact(labels, EVERY_OPTION, *arrays), strict=True):
        assert distance(f, e) < 1e-5
    assert found[2].sharding.spec == P("model")
    moved = re.findall(r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce)", compiled.as_text())
    assert {kind for _, kind in moved} == {"all-reduce"}
    # Logits of a chunk on a device are [3, 32] (12 rows on each of four, at most four in a chunk).
    assert not any(re.search(r"\[\d+,(32|64)\]", shapes) for shapes, _ in moved)


def test_explicit_mesh(call, small_chunks):
    labels, arrays = call
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, spec) for a, spec in zip(arrays, (P("data"), P("model"), P("data")), strict=True)]
        found = value_and_gradients("xla", jax.device_put(labels, P("data")), EVERY_OPTION, *placed)
    for f, e in zip(found, exact(labels, EVERY_OPTION, *arrays), strict=True):
        assert distance(f, e) < 1e-5


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_vocabulary_axis_inside_shard_map(call, small_chunks, implementation):
    labels, arrays = call
    mesh = mesh_of(AxisType.Auto)

    def local(x, w, weights, labels):
        loss, weight, lse = linear_cross_entropy(
            *(x, w, labels), weights=weights, **EVERY_OPTION, vocab_axis="model", return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        loss, weight, sine = jax.lax.psum((loss, weight, jnp.sum(jnp.sin(lse))), "data")
        return loss + 0.5 * weight + sine

    rows = P("data")
    # The gathered table varies over the axis by type, and so does what the reference makes of it.
    fn = local if implementation == "xla" else lambda *a: jax.lax.pmean(local(*a), "model")
    whole = jax.shard_map(fn, mesh=mesh, in_specs=(rows, P("model"), rows, rows), out_specs=P())
    loss, gradients = jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(*arrays, labels)
    expected = exact(labels, EVERY_OPTION, *arrays)
    assert distance(loss, expected[0]) < 1e-5
    if implementation == "xla":
        for f, e in zip(gradients, expected[1:], strict=True):
            assert distance(f, e) < 1e-5


def test_a_float32_table_beside_bfloat16_rows_keeps_its_gradient_in_float32():
    labels, options, (x, w, weights) = unpacked(SPECS[-1], 4)
    gradient = value_and_gradients("xla", labels, options, x, w.astype(jnp.float32), weights)[2]
    assert gradient.dtype == jnp.float32
    assert distance(gradient, exact(labels, options, x, w, weights)[2]) < 2**-8


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_labels_of_a_narrow_dtype_wrap_nothing_around(dtype):
    random = np.random.default_rng()
    x, w = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((128, 4), (300, 4)))
    labels = jnp.asarray(random.permutation(128))  # 300 is 44 in 8 bits, -200 is 56
    found = linear_cross_entropy(x, w, labels.astype(dtype), ignore_id=-200)
    assert found == linear_cross_entropy(x, w, labels, ignore_id=-200)


def test_labels_out_of_range_make_the_loss_nan_or_are_reported():
    x, w = jnp.ones((3, 4)), jnp.ones((8, 4))
    labels, weights = jnp.array([0, 8, -1]), jnp.array([1.0, 1.0, 0.0])
    gradient = jax.grad(lambda x: linear_cross_entropy(x, w, labels, weights=weights)[0])(x)
    assert jnp.isnan(linear_cross_entropy(x, w, labels, weights=weights)[0])
    assert jnp.isnan(gradient[1]).all()
    assert jnp.isfinite(linear_cross_entropy(x, w, labels, weights=weights.at[1].set(0))[0])
    assert jnp.isfinite(linear_cross_entropy(x, w, labels.at[1].set(-1), ignore_id=-1)[0])
    with pytest.raises(ValueError, match=r"in \[0, 8\).*1 are not.*labels\[1\] = 8"):
        linear_cross_entropy(x, w, labels, weights=weights, checked=True)
    traced = jax.jit(lambda labels: linear_cross_entropy(x, w, labels, weights=weights, checked=True)[0])
    error, _ = checkify.checkify(traced)(labels)
    with pytest.raises(checkify.JaxRuntimeError, match=r"labels must be in \[0, 8\).* 8 found"):
        error.throw()
    error, loss = checkify.checkify(traced)(labels.at[1].set(7))
    assert error.get() is None
    assert jnp.isfinite(loss)


X, W, Y = jnp.ones((3, 4)), jnp.ones((8, 4)), jnp.zeros(3, jnp.int32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, W[:, :3], Y), {}, ValueError, r"x \[3, 4\] .* w \[8, 3\]"),
        ((X, W[0], Y), {}, ValueError, r"w \[4\]"),
        ((X, W, Y[:2]), {}, ValueError, r"labels \[2\] .* x \[3, 4\]"),
        ((X, W, Y), {"weights": jnp.ones(4)}, ValueError, r"weights \[4\]"),
        ((X, W[:0], Y), {}, ValueError, "at least one row"),
        ((X, W, Y), {"soft_cap": 0.0}, ValueError, "soft_cap = 0.0"),
        ((X, W, Y), {"label_smoothing": 1.0}, ValueError, "label_smoothing = 1.0"),
        ((X, W, Y), {"z_loss": -1.0}, ValueError, "z_loss = -1.0"),
        ((X, W, Y), {"vocab_axis": "model"}, ValueError, "vocab_axis = 'model'"),
        ((X, W, Y * 1.0), {}, TypeError, "labels is float32"),
        ((Y, W, Y), {}, TypeError, "x is int32"),
        ((X, W, Y), {"implementation": "triton"}, NotImplementedError, "triton: .*'xla' or 'reference' serves"),
    ],
)
def test_mistakes_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*arguments, **options)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_kernel_for_hopper_serves_whole_tiles(spec):
    arguments, options = spec.abstract()
    with target(H100):
        answers = explain(linear_cross_entropy, *arguments, **options).answers
    reason = next(answer.reason for answer in answers if answer.implementation == "mosaic_gpu")
    vocab_size, width = arguments[1].shape
    assert bool(reason) == bool(vocab_size % 128 or width % 64 or width < 192 or "capped" in spec.name)
