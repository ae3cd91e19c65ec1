"""Experts over devices, as compiled for H100s: to whom tokens are sent, and what is beside it."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crescendo import parallel
from crescendo.experiments.runtime.hardware import topology_devices
from crescendo.experiments.trainer.compilation import options
from crescendo.models import ModelConfig
from crescendo.models.moe import Moe
from crescendo.parallel.collectives import computations

pytestmark = [pytest.mark.aot, pytest.mark.timeout(1200)]
SLOW = pytest.mark.slow
H100 = Path(__file__).parent / "h100.txtpb"
CONFIG = ModelConfig(
    vocab_size=512, width=1024, layers=1, heads=8, mlp_width=2048, experts=8, experts_per_token=2
).for_platform("gpu")


def compiled(layout: parallel.Layout) -> str:
    """A layer with experts and its gradients, four rows a device of the batch."""
    structure, abstract = nnx.split(nnx.eval_shape(lambda: Moe(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    held = {}
    for path, variable in abstract.flat_state():
        names, x = variable.get_metadata()["axes"], variable.get_value()
        sharding = layout.parameters({"x": names})["x"]
        held[path] = variable.replace(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))
    rows = jax.ShapeDtypeStruct(
        (4 * layout.batch_shards, 2048, CONFIG.width), jnp.bfloat16, sharding=layout.rows(("residual_length", None))
    )

    def total(state, x_BTD):
        y_BTD, _ = nnx.merge(structure, state)(x_BTD, layout, implementation="xla")
        return jnp.sum(jnp.square(y_BTD.astype(jnp.float32)))

    told = options(None, "gpu", layout)
    jitted = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), compiler_options=told)
    traced = jitted.trace(nnx.State.from_flat_path(held), rows)
    return traced.lower(lowering_platforms=("cuda",)).compile().as_text()


def groups(line: str) -> np.ndarray:
    """The devices that take part together, `[groups, devices]`, by their places in the mesh."""
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return np.array([[int(n) for n in each.split(",")] for each in re.findall(r"\{([\d,]+)\}", match[1])])
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if match:
        shape = [int(n) for n in match[3].split(",")]
        places = np.arange(np.prod(shape)).reshape(shape)
        order = [int(n) for n in match[4].split(",")] if match[4] else range(len(shape))
        return places.transpose(order).reshape(int(match[1]), int(match[2]))
    match = re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", line)
    assert match, f"no replica groups that this parser knows in: {line}"
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
    together = re.findall(r"'(\w+)'", match[2])
    places = np.arange(np.prod([*sizes.values()])).reshape([*sizes.values()])
    axes = [*sizes]
    order = [axes.index(axis) for axis in (*(axis for axis in axes if axis not in together), *together)]
    return places.transpose(order).reshape(-1, int(np.prod([sizes[axis] for axis in together])))


def test_groups_are_read_in_every_form():
    expected = [[0, 2], [1, 3], [4, 6], [5, 7]]
    for text in ("{{0,2},{1,3},{4,6},{5,7}}", "[4,2]<=[2,2,2]T(0,2,1)", "mesh['a'=2,'b'=2,'c'=2] {'b'}"):
        assert groups(f"replica_groups={text}, ").tolist() == expected


@pytest.mark.parametrize(
    ("axes", "over", "hosts_of_a_token"),
    [
        ({"data": 8, "sequence": 2, "tensor": 4}, ("sequence", "tensor"), 1),
        pytest.param({"data": 1, "fsdp": 8, "sequence": 2, "tensor": 4}, ("sequence", "tensor"), 1, marks=SLOW),
        pytest.param({"data": 1, "expert": 8, "tensor": 8}, ("expert",), 8, marks=SLOW),
    ],
    ids=str,
)
def test_tokens_stay_on_their_host_where_its_axes_split_the_experts(axes, over, hosts_of_a_token):
    devices = topology_devices("h100:1x8x8", H100)
    assert len({device.process_index for device in devices}) == 8
    mesh = parallel.make_mesh(**axes, devices=devices)
    text = compiled(parallel.Layout(mesh, parallel.strategy("fsdp", experts=over)))
    host = np.array([device.process_index for device in mesh.devices.flat])
    sent = [line for line in text.splitlines() if re.search(r" (ragged-)?all-to-all(-start)?\(", line)]
    # Which rows, there and back, and their gradients likewise.
    assert len(sent) == 5
    for line in sent:
        found = groups(line)
        assert sorted(found.flat) == list(range(64))
        assert {len({*host[group]}) for group in found} == {hosts_of_a_token}, line


def beside(text: str) -> dict[str, bool]:
    """Of each exchange of rows, whether a product lies between its start and its end."""
    found = {}
    for lines in computations(text).values():
        for i, line in enumerate(lines):
            if start := re.search(r"%([\w.\-]+) = .* ragged-all-to-all(-start)?\(", line):
                ends = (j for j in range(i, len(lines)) if f"ragged-all-to-all-done(%{start[1]})" in lines[j])
                between = lines[i + 1 : next(ends)] if start[2] else []
                found[start[1]] = any("gemm" in each.split("=")[0] for each in between)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("chunks", "at_least"), [(1, 0), (2, 4), (4, 8)])
def test_a_chunk_is_sent_beside_the_work_on_another(chunks, at_least):
    mesh = parallel.make_mesh(data=1, expert=8, devices=topology_devices("h100:1x1x8", H100))
    found = beside(compiled(parallel.Layout(mesh, parallel.strategy("fsdp", expert_chunks=chunks))))
    assert len(found) == 4 * chunks
    print(f"{chunks} chunks: {sum(found.values())} of {len(found)} exchanges have a product beside them")
    assert sum(found.values()) >= at_least
    assert chunks > 1 or not any(found.values())
