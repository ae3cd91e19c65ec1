"""Quantised products: against the specification, of awkward numbers, over a mesh, and what is refused."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo import parallel
from crescendo.models import ModelConfig, initialize
from crescendo.models.layout import ONE_DEVICE
from crescendo.models.loss import next_token_loss
from crescendo.models.low_precision import RECIPES, Kernel, check_device, products, reference, rotate
from crescendo.pallas_kernels.op import Device, SecondDerivativeError
from crescendo.pallas_kernels.quantize import power_of_two_scale, quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")
QUANTISED = [name for name, recipe in RECIPES.items() if recipe is not None]
TO_HEADS = Kernel(("embed", "heads", "head_width"), 1)
OF_HEADS = Kernel(("heads", "head_width", "embed"), 2)
# Results are rounded to bfloat16, half of 2^-8 at most. A rotation adds up in another order than the specification's:
# a number near the middle of two of the format's may then go the other way.
TOLERANCE = {"fp8": 4e-3, "fp8-hadamard": 1e-2, "nvfp4": 4e-3}


def error(found, exact) -> float:
    """The norm of the difference to that of the exact array."""
    found, exact = (np.asarray(a, np.float64) for a in (found, exact))
    return float(np.linalg.norm(found - exact) / max(np.linalg.norm(exact), 1e-300))


def operands(kernel: Kernel, seed: int):
    random = np.random.default_rng(seed)
    shape = (32, 4, 16) if kernel.inputs == 1 else (2, 64, 32)
    x = random.normal(size=(2, 16, *shape[: kernel.inputs]))
    dy = random.normal(size=(2, 16, *shape[kernel.inputs :]))
    w = random.normal(size=shape) / 6
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32), jnp.asarray(dy, jnp.bfloat16)


def both_passes(function, x, w, dy):
    y, back = jax.vjp(function, x, w)
    return y, *back(dy.astype(y.dtype))


def product(name: str, kernel: Kernel, layout=ONE_DEVICE):
    return lambda x, w: products(RECIPES[name], x, [w], [kernel], layout)[0]


def specified(name: str, kernel: Kernel):
    """`product` by the specification, which is of matrices."""

    def call(x, w):
        width = int(np.prod(w.shape[: kernel.inputs]))
        y = reference(RECIPES[name], x.reshape(-1, width), w.reshape(width, -1))
        return y.reshape(*x.shape[:2], *w.shape[kernel.inputs :])

    return call


AWKWARD = {
    "normal": lambda a: a,
    "zeros": lambda a: 0 * a,
    "one outlier": lambda a: a.at[(0,) * a.ndim].set(3e4),
    "tiny": lambda a: a * 1e-12,
    "huge": lambda a: a * 1e12,
    "half zeros": lambda a: a.at[1:].set(0),
}


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("fp8", TO_HEADS),
        pytest.param("fp8-hadamard", TO_HEADS, marks=pytest.mark.slow),
        ("nvfp4", TO_HEADS),
        pytest.param("fp8", OF_HEADS, marks=pytest.mark.slow),
        ("fp8-hadamard", OF_HEADS),
    ],
)
def test_a_product_and_its_gradients_are_those_of_the_specification(name, kernel):
    seed = np.random.SeedSequence().entropy
    found = jax.jit(functools.partial(both_passes, product(name, kernel)))
    exact = jax.jit(functools.partial(both_passes, specified(name, kernel)))
    for case, change in AWKWARD.items():
        for which in range(3):
            arrays = list(operands(kernel, seed))
            arrays[which] = change(arrays[which])
            wide = [array.astype(jnp.float32) for array in arrays]
            for part, (a, b) in zip(("y", "dx", "dw"), zip(found(*arrays), exact(*wide), strict=True), strict=True):
                assert error(a, b) <= TOLERANCE[name], (case, which, part, seed)
                assert a.dtype == (jnp.float32 if part == "dw" else jnp.bfloat16)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_product_is_as_near_the_exact_one_as_its_numbers_are(name):
    x, w, dy = operands(TO_HEADS, np.random.SeedSequence().entropy)
    found = jax.jit(functools.partial(both_passes, product(name, TO_HEADS)))(x, w, dy)
    exact = both_passes(lambda x, w: jnp.tensordot(x, w, 1), *(a.astype(jnp.float32) for a in (x, w, dy)))
    # Two operands of independent errors: e4m3 rounds to 2^-4 at most, e5m2 to 2^-3, e2m1 to 2^-2; in the mean to less
    # than half of that.
    most = 0.2 if name == "nvfp4" else 0.09
    assert all(1e-3 < error(a, b) < most for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
def test_what_is_not_finite_or_has_no_scale_is_told(bad):
    x, w, dy = operands(TO_HEADS, 0)
    y, dx, dw = both_passes(product("fp8", TO_HEADS), x.at[0, 0, 0].set(bad), w, dy)
    assert not np.any(np.isfinite(np.asarray(y, np.float32)))
    assert np.all(np.isfinite(np.asarray(dx, np.float32)))
    assert not np.any(np.isfinite(dw))


def equations(jaxpr):
    """All of a program that cast, those in functions that it calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "convert_element_type":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_a_shared_input_is_quantised_once_and_gives_each_product():
    x, w, dy = operands(TO_HEADS, np.random.SeedSequence().entropy)
    weights = [w, w[:, :2] * 7]
    together = lambda x, *w: products(RECIPES["fp8"], x, w, [TO_HEADS] * 2, ONE_DEVICE)  # noqa: E731
    casts = [e.outvars[0].aval.str_short() for e in equations(jax.make_jaxpr(together)(x, *weights).jaxpr)]
    assert casts.count("float8_e4m3fn[2,16,32]") == 1
    results, back = jax.vjp(together, x, *weights)
    dx, *dws = back((dy, dy[:, :, :2]))
    one = functools.partial(both_passes, product("fp8", TO_HEADS), x)
    alone = [one(weights[0], dy), one(weights[1], dy[:, :, :2])]
    for y, dw, (y_alone, _, dw_alone) in zip(results, dws, alone, strict=True):
        np.testing.assert_array_equal(y, y_alone)
        np.testing.assert_array_equal(dw, dw_alone)
    assert error(dx, sum(d.astype(jnp.float32) for _, d, _ in alone)) < 4e-3  # one rounding to bfloat16


