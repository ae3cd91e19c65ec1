"""Attention's kernels, compiled for H100s and TPUs that are not here: registers, memory, collectives."""

import functools
import math
import os
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crescendo import parallel
from crescendo.models import ModelConfig, initialize
from crescendo.models.attention import packed_attention
from crescendo.models.decode import decode, empty_cache
from crescendo.pallas_kernels import conformance
from crescendo.pallas_kernels.attention import attention
from crescendo.pallas_kernels.attention.blocks import FusedBlockAttention
from crescendo.pallas_kernels.conformance import cases
from crescendo.pallas_kernels.op import target
from crescendo.parallel.collectives import computations

pytestmark = [pytest.mark.aot, pytest.mark.timeout(900)]
HERE = Path(__file__).parent


def h100s(count: int):
    config = (HERE / "h100.txtpb").read_text()
    return topologies.get_topology_desc("h100", "cuda", target_config=config, topology=f"1x1x{count}").devices


def v5es():
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def spilled_bytes(folder: Path) -> list[int]:
    """Of each kernel whose PTX is in the folder, by the assembler's own report."""
    spills = []
    for ptx in sorted(folder.glob("*.ptx")):
        report = subprocess.run(
            ["ptxas", "-arch=sm_90a", "-v", str(ptx), "-o", os.devnull], capture_output=True, text=True, check=True
        ).stderr
        assert "serialized" not in report  # the matrix instructions, each waited for before the next one
        spills.append(sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report)))
    return spills


CALLS = {
    **{f"causal-{width}": (width, 2, {"causal": True}) for width in (64, 96, 128, 192, 256)},
    **{f"packed-{width}": (width, 2, {"causal": True, "segment_ids": True}) for width in (64, 96, 128, 192, 256)},
    **{f"alone-{width}": (width, 4, {"causal": True}) for width in (64, 128)},
    "full-128": (128, 4, {}),
    "window-128": (128, 4, {"causal": True, "window": 300}),
}


@pytest.mark.parametrize(
    ("width", "kv_heads", "options"),
    [
        # The widths that the presets have every day.
        pytest.param(*call, marks=() if call[0] in (64, 128) else pytest.mark.slow, id=name)
        for name, call in CALLS.items()
    ],
)
def test_forward_and_backward_compile_and_hardly_spill(width, kv_heads, options, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    (device,) = h100s(1)
    where = NamedSharding(Mesh(np.array([device]), ("x",)), P())
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, width), jnp.bfloat16, sharding=where) for heads in (4, kv_heads))
    packed = "segment_ids" in options
    ids = {"segment_ids": jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=where)} if packed else {}

    def backward(q, k, v, ids):
        call = functools.partial(attention, **{**options, **ids}, implementation="mosaic_gpu")
        return jax.grad(lambda *arrays: call(*arrays).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    with target(device):
        jax.jit(backward).trace(q, k, k, ids).lower(lowering_platforms=("cuda",)).compile()
    spills = spilled_bytes(tmp_path)
    assert len(spills) == (4 if width > 128 else 3), "the forward pass, and a kernel or two for k and v, and one for q"
    # The forward is the first. Both gradients of k and v leave some registers too little.
    assert spills[0] == 0
    # Of 256 columns the kernel for q, the second, spills more, where a tile begins and in the steps on an edge: its
    # loop over blocks that are seen as a whole has none.
    assert all(spilled <= (192 if width == 256 and i == 1 else 128) for i, spilled in enumerate(spills)), spills


WHOLE = {(c.implementation, c.spec.name): c for c in cases() if c.op is attention and "scaled" not in c.spec.tags}


@pytest.mark.parametrize(
    "name",
    ["decode", *(pytest.param(name, marks=pytest.mark.slow) for name in ("decode-16", "decode-64", "width-192"))],
)
def test_split_keys_compile_and_do_not_spill(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    call = conformance.call_of(attention, WHOLE["split_keys", name].spec)
    where = NamedSharding(Mesh(np.array(h100s(1)), ("x",)), P())
    arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), call.arrays)

    def forward(arrays):
        arguments, options = call.rebuild(arrays)
        return attention(*arguments, **options, implementation="split_keys")

    with target(h100s(1)[0]):
        jax.jit(forward).trace(arrays).lower(lowering_platforms=("cuda",)).compile()
    assert spilled_bytes(tmp_path) == [0]


