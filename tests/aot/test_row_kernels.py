"""Softmax, RMSNorm and linear cross-entropy in Triton and Pallas, interpreted and compiled where there is no GPU."""

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, Mesh, NamedSharding, PartitionSpec

from crescendo.pallas_kernels.layer_norm import layer_norm
from crescendo.pallas_kernels.layer_norm.specs import SPECS as LAYER_NORM_SPECS
from crescendo.pallas_kernels.linear_cross_entropy import linear_cross_entropy
from crescendo.pallas_kernels.linear_cross_entropy.specs import SPECS as ENTROPY_SPECS
from crescendo.pallas_kernels.op import Device, explain, target
from crescendo.pallas_kernels.rms_norm import qk_norm_rotary, rms_norm
from crescendo.pallas_kernels.rms_norm.specs import ROTARY_SPECS
from crescendo.pallas_kernels.rms_norm.specs import SPECS as NORM_SPECS
from crescendo.pallas_kernels.softmax import log_softmax, softmax
from crescendo.pallas_kernels.softmax.specs import SPECS as SOFTMAX_SPECS
from crescendo.pallas_kernels.swiglu import swiglu
from crescendo.pallas_kernels.swiglu.specs import SPECS as SWIGLU_SPECS

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")]
OPS = [
    *((softmax, SOFTMAX_SPECS), (log_softmax, SOFTMAX_SPECS), (rms_norm, NORM_SPECS), (qk_norm_rotary, ROTARY_SPECS)),
    *((swiglu, SWIGLU_SPECS), (layer_norm, LAYER_NORM_SPECS)),
]
CASES = [(op, spec) for op, specs in [*OPS, (linear_cross_entropy, ENTROPY_SPECS)] for spec in specs]
SMALL = [case for case in CASES if "small" in case[1].tags]
HERE = Path(__file__).parent


def name(value):
    return getattr(value, "name", None) or getattr(value, "__name__", None)


def gradients(op, implementation, arguments, options):
    """The sum of all finite results, arrays by their sines, and its gradients."""
    named = {n: a for n, a in options.items() if isinstance(a, jax.Array | jax.ShapeDtypeStruct)}
    fixed = {n: a for n, a in options.items() if n not in named}
    floating = tuple(i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating))

    def loss(arguments, named):
        results = jax.tree.leaves(op(*arguments, **named, **fixed, implementation=implementation))
        finite = [jnp.where(jnp.isfinite(y), y, 0).astype(jnp.float32) for y in results]
        # Not of a scalar: where its cosine is near 0, rounding alone would decide the gradient.
        return sum(jnp.sum(jnp.sin(y)) if y.ndim else y for y in finite)

    def run(*given):
        merged = dict(zip(floating, given, strict=False))
        return loss([merged.get(i, a) for i, a in enumerate(arguments)], named)

    return jax.value_and_grad(run, tuple(range(len(floating))))(*(arguments[i] for i in floating))


