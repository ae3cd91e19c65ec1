"""Attention's kernels, compiled for H100s that are not here: registers, shared memory, collectives."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crescendo.pallas_kernels.attention import attention
from crescendo.pallas_kernels.attention.specs import SPECS
from crescendo.pallas_kernels.op import target

pytestmark = [pytest.mark.aot, pytest.mark.timeout(900)]
HERE = Path(__file__).parent


def h100s(count: int):
    config = (HERE / "h100.txtpb").read_text()
    return topologies.get_topology_desc("h100", "cuda", target_config=config, topology=f"1x1x{count}").devices


def spilled_bytes(folder: Path) -> list[int]:
    """Of each kernel whose PTX is in the folder, by the assembler's own report."""
    spills = []
    for ptx in sorted(folder.glob("*.ptx")):
        report = subprocess.run(
            ["ptxas", "-arch=sm_90a", "-v", str(ptx), "-o", os.devnull], capture_output=True, text=True, check=True
        ).stderr
        spills.append(sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report)))
    return spills


@pytest.mark.parametrize("width", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
def test_forward_and_backward_compile_and_the_forward_hardly_spills(width, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    (device,) = h100s(1)
    where = NamedSharding(Mesh(np.array([device]), ("x",)), P())
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, width), jnp.bfloat16, sharding=where) for heads in (4, 2))
    segment_ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=where) if packed else None

    def forward(q, k, v, segment_ids):
        return attention(q, k, v, causal=True, segment_ids=segment_ids, implementation="mosaic_gpu")

    def backward(q, k, v, segment_ids):
        return jax.grad(lambda *arrays: forward(*arrays, segment_ids).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    with target(device):
        for function in (backward, forward):
            jax.jit(function).trace(q, k, k, segment_ids).lower(lowering_platforms=("cuda",)).compile()
            spills = spilled_bytes(tmp_path)
            assert spills, "the compiler wrote no PTX"
            for ptx in tmp_path.glob("*"):
                ptx.unlink()
    # Wider heads, and the ids of a block of keys beside them, leave a few registers too little.
    assert spills[0] <= (0 if width == 64 or (width <= 128 and not packed) else 256)


@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_triton_kernels_compile(width):
    pytest.importorskip("triton")
    (device,) = h100s(1)
    where = NamedSharding(Mesh(np.array([device]), ("x",)), P())
    q, k = (jax.ShapeDtypeStruct((2, 500, heads, width), jnp.bfloat16, sharding=where) for heads in (4, 2))
    segment_ids = jax.ShapeDtypeStruct((2, 500), jnp.int32, sharding=where)

    def gradients(q, k, v, segment_ids):
        def total(*arrays):
            out = attention(*arrays, causal=True, segment_ids=segment_ids, implementation="triton")
            return out.astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    with target(device):
        lowered = jax.jit(gradients).trace(q, k, k, segment_ids).lower(lowering_platforms=("cuda",))
    assert lowered.compile().as_text().count('custom_call_target="triton_kernel_call"') == 3


@pytest.mark.parametrize(
    "spec",
    [spec for spec in SPECS if spec.tags & {"small", "awkward"}],
    ids=lambda s: s.name,
)
def test_triton_kernels_interpreted(spec, monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime import interpreter, jit

    from crescendo.pallas_kernels.attention import triton as kernels

    def patched(tensor, scope, original=interpreter._patch_lang_tensor):
        original(tensor, scope)
        # A loaded scalar is an array of one entry there, which NumPy doesn't take for an integer any more.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    call = lambda self, *args, **kwargs: interpreter.InterpretedFunction(self.fn)(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(jit.JITFunction, "__call__", call)
    found = importlib.util.spec_from_file_location("triton_interpreter", HERE / "triton_interpreter.py")
    stand_in = importlib.util.module_from_spec(found)
    found.loader.exec_module(stand_in)
    monkeypatch.setattr(kernels, "triton_call", stand_in.triton_call)
    monkeypatch.setattr(kernels, "per_device", lambda pair: pair)
    arrays, kwargs = spec.inputs(int(np.random.default_rng().integers(2**31)))
    # The interpreter takes bfloat16 for integers.
    arrays = [array.astype(jnp.float16) for array in arrays]

    def everything(implementation, arrays):
        def call(*arrays):
            out, lse = attention(*arrays, **kwargs, return_lse=True, implementation=implementation)
            return out.astype(jnp.float32), jnp.where(jnp.isfinite(lse), lse, 0)

        results, pull = jax.vjp(call, *arrays)
        return *results, *pull(jax.tree.map(jnp.cos, results))

    with target(h100s(1)[0]):
        results = everything("triton", arrays)
    exact = everything("reference", [array.astype(jnp.float32) for array in arrays])
    for result, wanted in zip(results, exact, strict=True):
        result, wanted = np.asarray(result, np.float64), np.asarray(wanted, np.float64)
        assert np.linalg.norm(result - wanted) < 2e-3 * max(np.linalg.norm(wanted), 1e-6)


def test_sharded_by_batch_and_heads_nothing_is_gathered():
    devices = h100s(8)
    mesh = Mesh(np.array(devices).reshape(4, 2), ("data", "model"))
    where = NamedSharding(mesh, P("data", None, "model"))
    q, k = (jax.ShapeDtypeStruct((8, 1024, heads, 64), jnp.bfloat16, sharding=where) for heads in (4, 2))
    segment_ids = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=NamedSharding(mesh, P("data")))

    def gradients(q, k, v, segment_ids):
        def total(*arrays):
            out = attention(*arrays, causal=True, segment_ids=segment_ids, implementation="mosaic_gpu")
            return out.astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    with target(devices[0]):
        lowered = jax.jit(gradients).trace(q, k, k, segment_ids).lower(lowering_platforms=("cuda",))
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 3
    assert "bf16[2,1024,1,2,64]" in text or "bf16[2,1024,2,64]" in text  # a device's own queries: 2 rows, 2 heads
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