LAUNCHED = re.compile(r"= .* (fusion|custom-call|copy|reduce|broadcast|iota|slice|pad|concatenate|transpose)\(")


def one_h100(tree):
    """The shapes on it."""
    where = NamedSharding(Mesh(np.array(h100s(1)), ("x",)), P())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)


@pytest.mark.parametrize(("number", "most"), [(True, 6), (False, 10)], ids=["a number", "arrays"])
def test_launches_of_a_query_that_follows_a_cache(number, most):
    """Where positions are arrays, the blocks of keys that are seen are found by kernels before attention's own."""
    q, k = (jax.ShapeDtypeStruct((1, n, heads, 128), jnp.bfloat16) for n, heads in ((1, 32), (4096, 8)))
    sides = tuple(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (1, 4096))
    positions = jax.ShapeDtypeStruct((), jnp.int32) if number else sides

    def call(q, k, v, positions):
        return attention(q, k, v, causal=True, positions=positions, implementation="split_keys")

    with target(h100s(1)[0]):
        lowered = jax.jit(call).trace(*one_h100((q, k, k, positions))).lower(lowering_platforms=("cuda",))
    (entry,) = (lines for name, lines in computations(lowered.compile().as_text()).items() if name == "ENTRY")
    assert 2 <= sum(bool(LAUNCHED.search(line)) for line in entry) <= most


def test_a_token_is_written_into_the_cache_where_it_is():
    """Nothing but that writes an array of the whole cache."""
    model = ModelConfig.preset("124m", layers=2, vocab_size=512, dtype="bfloat16").for_platform("gpu")
    parameters = jax.eval_shape(lambda: initialize(model, jax.random.key(0)))
    cache = jax.eval_shape(lambda: empty_cache(model, 1, 4096))
    given = parameters, jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32), cache
    with target(h100s(1)[0]):
        traced = jax.jit(functools.partial(decode, model), donate_argnums=3).trace(*one_h100(given))
        text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    whole = f"bf16[{','.join(map(str, cache['keys'].shape))}]"
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", text))
    lines = [line for name, lines in computations(text).items() if name not in fused for line in lines]
    written = [line for line in lines if LAUNCHED.search(line) and whole in line.split("fusion(")[0].split("copy(")[0]]
    assert len(written) == 2, written  # of keys and of values, in the loop over layers
    assert all("dynamic_update_slice" in line.split("fusion(")[0] for line in written)


@pytest.mark.parametrize(("name", "kernels"), [("packed", 3), ("bias-of-keys", 4)])
def test_the_gradient_of_a_bias_is_a_kernel_of_its_own(name, kernels):
    pytest.importorskip("triton")
    compiled = conformance.lowered(WHOLE["triton", name], h100s(1)[0]).compile()
    assert compiled.as_text().count('custom_call_target="triton_kernel_call_ffi"') == kernels
    compiled = conformance.lowered(WHOLE["mosaic_tpu", name], v5es()[0]).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels


