"""Attention on an NVIDIA GPU: every implementation on every spec, on fresh inputs, beside cuDNN's own error.

Small calls are compared with the reference in float64 on the host, real ones with the chunked implementation in
float32, which the small ones check. What was collected is compiled in threads ahead of the tests.
"""

import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.pallas_kernels.attention import attention, checking
from crescendo.pallas_kernels.attention.specs import SPECS
from crescendo.pallas_kernels.op import explain

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
BY_NAME = {spec.name: spec for spec in SPECS}
# The short versions of real calls are for machines without a GPU.
CHECKED = [spec for spec in SPECS if not spec.name.endswith("-scaled")]
SEED = int(np.random.default_rng().integers(2**31))
# bfloat16 keeps 8 bits: rounding the weights and the results alone costs about 2e-3.
TOLERANCE = 1e-2
# Of cuDNN's error, and what both may lose where that is almost nothing.
NO_WORSE, ALMOST_NOTHING = 1.3, 1e-5


def is_small(spec) -> bool:
    return bool(spec.tags & {"small", "awkward"})


@functools.cache
def shapes(spec):
    """The call's arrays as shapes, its constants, and the cotangents' shapes."""
    call = checking.case(spec)
    out = call.arrays["q"].shape
    like = jax.ShapeDtypeStruct(out, jnp.float32), jax.ShapeDtypeStruct(out[:3], jnp.float32)
    return call, like


@functools.cache
def refusal(implementation: str, spec) -> str:
    """Why it doesn't serve the spec, or nothing; cuDNN is asked for a result alone."""
    call, _ = shapes(spec)
    lse = implementation != "cudnn"
    answers = explain(attention, **call.arrays, **call.metadata, **call.options, return_lse=lse).answers
    return next(answer.reason for answer in answers if answer.implementation == implementation)


def build(implementation: str, spec):
    """The compiled `checking.everything`; "exact" is what real calls are compared with."""
    call, like = shapes(spec)
    arrays = call.arrays
    with jax.default_matmul_precision("highest" if implementation == "exact" else None):
        if implementation == "exact":
            implementation = "xla"
            arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), arrays)
        run = functools.partial(checking.everything, implementation, call.options, return_lse=implementation != "cudnn")
        return jax.jit(run).lower(arrays, call.metadata, like).compile()


@functools.cache
def drawn(spec):
    return checking.case(spec, SEED), checking.cotangents(spec, SEED)


def find_exact(spec, run):
    """Exact results, with the cotangent of the log-sum-exp and without; `run` is None for a small call."""
    given, (dout, dlse) = drawn(spec)
    if is_small(spec):
        at = checking.exactly(given)
    else:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), given.arrays)
        at = lambda cotangents: run(wide, given.metadata, cotangents)  # noqa: E731
    return at((dout, dlse)), at((dout, 0 * dlse))


def foreseen(parameters):
    """What a test of these parameters will ask for (`ahead`)."""
    if {"implementation", "spec"} <= set(parameters):
        implementation, spec = parameters["implementation"], parameters["spec"]
        if not refusal(implementation, spec):
            yield build, implementation, spec
            yield (find_exact, spec, None) if is_small(spec) else (build, "exact", spec)
            if not refusal("cudnn", spec):
                yield build, "cudnn", spec


def run(compiled, given, cotangents):
    """Results in memory that was full of NaN: one that nobody wrote shows."""
    poison = [jnp.full(info.shape, jnp.nan, info.dtype) for info in jax.tree.leaves(compiled.out_info) * 2]
    jax.block_until_ready(poison)
    del poison
    return compiled(given.arrays, given.metadata, cotangents)


on_device = jax.jit(functools.partial(checking.error, xp=jnp))


def errors(results, exact) -> dict[str, float]:
    measure = checking.error if isinstance(exact["out"], np.ndarray) else on_device
    return {name: float(measure(result, exact[name])) for name, result in results.items() if name != "seen"}


@pytest.mark.parametrize("spec", sorted(CHECKED, key=is_small, reverse=True), ids=lambda spec: spec.name)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla", "cudnn"])
def test_result_and_gradients(implementation, spec, ahead):
    if reason := refusal(implementation, spec):
        pytest.skip(reason)
    given, (dout, dlse) = drawn(spec)
    exact, exact_alone = ahead(find_exact, spec, None if is_small(spec) else ahead(build, "exact", spec))
    compiled = ahead(build, implementation, spec)
    alone = errors(run(compiled, given, (dout, 0 * dlse)), exact_alone)
    found = alone
    if implementation == "cudnn":
        alone.pop("lse")
    else:
        results = run(compiled, given, (dout, dlse))
        np.testing.assert_array_equal(results["seen"], exact["seen"])
        found = errors(results, exact)
    print(f"\n{implementation} {spec.name}", *(f"{name} {value:.1e}" for name, value in found.items()), flush=True)
    assert all(value < TOLERANCE for value in found.values()), (SEED, found)
    if implementation != "cudnn" and not refusal("cudnn", spec):
        theirs = errors(run(ahead(build, "cudnn", spec), given, (dout, dlse)), exact_alone)
        worse = {
            name: (alone[name], value)
            for name, value in theirs.items()
            if name != "lse" and not alone[name] <= NO_WORSE * value + ALMOST_NOTHING
        }
        assert not worse, (SEED, worse)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_the_same_bits_every_time(implementation, ahead):
    spec = BY_NAME["packed"]
    given, cotangents = drawn(spec)
    compiled = ahead(build, implementation, spec)
    first = run(compiled, given, cotangents)
    for _ in range(5):
        for name, again in run(compiled, given, cotangents).items():
            assert np.asarray(first[name]).tobytes() == np.asarray(again).tobytes(), name


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_under_vmap(implementation):
    given, _ = drawn(BY_NAME["packed"])
    q, k, v = (given.arrays[name] for name in "qkv")
    segment_ids = given.metadata["segment_ids"]

    def call(q, k, v, segment_ids):
        return attention(q, k, v, segment_ids=segment_ids, implementation=implementation, **given.options)

    rows = jax.vmap(call)(*(array[:, None] for array in (q, k, v, segment_ids)))
    np.testing.assert_array_equal(
        np.asarray(rows[:, 0], np.float32), np.asarray(call(q, k, v, segment_ids), np.float32)
    )


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
