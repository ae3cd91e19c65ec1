"""RMSNorm and norm with rotary positions: per-example norms, who serves, meshes, errors."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from crescendo.pallas_kernels.op import explain, target
from crescendo.pallas_kernels.rms_norm import qk_norm_rotary, rms_norm
from crescendo.pallas_kernels.rms_norm.specs import ROTARY_SPECS

pytestmark = pytest.mark.usefixtures("quick_compilation")
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31 - 1))
def test_the_mean_square_is_one_and_lengths_do_not_matter(shape, seed):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=shape) + 0.1, jnp.float32)
    norm = jax.jit(lambda x: rms_norm(x, jnp.ones(shape[-1]), eps=0.0, implementation="xla"))
    y = norm(x)
    np.testing.assert_allclose(jnp.mean(y * y, -1), 1, rtol=1e-5)
    np.testing.assert_allclose(norm(-7 * x), -y, rtol=1e-4)
    # So a gradient is orthogonal to x.
    dx = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(norm(x)))))(x)
    np.testing.assert_allclose(jnp.sum(dx * x, -1), 0, atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_probe_is_given_the_squared_norms_of_per_example_gradients_of_all_layers(implementation):
    random = np.random.default_rng()
    x = jnp.asarray(random.normal(size=(3, 5, 8)), jnp.float32)
    scales = [jnp.asarray(random.normal(size=8), jnp.float32) for _ in range(2)]

    def loss(scales, x, probe=None):
        for scale in scales:
            x = jnp.sin(rms_norm(x, scale, eps=1e-5, probe=probe, implementation=implementation))
        return jnp.sum(x)

    alone = [jax.grad(loss)(scales, x[b : b + 1]) for b in range(3)]
    expected = [sum(jnp.sum(g**2) for g in gradients) for gradients in alone]
    gradients, norms = jax.grad(loss, (0, 2))(scales, x, jnp.zeros(3))
    np.testing.assert_allclose(norms, expected, rtol=1e-4)
    for g, e in zip(gradients, jax.grad(loss)(scales, x), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5)


def test_rows_split_over_devices_equal_the_whole():
    random = np.random.default_rng()
    x = jnp.asarray(random.normal(size=(64, 24)), jnp.float32)
    scale = jnp.asarray(random.normal(size=24), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    loss = lambda x, scale: jnp.sum(jnp.sin(rms_norm(x, scale, eps=1e-5, implementation="xla")))  # noqa: E731
    run = jax.jit(jax.grad(loss, (0, 1)))
    placed = jax.device_put(x, NamedSharding(mesh, P("data"))), jax.device_put(scale, NamedSharding(mesh, P()))
    compiled = run.lower(*placed).compile()
    for f, e in zip(compiled(*placed), run(x, scale), strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-5)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize(
    ("device", "chosen"),
    [(H100, {"triton", "xla"}), (AbstractDevice("TPU v5e", 1, "tpu"), {"reference"}), (None, {"reference"})],
    ids=["gpu", "tpu", "cpu"],
)
def test_norms_with_rotation_are_fused_on_gpus_only(device, chosen):
    arguments, options = ROTARY_SPECS[0].abstract()
    with contextlib.nullcontext() if device is None else target(device):
        assert explain(qk_norm_rotary, *arguments, **options).chosen in chosen  # triton where it is installed


def test_scales_for_each_example_have_the_gradients_of_the_broadcast_ones():
    random = np.random.default_rng()
    q, k, rows = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((3, 6, 4, 8), (3, 6, 2, 8), (3, 8)))
    angle = jnp.asarray(random.normal(size=(3, 6, 4)), jnp.float32)

    def loss(q_scale, k_scale):
        turned = qk_norm_rotary(q, k, q_scale, k_scale, jnp.cos(angle), jnp.sin(angle), eps=1e-6)
        return sum(jnp.sum(jnp.sin(x)) for x in turned)

    by_example = jax.grad(loss, (0, 1))(rows, rows)
    alone = [jax.grad(lambda s, b=b: loss(rows.at[b].set(s), rows.at[b].set(s)))(rows[b]) for b in range(3)]
    np.testing.assert_allclose(by_example[0] + by_example[1], jnp.stack(alone), rtol=1e-5, atol=1e-5)


X, S = jnp.ones((2, 3, 4)), jnp.ones(4)
Q, A = jnp.ones((2, 3, 2, 4)), jnp.ones((1, 3, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm(X, jnp.ones(3), eps=0), ValueError, r"scale \[3\] .* x \[2, 3, 4\]"),
        (lambda: rms_norm(X, jnp.ones((3, 4)), eps=0), ValueError, r"scale \[3, 4\]"),
        (lambda: rms_norm(X, S, eps=-1.0), ValueError, "eps = -1.0"),
        (lambda: rms_norm(X, S, eps=None), TypeError, "eps must be a Python number, not None"),
        (lambda: jax.jit(rms_norm)(X, S, eps=1e-5), TypeError, "eps must be a Python number, not JitTracer"),
        (lambda: rms_norm(X, S, eps=0, residual=X[0]), ValueError, r"residual float32\[3, 4\]"),
        (lambda: rms_norm(X, S, eps=0, residual=X.astype(jnp.bfloat16)), TypeError, "residual bfloat16"),
        (lambda: rms_norm(X, S, eps=0, probe=jnp.zeros(3)), ValueError, r"probe \[3\]"),
        (lambda: rms_norm(X.astype(int), S, eps=0), TypeError, "x is int32"),
        (lambda: rms_norm(X, S, eps=0, implementation="triton"), NotImplementedError, "'xla' or 'reference' serves"),
        (lambda: qk_norm_rotary(Q, Q[:1], S, S, A, A, eps=0), ValueError, r"k \[1, 3, 2, 4\]"),
        (lambda: qk_norm_rotary(Q[..., :3], Q[..., :3], S, S, A, A, eps=0), ValueError, "width 3 must be even"),
        (lambda: qk_norm_rotary(Q, Q, S[:2], S, A, A, eps=0), ValueError, r"q_scale \[2\]"),
        (lambda: qk_norm_rotary(Q, Q, S, S, A[..., 0], A, eps=0), ValueError, r"cosine \[1, 3\]"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