def test_weights_that_are_multiplied_as_one_share_a_scale():
    x, w, _ = operands(Kernel(("embed", "mlp"), 1), np.random.SeedSequence().entropy)
    gate, up = (a * s for a, s in zip(jnp.split(w.reshape(32, 64), 2, 1), (1, 3), strict=True))
    dy = jnp.sin(jnp.arange(2 * 16 * 64, dtype=jnp.float32)).reshape(2, 16, 2, 32)
    kernel = Kernel(("embed", None, "mlp"), 1)
    as_one = lambda x, w: products(RECIPES["fp8"], x, [tuple(w)], [kernel], ONE_DEVICE)[0]  # noqa: E731
    found = jax.jit(functools.partial(both_passes, as_one))(x, jnp.stack([gate, up]), dy)
    exact = both_passes(product("fp8", Kernel(("embed", None, "mlp"), 1)), x, jnp.stack([gate, up], 1), dy)
    for a, b in zip(found, (*exact[:2], jnp.moveaxis(exact[2], 1, 0)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name", [name if name == "fp8" else pytest.param(name, marks=pytest.mark.slow) for name in QUANTISED]
)
def test_under_vmap_each_has_scales_of_its_own(name):
    several = [operands(TO_HEADS, seed) for seed in range(3)]
    several = [tuple(a * 100.0**i for a in arrays) for i, arrays in enumerate(several)]
    call = jax.jit(functools.partial(both_passes, product(name, TO_HEADS)))
    stacked = jax.vmap(call)(*(jnp.stack(arrays) for arrays in zip(*several, strict=True)))
    for i, arrays in enumerate(several):
        for a, b in zip(stacked, call(*arrays), strict=True):
            assert error(a[i], b) < 1e-5


def test_rotations_spread_outliers_and_undo_themselves():
    x = np.random.default_rng().normal(size=(32, 3 * 64))
    x[:, 5] *= 1000
    x = jnp.asarray(x, jnp.float32)
    assert jnp.max(jnp.abs(rotate(x, 1))) < 1.1 / 8 * jnp.max(jnp.abs(x))  # an eighth to each of 64, and the others
    np.testing.assert_allclose(rotate(rotate(x, 1), 1), x, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(rotate(x[:, :48].T, 0), rotate(x[:, :48], 1).T, rtol=1e-5, atol=1e-3)


def test_numbers_of_four_bits():
    """The format's eight magnitudes, with a block's scale of 1; of two that are as near the even one."""
    values = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0.2, 0.3, 1.75, 2.5, 5.1, -6, 0.25, 0.75], jnp.float32)
    q = RECIPES["nvfp4"].inputs(values[None], jnp.float32(6), 1, None)
    found = q.rows[0].astype(jnp.float32) * q.inverse
    np.testing.assert_allclose(found, [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, 0.5, 2, 2, 6, -6, 0, 1])


