"""Every implementation of every op compiled for devices that are not here, and Triton's in its interpreter."""

import contextlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from jax.experimental import topologies

from crescendo.pallas_kernels import conformance, tiles
from crescendo.pallas_kernels.conformance import cases
from crescendo.pallas_kernels.interpreter import interpreted

pytestmark = [
    pytest.mark.aot,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton"),
]
HERE = Path(__file__).parent
SEED = int(np.random.default_rng().integers(2**31))
WHOLE = [
    case for case in cases() if "scaled" not in case.spec.tags and case.implementation not in ("cudnn", "reference")
]
# On the others they take minutes and have said nothing new.
EVERY_DAY = "v5e:2x2"


def device_of(target: str):
    if target != "h100":
        return topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    config = (HERE / "h100.txtpb").read_text()
    return topologies.get_topology_desc("h100", "cuda", target_config=config, topology="1x1x1").devices[0]


def compiled_for(target: str, case):
    """The case's program; skips what the implementation refuses."""
    try:
        lowered = conformance.lowered(case, device_of(target))
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    compiled = lowered.compile()
    assert case.home.in_program in compiled.as_text()
    return compiled


def every_day(case) -> bool:
    """Kernels in calls that say most, and row kernels at their real sizes: attention's take half a minute each."""
    real = "speed" in case.spec.tags and case.op.__name__ != "attention"
    return (case.quick or real) and case.implementation != "xla"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=() if every_day(case) else pytest.mark.slow)
        for case in WHOLE
        if case.home.platform != "tpu"
    ],
)
def test_compiles_for_an_h100(case):
    assert compiled_for("h100", case).memory_analysis() is not None


@pytest.mark.parametrize(
    ("target", "case"),
    [
        pytest.param(
            target,
            case,
            id=f"{target}-{case}",
            marks=() if target == EVERY_DAY and every_day(case) else pytest.mark.slow,
        )
        for target in (EVERY_DAY, "v5p:2x2x1", "v6e:2x2")
        for case in WHOLE
        if case.home.platform == "tpu"
    ],
)
def test_compiles_for_tpus(target, case):
    assert compiled_for(target, case).memory_analysis() is not None


# Every branch of attention's kernels once; what is left are other widths and the scaled shapes of real models.
ATTENTION_EVERY_DAY = {
    *("packed", "square", "one-query", "ring", "bias-shared", "bias-hides", "empty-rows", "capped", "window"),
    *("window-both-ways", "unequal", "unequal-causal", "half", "odd", "one-token", "width-80", "segments-of-one"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=str(case),
            marks=() if case.op.__name__ != "attention" or case.spec.name in ATTENTION_EVERY_DAY else pytest.mark.slow,
        )
        for case in cases(platforms=["gpu"])
        if case.implementation == "triton" and case.small
    ],
)
def test_triton_kernels_interpreted(case):
    with contextlib.ExitStack() as stack:
        for (op_name, kernel), fields in conformance.fine_tiles(case.op).items():
            stack.enter_context(tiles.cut(op_name, kernel, **fields))
        stack.enter_context(interpreted(case.home.stand_in))
        try:
            dtype = conformance.widest_served(case)
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        conformance.check(case, dtype, SEED)
