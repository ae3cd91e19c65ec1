"""The Pallas kernels for GPU and TPU under JAX's interpreters, with their race detectors."""

import contextlib
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from crescendo.pallas_kernels.hopper import products
from crescendo.pallas_kernels.hopper import rows as hopper_rows
from crescendo.pallas_kernels.layer_norm import layer_norm
from crescendo.pallas_kernels.layer_norm.specs import SPECS as LAYER_NORM_SPECS
from crescendo.pallas_kernels.linear_cross_entropy import chunked, linear_cross_entropy
from crescendo.pallas_kernels.linear_cross_entropy import mosaic_gpu as hopper
from crescendo.pallas_kernels.linear_cross_entropy.specs import EVERY_OPTION
from crescendo.pallas_kernels.op import Device, target
from crescendo.pallas_kernels.rms_norm import rms_norm
from crescendo.pallas_kernels.rms_norm.specs import SPECS as NORM_SPECS
from crescendo.pallas_kernels.softmax import log_softmax, softmax
from crescendo.pallas_kernels.softmax.specs import SPECS as SOFTMAX_SPECS

SLOW = pytest.mark.slow
QUICK_SOFTMAX = ("capped", "one row")
TPU = AbstractDevice("TPU v5e", 1, "tpu")
OPTIONS = {name: value for name, value in EVERY_OPTION.items() if name != "weighted"}


@contextlib.contextmanager
def on_tpu():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert not interpret_pallas_call.races.races_found


@contextlib.contextmanager
def on_gpu():
    with products.interpreted(detect_races=True):
        yield
    assert not gpu_callbacks.get_races().races_found


def distance(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.fixture
def hopper_of_two_cores(monkeypatch):
    """Two cores share the tiles."""
    monkeypatch.setattr(hopper, "target_device", lambda: Device("gpu", "interpreter", 9.0, 2))
    monkeypatch.setattr(hopper, "require_gpu", lambda *args, **kwargs: None)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.0, 40.0], ids=["usual rows", "a loss that overflows"])
def test_linear_cross_entropy_for_hopper(hopper_of_two_cores, spread, monkeypatch):
    monkeypatch.setattr(chunked, "MIN_CHUNK_ROWS", 256)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)
    random = np.random.default_rng()
    x, w = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in ((300, 192), (256, 192)))
    w, labels = w / 8, jnp.asarray(random.integers(0, 256, 300))
    x = x.at[280].mul(spread)  # its logits are up to 200, in the second chunk

    def run(implementation, x, w):
        loss = lambda x, w: linear_cross_entropy(x, w, labels, **OPTIONS, implementation=implementation)[0]  # noqa: E731
        return jax.tree.leaves(jax.value_and_grad(loss, (0, 1))(x, w))

    with on_gpu():
        found = run("mosaic_gpu", x, w)
    expected = run("reference", x.astype(jnp.float32), w.astype(jnp.float32))
    assert distance(found[0], expected[0]) < 1e-5
    dx_error, dw_error = (distance(f, e) for f, e in zip(found[1:], expected[1:], strict=True))
    # Rounding the results alone costs 1.7e-3. The long row is nearly all of dW, which so is a product of two rounded
    # vectors: its exponentials, where one number may be all and off by 2^-8, and its scaled x, off by 1.7e-3.
    assert dx_error < 1.2 * 2**-9
    assert dw_error < (1.2 * 2**-9 if spread == 1 else 1.2 * 2**-8)


@pytest.fixture
def streams_of_two_cores(monkeypatch):
    monkeypatch.setattr(hopper_rows, "target_device", lambda: Device("gpu", "interpreter", 9.0, 2))
    monkeypatch.setattr(hopper_rows, "require_gpu", lambda *args, **kwargs: None)
    monkeypatch.setattr(hopper_rows, "MAX_BLOCKS", 1)
    monkeypatch.setattr(hopper_rows, "fence", lambda: None)
    monkeypatch.setattr(hopper_rows, "PIECE", 512)


@pytest.mark.parametrize("op", [softmax, pytest.param(log_softmax, marks=SLOW)], ids=lambda op: op.__name__)
@pytest.mark.parametrize(
    ("held", "part"),
    [
        pytest.param(0, 2**20, id="read again"),
        pytest.param(2**20, 2**20, id="held", marks=SLOW),
        pytest.param(0, 2048, id="shared"),
    ],
)
def test_softmax_for_hopper(op, held, part, streams_of_two_cores, monkeypatch):
    monkeypatch.setattr(importlib.import_module("crescendo.pallas_kernels.softmax.mosaic_gpu"), "HELD", held)
    monkeypatch.setattr(hopper_rows, "PART_BYTES", part)
    monkeypatch.setattr(hopper_rows, "ROWS_OF_A_CLUSTER", 4)
    x = jnp.asarray(np.random.default_rng().normal(size=(7, 1280)) * 4, jnp.float32)
    x = x.at[1].set(-jnp.inf).at[0, 5].set(-jnp.inf).at[2, 7].set(1e4).at[3, :640].set(-jnp.inf).at[3].add(-300)
    with on_gpu():
        found = results(op, "mosaic_gpu", [x], {"scale": 0.5})
    for f, e in zip(found, results(op, "reference", [x], {"scale": 0.5}), strict=True):
        f, e = (jnp.where(jnp.isfinite(a), a, -1.0) for a in (f, e))
        assert jnp.linalg.norm((f - e).ravel()) <= 1e-5 * max(1.0, jnp.linalg.norm(e.ravel()))


def gradient_of_the_sum(implementation):
    """Of bfloat16 softmaxes: 0 but for the rounding of float32 sums, for a row always adds up to 1."""
    x = jnp.asarray(4 * np.random.default_rng().normal(size=(5, 1280)), jnp.bfloat16)
    y, back = jax.vjp(lambda x: softmax(x, implementation=implementation), x)
    return back(jnp.ones_like(y))[0]