def test_scales_are_powers_of_two_that_just_fit():
    largest = np.float32(10.0 ** np.random.default_rng().uniform(-15, 15, 1000))
    scale, inverse = power_of_two_scale(jnp.asarray(largest), 448.0)
    assert np.all(np.frexp(scale)[0] == 0.5)
    np.testing.assert_array_equal(scale * inverse, 1)
    assert np.all((largest * scale <= 448) & (largest * scale > 224))
    assert [float(a) for a in power_of_two_scale(jnp.float32(0), 448.0)] == [1, 1]


SMALL = ModelConfig(vocab_size=128, width=32, layers=1, heads=4, kv_heads=2, mlp_width=64, matmul="fp8")


def loss_of(config: ModelConfig) -> float:
    """Of a fresh decoder on fixed tokens."""
    parameters = initialize(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, config.vocab_size)
    batch = {"tokens": tokens, "labels": jnp.roll(tokens, -1, 1), "segment_ids": jnp.ones_like(tokens)}
    batch["positions"] = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), tokens.shape)
    loss = jax.jit(functools.partial(next_token_loss, config, implementation="reference"))
    total, weight, *_ = loss(parameters, batch)
    return float(total / weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"experts": 4, "expert_width": 24, "shared_expert_width": 32}, {"shared_layers": True}], ids=str
)
def test_a_model_in_8_bits_is_near_that_in_16(changes):
    config = dataclasses.replace(SMALL, dtype="bfloat16", **changes).for_platform("cpu")
    exact = loss_of(dataclasses.replace(config, matmul="dtype"))
    assert 0 < abs(loss_of(config) - exact) < 0.02


