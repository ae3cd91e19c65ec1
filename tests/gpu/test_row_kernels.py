"""Softmax, RMSNorm and linear cross-entropy on an NVIDIA GPU: every implementation, on fresh inputs.

Small calls are compared with the reference in float64 on the host, real ones with XLA in float32, which the small ones
check. What was collected is compiled in threads ahead of the tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.pallas_kernels.layer_norm import layer_norm
from crescendo.pallas_kernels.layer_norm.specs import SPECS as LAYER_NORM_SPECS
from crescendo.pallas_kernels.linear_cross_entropy import chunked, linear_cross_entropy
from crescendo.pallas_kernels.linear_cross_entropy.specs import SPECS as ENTROPY_SPECS
from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.rms_norm import qk_norm_rotary, rms_norm
from crescendo.pallas_kernels.rms_norm.specs import ROTARY_SPECS
from crescendo.pallas_kernels.rms_norm.specs import SPECS as NORM_SPECS
from crescendo.pallas_kernels.softmax import log_softmax, softmax
from crescendo.pallas_kernels.softmax.specs import SPECS as SOFTMAX_SPECS
from crescendo.pallas_kernels.swiglu import swiglu
from crescendo.pallas_kernels.swiglu.specs import SPECS as SWIGLU_SPECS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
OPS = [
    (softmax, SOFTMAX_SPECS),
    (log_softmax, SOFTMAX_SPECS),
    (rms_norm, NORM_SPECS),
    (qk_norm_rotary, ROTARY_SPECS),
    (swiglu, SWIGLU_SPECS),
    (layer_norm, LAYER_NORM_SPECS),
    (linear_cross_entropy, ENTROPY_SPECS),
]
SEED = int(np.random.default_rng().integers(2**31))
# Float32 sums in another order; bfloat16 keeps 8 bits: rounding the results alone costs about 2e-3.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
ALSO_DIFFERENTIABLE = ("residual", "probe")


def is_small(spec) -> bool:
    return "small" in spec.tags


def cases():
    """`(op, spec, implementation)`: all small calls, and real ones whose float32 results fit beside them."""
    for op, specs in OPS:
        for spec in specs:
            real = "real" in spec.tags and spec.flops < 1e12 and (op is not log_softmax) and "float32" not in spec.name
            for implementation in ("mosaic_gpu", "triton", "xla"):
                if implementation in op.implementations and (is_small(spec) or (real and implementation != "xla")):
                    yield op, spec, implementation


def name(value):
    return getattr(value, "name", None) or getattr(value, "__name__", None) or value


def everything(op, implementation, spec, fixed):
    """`(arguments, named, cotangents) -> results and gradients`."""

    def run(arguments, named, cotangents):
        def of(positional, by_name):
            merged = [positional.get(i, a) for i, a in enumerate(arguments)]
            return jax.tree.leaves(op(*merged, **{**named, **by_name}, **fixed, implementation=implementation))

        positional = {i: arguments[i] for i in spec.differentiable}
        by_name = {n: named[n] for n in ALSO_DIFFERENTIABLE if n in named}
        y, back = jax.vjp(of, positional, by_name)
        return y, back([c.astype(a.dtype) for c, a in zip(cotangents, y, strict=True)])

    return run


@functools.cache
def drawn(op, spec):
    """Arguments, named arrays, constants and cotangents, the same in all precisions, which are not near 0 if scalar."""
    arguments, options = spec.inputs(SEED)
    named = {n: a for n, a in options.items() if isinstance(a, jax.Array)}
    fixed = {n: a for n, a in options.items() if n not in named}
    like = jax.eval_shape(functools.partial(op, implementation="xla", **fixed), *arguments, **named)
    keys = jax.random.split(jax.random.key(SEED), 4)
    draw = lambda key, y: jax.random.normal(key, y.shape) if y.ndim else 1 + jax.random.uniform(key)  # noqa: E731
    like = jax.tree.leaves(like)
    cotangents = [draw(k, y).astype(jnp.bfloat16).astype(jnp.float32) for k, y in zip(keys, like, strict=False)]
    return arguments, named, fixed, cotangents


def changed(tree, to):
    """With floating arrays as what `to` makes of them."""
    return jax.tree.map(lambda a: to(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@functools.cache
def exactly(op, spec):
    """By the reference in float64, on the host."""
    arguments, named, fixed, cotangents = drawn(op, spec)
    given = jax.tree.map(np.asarray, changed((arguments, named, cotangents), lambda a: a.astype(jnp.float32)))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        given = jax.tree.map(jnp.asarray, changed(given, lambda a: a.astype(np.float64)))
        return jax.tree.map(np.asarray, jax.tree.leaves(jax.jit(everything(op, "reference", spec, fixed))(*given)))


@functools.cache
def build(op, spec, implementation):
    """The compiled call, or why there is none; "exact" is XLA in float32."""
    arguments, named, fixed, cotangents = drawn(op, spec)
    exact = implementation == "exact"
    wide = lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32)  # noqa: E731
    given = changed((arguments, named), wide) if exact else (arguments, named)
    with jax.default_matmul_precision("highest" if exact else None):
        run = everything(op, "xla" if exact else implementation, spec, fixed)
        try:
            return jax.jit(run).lower(*given, cotangents).compile()
        except NotImplementedError as reason:
            return str(reason)


def foreseen(parameters):
    """What a test of these parameters will ask for (`ahead`)."""
    if {"op", "spec", "implementation"} <= set(parameters):
        op, spec = parameters["op"], parameters["spec"]
        drawn(op, spec)
        yield build, op, spec, parameters["implementation"]
        yield (exactly, op, spec) if is_small(spec) else (build, op, spec, "exact")


def assert_close(found, expected, tolerance, label=""):
    errors = [float(error(f, e)) for f, e in zip(found, expected, strict=True)]
    print(f"\n{label}", *(f"{value:.1e}" for value in errors), flush=True)
    assert all(value <= tolerance for value in errors)  # which no NaN is


def error(found, expected):
    """Of the finite entries, relative; NaN where others are finite. Where a gradient vanishes the error is absolute."""
    xp = np if isinstance(expected, np.ndarray) else jnp
    wide = np.float64 if xp is np else jnp.float32
    found, expected = xp.asarray(found).astype(wide), xp.asarray(expected).astype(wide)
    finite = xp.isfinite(expected)
    agree = xp.all(xp.where(finite, xp.isfinite(found), found == expected))
    distance = xp.linalg.norm(xp.where(finite, found - xp.where(finite, expected, 0), 0).ravel())
    size = xp.linalg.norm(xp.where(finite, expected, 0).ravel())
    return xp.where(agree, distance / xp.maximum(size, 1.0), xp.nan)


def run(compiled, *given):
    """Results in memory that was full of NaN: one that nobody wrote shows."""
    poison = [jnp.full(info.shape, jnp.nan, info.dtype) for info in jax.tree.leaves(compiled.out_info) * 2]
    jax.block_until_ready(poison)
    del poison
    return jax.tree.leaves(compiled(*given))


@pytest.mark.parametrize(("op", "spec", "implementation"), list(cases()), ids=name)
def test_results_and_gradients(op, spec, implementation, ahead):
    arguments, named, _, cotangents = drawn(op, spec)
    compiled = ahead(build, op, spec, implementation)
    if isinstance(compiled, str):
        assert implementation == "mosaic_gpu", compiled
        pytest.skip(compiled)
    if is_small(spec):
        expected = ahead(exactly, op, spec)
    else:
        wide = changed((arguments, named), lambda a: a.astype(jnp.float32))
        expected = run(ahead(build, op, spec, "exact"), *wide, cotangents)
    found = run(compiled, arguments, named, cotangents)
    if is_small(spec):
        found = [np.asarray(f.astype(jnp.float32)) for f in found]
    assert_close(found, expected, TOLERANCE[arguments[0].dtype.name], f"{implementation} {name(op)} {spec.name}")


def results(op, implementation, arguments, options, key):
    """The results, and the gradients of the floating arguments for random cotangents."""
    floating = [i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating)]

    @jax.jit
    def both(arguments, options, key):
        def of(*differentiable):
            merged = list(arguments)
            for i, value in zip(floating, differentiable, strict=True):
                merged[i] = value
            return jax.tree.leaves(op(*merged, **options, implementation=implementation))

        y, back = jax.vjp(of, *(arguments[i] for i in floating))
        return y, back([jax.random.normal(key, a.shape).astype(a.dtype) for a in y])

    return jax.tree.leaves(both(arguments, options, key))


@pytest.mark.parametrize("op", [softmax, log_softmax], ids=name)
@pytest.mark.parametrize(("shape", "columns"), [((300, 40_000), 16384), ((3, 300_001), 8192), ((2, 300_001), 1024)])
def test_rows_shared_by_programs_and_rows_too_long_for_that(op, shape, columns, monkeypatch):
    from crescendo.pallas_kernels.softmax import triton

    monkeypatch.setattr(triton, "ALONE", {"forward": columns, "backward": columns})
    monkeypatch.setattr(triton, "SHARED", columns)
    key = jax.random.key(SEED)
    x = 2 * jax.random.normal(key, shape)
    x = x.at[1].set(-jnp.inf).at[0, 5].set(-jnp.inf)
    assert_close(results(op, "triton", (x,), {}, key), results(op, "xla", (x,), {}, key), 1e-5)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
@pytest.mark.parametrize("shape", [(300, 1024), (5, 131072)])
def test_softmax_loses_nothing_to_rounded_results(implementation, shape):
    """A row always adds up to 1, so a cotangent that is the same everywhere gives no gradient."""
    x = 4 * jax.random.normal(jax.random.key(SEED), shape, jnp.bfloat16)
    run = jax.jit(lambda x: jax.vjp(functools.partial(softmax, implementation=implementation), x)[1](jnp.ones_like(x)))
    assert jnp.max(jnp.abs(run(x)[0])) < 1e-6


@pytest.mark.parametrize("chunks_of", ["mosaic_gpu", "triton"])
def test_linear_cross_entropy_over_several_chunks(chunks_of, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)
    keys = jax.random.split(jax.random.key(SEED), 4)
    x = jax.random.normal(keys[0], (2500, 768), jnp.bfloat16)
    w = (jax.random.normal(keys[1], (50304, 768)) / 16).astype(jnp.bfloat16)
    call = (x, w, jax.random.randint(keys[2], (2500,), 0, 50304))
    weights = jax.random.uniform(keys[3], (2500,))
    op = functools.partial(linear_cross_entropy, z_loss=1e-3, ignore_id=7)
    try:
        found = results(op, chunks_of, call, {"weights": weights}, keys[0])
    except Unsupported as reason:
        pytest.skip(str(reason))
    with jax.default_matmul_precision("highest"):
        wide = changed(call, lambda a: a.astype(jnp.float32))
        expected = results(op, "xla", wide, {"weights": weights}, keys[0])
    assert_close(found, expected, 1e-2)