@pytest.mark.parametrize("part", [2**20, 1024], ids=["alone", "shared"])
def test_softmax_for_hopper_loses_nothing_to_rounded_results(part, streams_of_two_cores, monkeypatch):
    monkeypatch.setattr(hopper_rows, "PART_BYTES", part)
    monkeypatch.setattr(hopper_rows, "ROWS_OF_A_CLUSTER", 4)
    with on_gpu():
        assert jnp.max(jnp.abs(gradient_of_the_sum("mosaic_gpu"))) < 1e-6


@pytest.mark.parametrize(
    ("op", "residual"),
    [pytest.param(rms_norm, False, marks=SLOW), (rms_norm, True), (layer_norm, True)],
    ids=["alone", "residual", "centered"],
)
def test_norms_for_hopper(op, residual, streams_of_two_cores, monkeypatch):
    module = importlib.import_module("crescendo.pallas_kernels.rms_norm.mosaic_gpu")
    monkeypatch.setattr(module, "target_device", hopper_rows.target_device)
    random = np.random.default_rng()
    x, other = (jnp.asarray(random.normal(size=(2, 5, 1152)), jnp.float32) for _ in range(2))
    vectors = [jnp.asarray(1 + random.normal(size=(2, 1152)) / 8, jnp.float32) for _ in range(1 + (op is layer_norm))]
    options = {
        "eps": 1e-5,
        **({"probe": jnp.zeros(2)} if op is rms_norm else {}),
        **({"residual": other} if residual else {}),
    }
    with on_gpu():
        found = results(op, "mosaic_gpu", [x, *vectors], options)
    for f, e in zip(found, results(op, "reference", [x, *vectors], options), strict=True):
        assert jnp.linalg.norm((f - e).ravel()) <= 1e-5 * max(1.0, jnp.linalg.norm(e.ravel()))


@pytest.fixture
def tpu(monkeypatch):
    """Small blocks, and kernels that take this machine for a TPU."""
    for package in ("softmax", "rms_norm"):
        module = importlib.import_module(f"crescendo.pallas_kernels.{package}.mosaic_tpu")
        monkeypatch.setattr(module, "require_full_rows", lambda width: None)
        monkeypatch.setattr(module, "block_rows", lambda rows, width: min(rows, 8))


def results(op, implementation, arguments, options):
    """Gradients of a sum of sines, and the results themselves."""
    named = {n: a for n, a in options.items() if isinstance(a, jax.Array)}
    fixed = {n: a for n, a in options.items() if n not in named}

    def loss(arguments, named):
        found = jax.tree.leaves(op(*arguments, **named, **fixed, implementation=implementation))
        found = [jnp.where(jnp.isfinite(y), y, 0).astype(jnp.float32) for y in found]
        return sum(jnp.sum(jnp.sin(y)) for y in found), found

    return jax.tree.leaves(jax.grad(loss, has_aux=True)(arguments, named))


@pytest.mark.parametrize(
    ("op", "spec"),
    [
        pytest.param(op, s, marks=() if s.name in QUICK_SOFTMAX else SLOW)
        for s in SOFTMAX_SPECS
        for op in (softmax, log_softmax)
        if "small" in s.tags and (op is softmax or "capped" in s.name)
    ],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
def test_softmax_for_tpu(op, spec, tpu):
    arguments, options = spec.inputs(np.random.default_rng().integers(2**31))
    wide = [a.astype(jnp.float32) for a in arguments]
    with on_tpu():
        found = results(op, "mosaic_tpu", wide, options)
    for f, e in zip(found, results(op, "reference", wide, options), strict=True):
        assert jnp.linalg.norm((f - e).ravel()) <= 1e-5 * max(1.0, jnp.linalg.norm(e.ravel()))


def test_softmax_for_tpu_loses_nothing_to_rounded_results(tpu):
    with on_tpu():
        assert jnp.max(jnp.abs(gradient_of_the_sum("mosaic_tpu"))) < 1e-6


@pytest.mark.parametrize(
    ("op", "spec"),
    [
        pytest.param(op, s, marks=SLOW if s.name == "examples" else (), id=f"{op.__name__} {s.name}")
        for op, specs in ((rms_norm, NORM_SPECS), (layer_norm, LAYER_NORM_SPECS))
        for s in specs
        if s.name in ("17 x 4099", "examples", "two lines")
    ],
)
def test_norms_for_tpu(op, spec, tpu):
    arguments, options = spec.inputs(np.random.default_rng().integers(2**31))
    wide = [a.astype(jnp.float32) for a in arguments]
    options = {n: a.astype(jnp.float32) if n == "residual" else a for n, a in options.items()}
    with on_tpu():
        found = results(op, "mosaic_tpu", wide, options)
    for f, e in zip(found, results(op, "reference", wide, options), strict=True):
        assert jnp.linalg.norm((f - e).ravel()) <= 1e-5 * max(1.0, jnp.linalg.norm(e.ravel()))


def test_kernels_for_tpu_leave_calls_that_xla_would_have_to_split():
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    run = lambda x: softmax(x, implementation="mosaic_tpu")  # noqa: E731
    with target(TPU):
        with pytest.raises(NotImplementedError, match=r"mosaic_tpu: .*inside jax.shard_map"):
            jax.jit(run).trace(x)
        mesh = AbstractMesh((1,), ("x",), abstract_device=TPU)
        mapped = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        with jax.sharding.use_abstract_mesh(mesh):
            assert "tpu_custom_call" in jax.jit(mapped).trace(x).lower(lowering_platforms=("tpu",)).as_text()
