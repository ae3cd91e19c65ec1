"""Attention on an NVIDIA GPU: no worse than cuDNN, the same every time, and within its arrays."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.pallas_kernels import conformance
from crescendo.pallas_kernels.attention import attention
from crescendo.pallas_kernels.attention.specs import SPECS
from crescendo.pallas_kernels.conformance import Case
from crescendo.pallas_kernels.op import Spec

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SEED = int(np.random.default_rng().integers(2**31))
# Of cuDNN's error, and what both may lose where that is almost nothing.
NO_WORSE, ALMOST_NOTHING = 1.3, 1e-5


def without_lse(spec: Spec) -> Spec:
    """cuDNN has no gradient of it."""

    def make(key):
        arguments, options = spec.make(key)
        return arguments, {name: value for name, value in options.items() if name != "return_lse"}

    return dataclasses.replace(spec, make=make)


CALLS = {spec.name: without_lse(spec) for spec in SPECS if "scaled" not in spec.tags}


@functools.cache
def refusal(implementation: str, name: str) -> str:
    return conformance.refusal(attention, implementation, conformance.call_of(attention, CALLS[name]))


def calls(implementation: str, name: str):
    """What is compiled, its own and cuDNN's, and how exact results are found: `(function, *arguments)` each."""
    spec = CALLS[name]
    yield conformance.compiled, attention, implementation, spec
    yield conformance.compiled, attention, "cudnn", spec
    if Case(attention, implementation, spec).small:
        yield conformance.exactly, attention, spec, SEED, None
    else:
        yield conformance.compiled, attention, "xla", spec, "float32"


def foreseen(parameters):
    """What a test of these parameters will ask for (`ahead`)."""
    if {"implementation", "name"} <= set(parameters):
        asked = parameters["implementation"], parameters["name"]
        if not refusal(*asked) and not refusal("cudnn", asked[1]):
            yield from calls(*asked)


on_device = jax.jit(functools.partial(conformance.error, xp=jnp))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
def test_no_worse_than_cudnn(implementation, name, ahead, poisoned):
    if reason := refusal(implementation, name) or refusal("cudnn", name):
        pytest.skip(reason)
    ours, theirs, exact = (ahead(*call) for call in calls(implementation, name))
    call = conformance.call_of(attention, CALLS[name], SEED)
    cotangents = conformance.cotangents_for(attention, call, SEED)
    if not isinstance(exact, dict):
        exact = poisoned(exact, conformance.call_of(attention, CALLS[name], SEED, "float32").arrays, cotangents)

    def errors(compiled):
        found = poisoned(compiled, call.arrays, cotangents)
        return {name: float(on_device(array, jnp.asarray(exact[name]))) for name, array in found.items()}

    own, of_cudnn = errors(ours), errors(theirs)
    print(f"\n{implementation} {name}", *(f"{part} {value:.1e}" for part, value in own.items()), flush=True)
    worse = {
        part: (own[part], value)
        for part, value in of_cudnn.items()
        if not own[part] <= NO_WORSE * value + ALMOST_NOTHING
    }
    assert not worse, (SEED, worse)


@pytest.mark.parametrize("implementation", ["split_keys", "mosaic_gpu", "triton"])
def test_the_same_bits_every_time(implementation, ahead, poisoned):
    spec = next(spec for spec in SPECS if spec.name == "packed")
    call = conformance.call_of(attention, spec, SEED)
    cotangents = conformance.cotangents_for(attention, call, SEED)
    compiled = ahead(conformance.compiled, attention, implementation, spec)
    first = poisoned(compiled, call.arrays, cotangents)
    for _ in range(5):
        for name, again in poisoned(compiled, call.arrays, cotangents).items():
            assert np.asarray(first[name]).tobytes() == np.asarray(again).tobytes(), name


SMALLEST = """
import jax, jax.numpy as jnp
from crescendo.pallas_kernels.attention import attention
q, k = jnp.ones((1, 40, 2, 64), jnp.bfloat16), jnp.ones((1, 40, 1, 64), jnp.bfloat16)
for implementation in ("mosaic_gpu", "triton"):
    loss = lambda *x: attention(*x, causal=True, implementation=implementation).astype(jnp.float32).sum()
    jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, k))
print("finished")
"""


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer on the PATH")
def test_no_access_out_of_bounds():
    # Every array has an allocation of its own, or what lies beyond it would be the allocator's too.
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SMALLEST]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    assert "finished" in finished.stdout