@pytest.mark.parametrize("remat", ["nothing kept", "dots kept"])
def test_layers_in_a_loop_and_computed_again_have_the_same_gradients(remat):
    policy = None if remat == "nothing kept" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    x, w, dy = operands(Kernel(("embed", "mlp"), 1), 0)
    w = jnp.stack([w.reshape(32, 64)[:, :32], w.reshape(32, 64)[:, 32:]])
    layer = product("fp8", Kernel(("embed", "mlp"), 1))

    def unrolled(x, w):
        return layer(layer(x, w[0]), w[1])

    def looped(x, w):
        again = jax.checkpoint(lambda x, w: (layer(x, w), None), policy=policy)
        return jax.lax.scan(again, x, w)[0]

    dy = dy.reshape(x.shape[0], 16, -1)[..., :32]
    found, exact = (jax.jit(functools.partial(both_passes, f))(x, w, dy) for f in (looped, unrolled))
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("sizes", "tolerance"),
    [
        # bfloat16 sums in another order, some of which a cast to 8 bits takes another way.
        ({"fsdp": 4}, 0.02),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 0.02, marks=pytest.mark.slow),
        # Each device has a copy of one of two key heads, and rounds its own part of their gradient to e5m2's 2^-3.
        ({"tensor": 4}, 0.15),
    ],
    ids=str,
)
def test_over_a_mesh_the_results_are_those_of_one_device(sizes, tolerance):
    """To heads and back, as attention does."""
    count = int(np.prod(list(sizes.values())))
    mesh = parallel.make_mesh(**({"data": 1} | sizes), devices=jax.devices()[:count])
    layout = parallel.Layout(mesh, "fsdp").with_heads(4, 2)
    to_keys = Kernel(("embed", "kv_heads", "head_width"), 1)
    x, w, _ = operands(TO_HEADS, np.random.SeedSequence().entropy)
    x = jnp.concatenate([x, 3 * x, -x, x / 2])
    weights = [w, w[:, :2] / 2, w.transpose(1, 2, 0)]

    def there_and_back(x, weights, layout):
        query, key, output = weights
        q, k = products(RECIPES["fp8"], x, (query, key), (TO_HEADS, to_keys), layout)
        mixed = layout.constrain(q + jnp.repeat(k, 4 // k.shape[2], axis=2), ("batch", "length", "heads", None))
        return products(RECIPES["fp8"], mixed, (output,), (OF_HEADS,), layout)[0]

    def run(x, weights, layout):
        call = functools.partial(both_passes, functools.partial(there_and_back, layout=layout))
        return jax.jit(call)(x, weights, jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape))

    names = [TO_HEADS.names, to_keys.names, OF_HEADS.names]
    placed = jax.device_put(weights, layout.parameters(names, weights))
    found = run(jax.device_put(x, layout.rows(("length", None))), placed, layout)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(run(x, weights, ONE_DEVICE)), strict=True):
        assert error(a, b) < tolerance


def test_second_derivatives_are_refused():
    x, w, _ = operands(TO_HEADS, 0)
    of_w = jax.grad(lambda w: jnp.sum(product("fp8", TO_HEADS)(x, w).astype(jnp.float32) ** 2))
    with pytest.raises(SecondDerivativeError, match="a quantised product has no second derivatives: set"):
        jax.jvp(of_w, (w,), (w,))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"matmul": "fp9"}, "matmul = 'fp9' must be one of dtype, fp8, fp8-hadamard, nvfp4"),
        ({"dtype": "float32"}, "matmul = 'fp8' needs dtype = 'bfloat16', not 'float32'"),
        ({"mlp_width": 1000}, "mlp_width = 1000 must be a multiple of 16 with matmul = 'fp8': the nearest are 992 and"),
        ({"width": 200, "head_width": 32}, "width = 200 must be a multiple of 16 .* 192 and 208"),
        ({"kv_heads": 1, "head_width": 40}, "kv_heads x head width = 40 must be a multiple of 16"),
    ],
)
def test_what_a_recipe_cannot_do_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig(**({"matmul": "fp8"} | changes))


def test_devices_without_the_numbers_are_refused_by_name():
    for device in (Device("gpu", "NVIDIA A100-SXM4-80GB", 8.0), Device("tpu", "TPU v5e")):
        with pytest.raises(ValueError, match=f"capability 8.9 or later .*, and not {device.kind}: use 'dtype' there"):
            check_device("fp8", device)
        check_device("nvfp4", device)
    for device in (Device("gpu", "NVIDIA H100 80GB HBM3", 9.0), Device("cpu", "cpu")):
        check_device("fp8", device)


def test_quantize_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match="dtype = int8 must be one of float8_e4m3fn, float8_e5m2"):
        quantize(jnp.ones((2, 2)), jnp.float32(1), dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"inner = 2 must be between 1 and 1 for an array \[2, 2\]"):
        quantize(jnp.ones((2, 2)), jnp.float32(1), dtype=jnp.float8_e5m2, inner=2)
