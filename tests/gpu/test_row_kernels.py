"""Softmax, RMSNorm and linear cross-entropy natively, on fresh inputs, against XLA in float32 on the same inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.pallas_kernels.linear_cross_entropy import chunked, linear_cross_entropy
from crescendo.pallas_kernels.linear_cross_entropy.specs import SPECS as ENTROPY_SPECS
from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.rms_norm import qk_norm_rotary, rms_norm
from crescendo.pallas_kernels.rms_norm.specs import ROTARY_SPECS
from crescendo.pallas_kernels.rms_norm.specs import SPECS as NORM_SPECS
from crescendo.pallas_kernels.softmax import log_softmax, softmax
from crescendo.pallas_kernels.softmax.specs import SPECS as SOFTMAX_SPECS

pytestmark = pytest.mark.gpu
OPS = [
    (softmax, SOFTMAX_SPECS),
    (log_softmax, SOFTMAX_SPECS),
    (rms_norm, NORM_SPECS),
    (qk_norm_rotary, ROTARY_SPECS),
    (linear_cross_entropy, ENTROPY_SPECS),
]
SMALL = [(op, spec) for op, specs in OPS for spec in specs if "small" in spec.tags]


def name(value):
    return getattr(value, "name", None) or getattr(value, "__name__", None)


def results(op, implementation, arguments, options, seed):
    """The results, and the gradients of the floating arguments for random cotangents."""
    named = {n: a for n, a in options.items() if isinstance(a, jax.Array)}
    fixed = {n: a for n, a in options.items() if n not in named}
    floating = [i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating)]

    @jax.jit
    def run(arguments, named, key):
        def of(differentiable):
            merged = list(arguments)
            for i, value in zip(floating, differentiable, strict=True):
                merged[i] = value
            return jax.tree.leaves(op(*merged, **named, **fixed, implementation=implementation))

        y, back = jax.vjp(of, [arguments[i] for i in floating])
        cotangents = [jax.random.normal(key, a.shape).astype(a.dtype) for a in y]
        return y, back(cotangents)

    return jax.tree.leaves(run(arguments, named, jax.random.key(seed)))


def widened(tree):
    widen = lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731
    return jax.tree.map(lambda a: widen(a) if isinstance(a, jax.Array) else a, tree)


def assert_close(found, expected, tolerance):
    for f, e in zip(found, expected, strict=True):
        f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
        finite = np.isfinite(e)
        assert (np.isfinite(f) == finite).all()
        # Where a gradient vanishes analytically the error is absolute.
        assert np.linalg.norm((f - e)[finite]) <= tolerance * max(np.linalg.norm(e[finite]), 1.0)


@pytest.mark.parametrize(("op", "spec"), SMALL, ids=name)
def test_every_implementation_that_serves(op, spec):
    seed = int(np.random.default_rng().integers(2**31))
    arguments, options = spec.inputs(seed)
    with jax.default_matmul_precision("highest"):
        expected = results(op, "xla", widened(arguments), widened(options), seed)
    for implementation in [name for name in op.implementations if name in ("mosaic_gpu", "triton", "xla", "reference")]:
        try:
            found = results(op, implementation, arguments, options, seed)
        except NotImplementedError:
            if implementation != "mosaic_gpu":
                raise
            continue
        assert_close(found, expected, 1e-5 if arguments[0].dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("op", [softmax, log_softmax], ids=name)
@pytest.mark.parametrize(("shape", "columns"), [((300, 40_000), 16384), ((3, 300_001), 8192), ((2, 300_001), 1024)])
def test_rows_shared_by_programs_and_rows_too_long_for_that(op, shape, columns, monkeypatch):
    from crescendo.pallas_kernels.softmax import triton

    monkeypatch.setattr(triton, "ALONE", {"forward": columns, "backward": columns})
    monkeypatch.setattr(triton, "SHARED", columns)
    seed = int(np.random.default_rng().integers(2**31))
    x = 2 * jax.random.normal(jax.random.key(seed), shape)
    x = x.at[1].set(-jnp.inf).at[0, 5].set(-jnp.inf)
    assert_close(results(op, "triton", (x,), {}, seed), results(op, "xla", (x,), {}, seed), 1e-5)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_linear_cross_entropy_over_several_chunks(implementation, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)
    seed = int(np.random.default_rng().integers(2**31))
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (2500, 768), jnp.bfloat16)
    w = (jax.random.normal(keys[1], (50304, 768)) / 16).astype(jnp.bfloat16)
    call = (x, w, jax.random.randint(keys[2], (2500,), 0, 50304))
    options = {"z_loss": 1e-3, "ignore_id": 7, "weights": jax.random.uniform(keys[0], (2500,))}
    try:
        found = results(linear_cross_entropy, implementation, call, options, seed)
    except Unsupported as reason:
        pytest.skip(str(reason))
    with jax.default_matmul_precision("highest"):
        expected = results(linear_cross_entropy, "xla", widened(call), options, seed)
    assert_close(found, expected, 1e-2)
