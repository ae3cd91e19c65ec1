"""Row kernels in Triton: rows that don't fit on chip, interpreted; registers and memory, compiled for an H100."""

import contextlib
import functools
import importlib.util
import os
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

from crescendo.pallas_kernels import conformance, tiles
from crescendo.pallas_kernels.conformance import HOMES, Case
from crescendo.pallas_kernels.interpreter import interpreted
from crescendo.pallas_kernels.linear_cross_entropy import linear_cross_entropy
from crescendo.pallas_kernels.linear_cross_entropy.specs import SPECS as ENTROPY_SPECS
from crescendo.pallas_kernels.op import Spec, target
from crescendo.pallas_kernels.quantize import quantize
from crescendo.pallas_kernels.softmax import log_softmax, softmax

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")]
HERE = Path(__file__).parent
STAND_IN = HOMES["triton"].stand_in


def on_chip(columns):
    """A context in which so many columns of softmax's rows are held by a program."""
    stack = contextlib.ExitStack()
    for passes in ("forward", "backward"):
        stack.enter_context(tiles.cut("softmax", passes, alone=columns, shared=columns))
    stack.enter_context(interpreted(STAND_IN))
    return stack


def name(value):
    return getattr(value, "name", None) or getattr(value, "__name__", None)


@pytest.mark.parametrize("op", [softmax, log_softmax], ids=name)
def test_rows_that_do_not_fit_on_chip(op):
    def extremes(key):
        x = (20 * jax.random.normal(key, (3, 300))).at[1].set(-jnp.inf)
        return (x.at[0, 7].set(1e4).at[2, :100].set(-jnp.inf),), {}

    with on_chip(columns=64):
        conformance.check(Case(op, "triton", Spec("extremes", extremes)))


@pytest.mark.parametrize("columns", [512, 64], ids=["on chip", "longer"])
def test_softmax_interpreted_loses_nothing_to_rounded_results(columns):
    """A row always adds up to 1, so a cotangent that is the same everywhere gives no gradient."""
    x = jnp.asarray(4 * np.random.default_rng().normal(size=(5, 300)), jnp.bfloat16)
    with on_chip(columns):
        y, back = jax.vjp(lambda x: softmax(x, implementation="triton"), x)
        assert jnp.max(jnp.abs(back(jnp.ones_like(y))[0])) < 1e-6


@pytest.mark.parametrize("columns", [512, 64], ids=["on chip", "longer"])
@pytest.mark.parametrize("op", [softmax, log_softmax], ids=name)
def test_softmax_interpreted_does_not_look_at_what_a_mask_hides(op, columns):
    random = np.random.default_rng()
    mask, x, cotangent = random.random((3, 100)) < 0.6, *random.normal(size=(2, 3, 100)).astype(np.float32)
    mask[1] = False

    def both(value):
        call = functools.partial(op, mask=jnp.asarray(mask), soft_cap=2.0, implementation="triton")
        y, back = jax.vjp(call, jnp.where(mask, x, value))
        return y, back(jnp.where(mask, cotangent, value))[0]

    with on_chip(columns):
        for found, right in zip(both(np.nan), both(0.0), strict=True):
            np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("shape", [(3, 50, 70), (130, 66), (256, 128)], ids=str)
def test_quantize_interpreted_is_the_cast_in_both_orders(shape, dtype):
    # Numbers of the format and too large ones: how the interpreter rounds others isn't how the device does.
    x = jnp.asarray(np.random.default_rng().normal(size=shape), dtype).astype(jnp.bfloat16).at[-1].mul(2.0**20)
    call = functools.partial(quantize, x, jnp.float32(8), dtype=dtype, inner=1)
    with interpreted(STAND_IN):
        found = call(implementation="triton")
    for a, b in zip(found, call(implementation="reference"), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


@functools.cache
def h100():
    config = (HERE / "h100.txtpb").read_text()
    return topologies.get_topology_desc("h100", "cuda", target_config=config, topology="1x1x1").devices[0]


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


LOWERS_FOR_A_GPU = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
from crescendo.pallas_kernels.quantize import quantize

mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))
x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
scale = jax.ShapeDtypeStruct((), jnp.float32)
with jax.sharding.use_abstract_mesh(mesh):
    run = jax.jit(lambda x, scale: quantize(x, scale, dtype=jnp.float8_e4m3fn, implementation="triton"))
    text = run.trace(x, scale).lower(lowering_platforms=("cuda",)).as_text()
assert "triton_kernel_call" in text
print("torch" in sys.modules)
import torch
"""


def test_triton_does_not_import_pytorch(tmp_path):
    (tmp_path / "torch.py").write_text("print('imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "-c", LOWERS_FOR_A_GPU], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert run.stdout.split() == ["False", "imported"]
