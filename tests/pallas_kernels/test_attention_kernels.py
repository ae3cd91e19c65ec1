"""Attention's kernels for TPU in ways that the small calls don't take them by themselves; interpreted."""

import pytest

from crescendo.pallas_kernels import conformance, tiles
from crescendo.pallas_kernels.conformance import cases
from crescendo.pallas_kernels.interpreter import interpreted

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
CASES = {c.spec.name: c for c in cases(platforms=["tpu"]) if c.op.__name__ == "attention"}


def check(name, dtype, **tile):
    case = CASES[name]
    with tiles.cut("attention", "on TPU", block=128, **tile), interpreted(case.home.stand_in):
        conformance.check(case, dtype)


@pytest.mark.parametrize("name", ["packed", "unequal", "window", "empty-rows", "ring"])
def test_a_block_at_a_time(name):
    """Keys, and in their gradients queries, that don't fit: every block is a chunk of its own."""
    check(name, "float32", chunk_bytes=1)


@pytest.mark.parametrize("name", ["packed", "bias-hides"])
def test_half_precision(name):
    check(name, None)
