"""The presets' training steps, compiled for machines that are not here, within a memory budget.

The H100's description (`h100.txtpb`) is XLA's own format. cuDNN can't be called without a device, so attention is
XLA's there: on the real one it needs less.
"""

import functools
import json
import re
from pathlib import Path

import pytest
from jax.experimental import topologies

from crescendo import optim, parallel
from crescendo.experiments.benchmarks.profile import Instruction, instructions
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.trainer.compilation import peak_bytes
from crescendo.experiments.trainer.session import Session
from crescendo.models import ModelConfig
from crescendo.optim import schedules
from crescendo.optim.batch_size import staged
from crescendo.parallel.collectives import computations

HERE = Path(__file__).parent
BUDGETS_MIB = json.loads((HERE / "budgets.json").read_text())
MOVES_NOTHING = ("while", "conditional", "tuple", "get-tuple-element", "bitcast", "parameter", "constant")
# preset: tokens in a row, examples of a microbatch on a device, and what the larger ones need to fit.
SHAPES: dict[str, tuple[int, int, dict]] = {
    "debug": (128, 8, {}),
    "30m": (512, 8, {}),
    "124m": (1024, 4, {}),
    "1b": (2048, 2, {"remat": "full"}),
}


@functools.cache
def devices(target: str):
    if target == "h100":
        config = (HERE / "h100.txtpb").read_text()
        return topologies.get_topology_desc("h100", "cuda", target_config=config, topology="1x1x1").devices
    return topologies.get_topology_desc(platform="tpu", topology_name=target).devices


@functools.cache
def compiled(target: str, preset: str):
    sequence_length, on_a_device, changes = SHAPES[preset]
    chips = devices(target)
    # On a pod the parameters are split over 16 chips at most, and the batch over all.
    mesh = parallel.make_mesh(data=-1, fsdp=min(len(chips), 16), devices=chips)
    microbatch = on_a_device * len(chips)
    policy = staged([microbatch, 4 * microbatch], starts_examples=[0, 100 * microbatch])
    session = Session(
        data=RandomText(ModelConfig.preset(preset).vocab_size, sequence_length),
        model=ModelConfig.preset(preset, **changes),
        optimizer=optim.adamw(schedules.linear(1e-3)),
        batch_size=policy,
        total_examples=10_000,
        mesh=mesh,
    )
    plan = parallel.plan_batches(policy.sizes, len(chips), microbatch)
    return session.lower(plan, implementation="xla").compile()


def ran(text: str) -> list[Instruction]:
    """What a program runs itself, of a loop its body once: not what is within kernels."""
    loops, program = set(re.findall(r"body=%?([\w.\-]+)", text)), instructions(text)
    lines = [line for name, body in computations(text).items() if name == "ENTRY" or name in loops for line in body]
    found = [program[match[1]] for line in lines if (match := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line))]
    return [instruction for instruction in found if instruction.opcode not in MOVES_NOTHING]


# Half a minute each and more: of each preset one kind of device will do every day.
SLOW = {
    *((target, "30m") for target in BUDGETS_MIB),
    ("v5e:2x2", "124m"),
    *((target, "1b") for target in BUDGETS_MIB if target != "h100"),
}
CASES = [
    pytest.param(target, preset, marks=pytest.mark.slow if (target, preset) in SLOW else ())
    for target, budgets in BUDGETS_MIB.items()
    for preset in budgets
]


@pytest.mark.aot
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("target", "preset"), CASES)
def test_the_step_compiles_within_its_memory_budget(target, preset, within_budget):
    peak_mib = peak_bytes(compiled(target, preset)) / 2**20
    print(f"{target} {preset}: {peak_mib:,.0f} MiB of {BUDGETS_MIB[target][preset]:,} MiB")
    assert peak_mib <= BUDGETS_MIB[target][preset]
    # A budget far above what is needed would hold nothing.
    assert peak_mib >= 0.5 * BUDGETS_MIB[target][preset]
    if (target, preset) == ("h100", "124m"):  # here, and not in a test of its own, which another process would take
        found = ran(compiled(target, preset).as_text())
        within_budget(
            "124m for an H100",
            flops=int(sum(instruction.flops for instruction in found)),
            bytes_accessed=int(sum(instruction.moved_bytes for instruction in found)),
            temporary_bytes=compiled(target, preset).memory_analysis().temp_size_in_bytes,
        )


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:8x8x16"])
def test_sharded_parameters_are_gathered_and_gradients_reduced(target):
    text = compiled(target, "debug").as_text()
    assert "all-gather" in text
    assert "all-reduce" in text or "reduce-scatter" in text


@pytest.mark.aot
def test_no_projection_is_cut_out_of_a_product_of_several():
    """XLA would put their weights beside each other, and later their gradients: `compilation.STEP_OPTIONS`."""
    text = compiled("h100", "debug").as_text()
    assert " dot(" in text
    assert not re.search(r"= bf16\[\d+,\d+\]\S* concatenate\(", text)  # stacks of layers have an axis more