@pytest.fixture
def interpreted(monkeypatch):
    """All kernels interpreted, as if on a GPU of one core, so that no program waits for another."""
    from triton.runtime import interpreter, jit

    spec = importlib.util.spec_from_file_location("triton_interpreter", HERE / "triton_interpreter.py")
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    call = lambda self, *args, **kwargs: interpreter.InterpretedFunction(self.fn)(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(jit.JITFunction, "__call__", call)
    for package in ("softmax", "rms_norm", "linear_cross_entropy", "swiglu"):
        module = importlib.import_module(f"crescendo.pallas_kernels.{package}.triton")
        monkeypatch.setattr(module, "triton_call", stand_in.triton_call)
        monkeypatch.setattr(module, "target_device", lambda: Device("gpu", "interpreter", 9.0, 1), raising=False)
        monkeypatch.setattr(module, "require_gpu", lambda minimum: None)

    def on_chip(columns):
        kernels = sys.modules["crescendo.pallas_kernels.softmax.triton"]
        monkeypatch.setattr(kernels, "ALONE", {"forward": columns, "backward": columns})
        monkeypatch.setattr(kernels, "SHARED", columns)

    return on_chip


@pytest.mark.parametrize(("op", "spec"), SMALL, ids=name)
def test_triton_kernels_interpreted(op, spec, interpreted):
    arguments, options = spec.inputs(np.random.default_rng().integers(2**31))
    wide = [a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arguments]
    options = {n: a.astype(jnp.float32) if n == "residual" else a for n, a in options.items()}
    found, expected = (gradients(op, which, wide, options) for which in ("triton", "reference"))
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Both sides round float32 sums of up to 70,000 terms, in another order: up to 3e-5 was seen on random inputs.
        assert jnp.linalg.norm((f - e).ravel()) <= 1e-4 * max(1.0, jnp.linalg.norm(e.ravel()))


@pytest.mark.parametrize("op", [softmax, log_softmax], ids=name)
def test_rows_that_do_not_fit_on_chip(op, interpreted):
    interpreted(columns=64)
    x = jnp.asarray(np.random.default_rng().normal(size=(3, 300)) * 20, jnp.float32).at[1].set(-jnp.inf)
    x = x.at[0, 7].set(1e4).at[2, :100].set(-jnp.inf)
    found, expected = (gradients(op, which, [x], {}) for which in ("triton", "reference"))
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [512, 64], ids=["on chip", "longer"])
def test_softmax_interpreted_loses_nothing_to_rounded_results(columns, interpreted):
    """A row always adds up to 1, so a cotangent that is the same everywhere gives no gradient."""
    interpreted(columns)
    x = jnp.asarray(4 * np.random.default_rng().normal(size=(5, 300)), jnp.bfloat16)
    y, back = jax.vjp(lambda x: softmax(x, implementation="triton"), x)
    assert jnp.max(jnp.abs(back(jnp.ones_like(y))[0])) < 1e-6


@pytest.mark.parametrize("columns", [512, 64], ids=["on chip", "longer"])
@pytest.mark.parametrize("op", [softmax, log_softmax], ids=name)
def test_softmax_interpreted_does_not_look_at_what_a_mask_hides(op, columns, interpreted):
    interpreted(columns)
    random = np.random.default_rng()
    mask, x, cotangent = random.random((3, 100)) < 0.6, *random.normal(size=(2, 3, 100)).astype(np.float32)
    mask[1] = False

    def both(value):
        call = functools.partial(op, mask=jnp.asarray(mask), soft_cap=2.0, implementation="triton")
        y, back = jax.vjp(call, jnp.where(mask, x, value))
        return y, back(jnp.where(mask, cotangent, value))[0]

    for found, right in zip(both(np.nan), both(0.0), strict=True):
        np.testing.assert_array_equal(found, right)


@functools.cache
def h100():
    config = (HERE / "h100.txtpb").read_text()
    return topologies.get_topology_desc("h100", "cuda", target_config=config, topology="1x1x1").devices[0]


@pytest.mark.parametrize(("op", "spec"), CASES, ids=name)
def test_every_implementation_that_serves_compiles_for_an_h100(op, spec):
    sharding = NamedSharding(Mesh(np.array([h100()]), ("x",)), PartitionSpec())
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)  # noqa: E731
    arguments, options = jax.tree.map(lambda a: place(a) if isinstance(a, jax.ShapeDtypeStruct) else a, spec.abstract())
    with target(h100()):
        assert explain(op, *arguments, **options).chosen != "reference"
        for implementation in [name for name in op.implementations if name in ("mosaic_gpu", "triton", "xla")]:
            dynamic = {n: a for n, a in options.items() if isinstance(a, jax.ShapeDtypeStruct)}
            fixed = {n: a for n, a in options.items() if n not in dynamic}
            run = lambda arguments, dynamic: gradients(op, implementation, arguments, {**dynamic, **fixed})  # noqa: B023, E731
            try:
                traced = jax.jit(run).trace(arguments, dynamic)
            except NotImplementedError:
                if implementation != "mosaic_gpu":
                    raise
                continue
            assert traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis() is not None