@pytest.mark.parametrize(
    "name",
    # In one case of each width; the others take minutes and have said nothing new.
    [
        pytest.param(name, marks=() if name in ("gpt2", "llama-8b", "gemma", "packed-128") else pytest.mark.slow)
        for (implementation, name), case in WHOLE.items()
        if implementation == "mosaic_tpu" and not case.small and name != "t5"
    ],
)
def test_memory_on_a_tpu_is_linear_in_the_length(name):
    """Heads first, gradients, and what is float32."""
    case = WHOLE["mosaic_tpu", name]
    q, k, _ = conformance.call_of(case.op, case.spec).arrays.floating.values()
    tokens = sum(math.prod(array.shape[:3]) for array in (q, k, k))
    compiled = conformance.lowered(case, v5es()[0]).compile()
    lanes = -(-q.shape[3] // 128) * 128
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22 + 3 * 4 * tokens * lanes


def of_scores(batch: int, length: int, heads: int, kv_heads: int):
    """Forward and backward of a causal call that may keep the gradients of its scores, compiled."""
    where = NamedSharding(Mesh(np.array(h100s(1)), ("x",)), P())
    q, k = (jax.ShapeDtypeStruct((batch, length, n, 128), jnp.bfloat16, sharding=where) for n in (heads, kv_heads))

    def backward(q, k, v):
        call = functools.partial(attention, causal=True, implementation="mosaic_gpu")
        return jax.grad(lambda *arrays: call(*arrays).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    with target(h100s(1)[0]):
        return jax.jit(backward).trace(q, k, k).lower(lowering_platforms=("cuda",)).compile()


@pytest.mark.parametrize(
    ("call", "mib"),
    # What one part keeps; where one group of heads would need more than the bound, nothing is kept.
    [((4, 4096, 16, 16), 530), ((1, 32768, 16, 16), 1032), ((1, 4096, 32, 8), 530), ((1, 65536, 16, 16), 0)],
    ids=["short", "long", "grouped", "longer"],
)
def test_the_gradients_of_scores_take_bounded_memory(call, mib):
    compiled = of_scores(*call)
    arrays = 2 * call[0] * call[1] * call[2] * 128
    # Beside them the forward's result and its cotangent, and a few numbers a row.
    assert compiled.memory_analysis().temp_size_in_bytes < mib * 2**20 + 2.1 * arrays
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 3  # in a loop over the parts: nothing is compiled twice
    assert ("AllocateBuffer" in text) == bool(mib)


@pytest.mark.parametrize("width", [64, 128])
def test_sharded_by_batch_and_heads_nothing_is_gathered(width):
    devices = h100s(8)
    mesh = Mesh(np.array(devices).reshape(4, 2), ("data", "model"))
    where = NamedSharding(mesh, P("data", None, "model"))
    q, k = (jax.ShapeDtypeStruct((8, 1024, heads, width), jnp.bfloat16, sharding=where) for heads in (4, 2))
    # Without them, heads of 128 keep the gradients of their scores.
    segment_ids = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=NamedSharding(mesh, P("data")))
    segment_ids = segment_ids if width == 64 else None

    def gradients(q, k, v, segment_ids):
        def total(*arrays):
            out = attention(*arrays, causal=True, segment_ids=segment_ids, implementation="mosaic_gpu")
            return out.astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    with target(devices[0]):
        lowered = jax.jit(gradients).trace(q, k, k, segment_ids).lower(lowering_platforms=("cuda",))
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 3
    # A device's own queries: 2 rows, 2 heads.
    assert f"bf16[2,1024,1,2,{width}]" in text or f"bf16[2,1024,2,{width}]" in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_sharded_on_tpus_nothing_is_gathered():
    mesh = Mesh(np.array(v5es()).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    places = {"q": P("data", None, "model"), "bias": P(None, "model")}
    shapes = {"q": (4, 512, 4, 64), "k": (4, 512, 2, 64), "v": (4, 512, 2, 64), "bias": (1, 4, 512, 512)}
    arrays = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, places.get(name, places["q"])))
        for name, shape in shapes.items()
    }

    def total(arrays):
        return attention(**arrays, causal=True, implementation="mosaic_tpu").astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(total)).trace(arrays).lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 4
    assert "bf16[2,2,64,512]" in text  # a device's own queries: 2 rows, 2 heads
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


@pytest.mark.parametrize("ulysses", [1, 2, 4])
def test_the_ring_on_tpus_runs_in_kernels(ulysses):
    layout = parallel.Layout(
        parallel.make_mesh(data=1, sequence=4, devices=v5es()), parallel.strategy("fsdp", ulysses=ulysses)
    )
    where = NamedSharding(layout.mesh, P(None, "sequence"))
    q, k = (jax.ShapeDtypeStruct((1, 2048, heads, 64), jnp.bfloat16, sharding=where) for heads in (8, 4))
    segment_ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32, sharding=where)

    def gradients(q, k, v, segment_ids):
        def total(*arrays):
            return (
                layout.attend(packed_attention, *arrays, segment_ids, causal=True, blocks=FusedBlockAttention)
                .astype(jnp.float32)
                .sum()
            )

        return jax.grad(total, (0, 1, 2))(q, k, v)

    with target(v5es()[0]):
        lowered = jax.jit(gradients).trace(q, k, k, segment_ids).lower(lowering_platforms=("tpu",))
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3
    assert ("collective-permute" in text) == (ulysses < 4)
