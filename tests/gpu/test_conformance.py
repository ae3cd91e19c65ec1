"""Every implementation of every op on an NVIDIA GPU, on fresh inputs.

Small calls are compared with the reference in float64 on the host, real ones with XLA in float32, which the small ones
check, or with the reference in float32 where an op has no implementation "xla". What was collected is compiled in
threads ahead of the tests.
"""

import functools

import jax
import numpy as np
import pytest

from crescendo.pallas_kernels import conformance
from crescendo.pallas_kernels.conformance import cases

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SEED = int(np.random.default_rng().integers(2**31))


def runs_here(case) -> bool:
    """All small calls, and real ones whose float32 results fit beside them; XLA is what those are compared with."""
    if case.implementation == "reference" or "scaled" in case.spec.tags:
        return False
    fits = case.op.__name__ == "attention" or (case.spec.flops < 1e12 and "float32" not in case.spec.name)
    return case.small or (fits and case.implementation != "xla" and "xla" in case.op.implementations)


@functools.cache
def refusal(case) -> str:
    return conformance.refusal(case.op, case.implementation, conformance.call_of(case.op, case.spec))


@functools.cache
def drawn(op, spec):
    """The call, and cotangents, the same in all precisions."""
    call = conformance.call_of(op, spec, SEED)
    return call, conformance.cotangents_for(op, call, SEED)


def calls(case):
    """What is compiled for a case, and how exact results are found: `(function, *arguments)` each."""
    yield conformance.compiled, case.op, case.implementation, case.spec
    if case.small:
        yield conformance.exactly, case.op, case.spec, SEED, None
    else:
        exact = "xla" if "xla" in case.op.implementations else "reference"
        yield conformance.compiled, case.op, exact, case.spec, "float32"


def foreseen(parameters):
    """What a test of these parameters will ask for (`ahead`)."""
    if "case" in parameters and not refusal(parameters["case"]):
        drawn(parameters["case"].op, parameters["case"].spec)
        yield from calls(parameters["case"])


@pytest.mark.parametrize("case", sorted(filter(runs_here, cases()), key=lambda case: not case.small), ids=str)
def test_results_and_gradients(case, ahead, poisoned):
    if reason := refusal(case):
        pytest.skip(reason)
    compiled, exact = (ahead(*call) for call in calls(case))
    call, cotangents = drawn(case.op, case.spec)
    if not case.small:
        exact = poisoned(exact, conformance.call_of(case.op, case.spec, SEED, "float32").arrays, cotangents)
    conformance.compare(case, poisoned(compiled, call.arrays, cotangents), exact, call)


quick_kernels = pytest.mark.parametrize(
    "case", [case for case in cases("quick", platforms=["gpu"]) if case.implementation != "cudnn"], ids=str
)


@quick_kernels
def test_under_vmap(case):
    if reason := refusal(case):
        pytest.skip(reason)
    conformance.check_vmap(case, None, SEED)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two GPUs")
@quick_kernels
def test_on_two_devices(case):
    """Each runs the kernel on its part, in one program that XLA splits."""
    if reason := refusal(case):
        pytest.skip(reason)
    conformance.check_sharded(case, None, SEED)