@pytest.mark.parametrize(
    ("shape", "centered"),
    [
        *(((64, 512, 2048), False), ((64, 128, 8192), False), ((16, 1024, 768), False)),
        *(((64, 512, 2048), True), ((64, 128, 8192), True), ((16, 1024, 768), True)),
        *(((4, 4096, 32, 128), False), ((16, 1024, 12, 64), False)),
    ],
)
def test_as_many_backward_programs_of_the_norm_fit_as_are_launched_at_once(shape, centered, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from crescendo.pallas_kernels.rms_norm import triton as kernels

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernel, walk_of, threads, flags = (
        (kernels._rotary_backward, kernels._walk_heads, kernels.ROTARY_THREADS, {})
        if len(shape) == 4
        else (
            kernels._backward,
            functools.partial(kernels._walk, centered=centered),
            kernels.CENTERED_THREADS if centered else kernels.NORM_THREADS,
            {"CENTERED": centered, "HAS_SUM": True},
        )
    )
    with target(AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")):
        walk = walk_of(shape, "backward")
    assert walk.pop("grid") == (shape[0] * walk["PROGRAMS"],)
    warps = walk.pop("num_warps")
    constants = {"EPS": 1e-5, **flags, **walk}
    wide = ("scale_ptr", "shares_ptr", "bias_shares_ptr", "cosine_ptr", "sine_ptr")
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {n: "constexpr" if n in constants else "*fp32" if n in wide else "*bf16" for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 1})
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = ["ptxas", "-v", "-arch=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores" in said
    registers = -(-int(re.search(r"Used (\d+) registers", said)[1]) // 8) * 8
    assert 65536 // (registers * 32 * warps) >= max(1, threads // (32 * warps))


@pytest.mark.parametrize(
    "target_name", ["v5e:2x2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5p:2x2x1", "v6e:2x2"))]
)
def test_row_kernels_compile_for_tpu(target_name):
    device = topologies.get_topology_desc(platform="tpu", topology_name=target_name).devices[0]
    mesh = Mesh(np.array([device]), ("x",))
    for op, spec in CASES:
        if op is qk_norm_rotary or "mosaic_tpu" not in op.implementations:
            continue
        arguments, options = jax.tree.map(
            lambda a: (
                jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
                if isinstance(a, jax.ShapeDtypeStruct)
                else a
            ),
            spec.abstract(),
        )
        dynamic = {n: a for n, a in options.items() if isinstance(a, jax.ShapeDtypeStruct)}
        fixed = {n: a for n, a in options.items() if n not in dynamic}

        def run(arguments, dynamic, op=op, fixed=fixed):
            one = lambda arguments, dynamic: gradients(op, "mosaic_tpu", arguments, {**dynamic, **fixed})  # noqa: E731
            specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec()}
            return jax.shard_map(one, mesh=mesh, check_vma=False, **specs)(arguments, dynamic)

        # Longer rows, and float16, are left to XLA.
        if arguments[0].shape[fixed.get("axis", -1)] > 32768 or arguments[0].dtype == jnp.float16:
            continue
        with target(device):
            jax.jit(run).trace(arguments, dynamic).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("spec", [spec for spec in ENTROPY_SPECS if "speed" in spec.tags], ids=name)
def test_linear_cross_entropy_stays_within_its_memory(spec):
    sharding = NamedSharding(Mesh(np.array([h100()]), ("x",)), PartitionSpec())
    arguments, _ = spec.abstract()
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
    loss = lambda x, w, labels: linear_cross_entropy(x, w, labels)[0]  # noqa: E731
    with target(h100()):
        compiled = jax.jit(jax.grad(loss, (0, 1))).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    memory = compiled.memory_analysis()
    extra = memory.temp_size_in_bytes - 4 * arguments[1].size
    print(f"{spec.name}: {extra / 2**20:,.0f} MiB beyond dW in float32")
    assert extra <= 0.35 * 2**30
