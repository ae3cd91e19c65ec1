"""Row kernels on an NVIDIA GPU: rows that programs share, sums that are exact, and losses over several chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.pallas_kernels import conformance, tiles
from crescendo.pallas_kernels.conformance import Case
from crescendo.pallas_kernels.linear_cross_entropy import linear_cross_entropy
from crescendo.pallas_kernels.op import Spec
from crescendo.pallas_kernels.softmax import log_softmax, softmax

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SEED = int(np.random.default_rng().integers(2**31))


@pytest.mark.parametrize("op", [softmax, log_softmax], ids=lambda op: op.__name__)
@pytest.mark.parametrize(("shape", "columns"), [((300, 40_000), 16384), ((3, 300_001), 8192), ((2, 300_001), 1024)])
def test_rows_shared_by_programs_and_rows_too_long_for_that(op, shape, columns):
    def extremes(key):
        return ((2 * jax.random.normal(key, shape)).at[1].set(-jnp.inf).at[0, 5].set(-jnp.inf),), {}

    cut = dict(alone=columns, shared=columns)
    with tiles.cut("softmax", "forward", **cut), tiles.cut("softmax", "backward", **cut):
        conformance.check(Case(op, "triton", Spec("extremes", extremes)), None, SEED)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
@pytest.mark.parametrize("shape", [(300, 1024), (5, 131072)])
def test_softmax_loses_nothing_to_rounded_results(implementation, shape):
    """A row always adds up to 1, so a cotangent that is the same everywhere gives no gradient."""
    x = 4 * jax.random.normal(jax.random.key(SEED), shape, jnp.bfloat16)
    run = jax.jit(lambda x: jax.vjp(functools.partial(softmax, implementation=implementation), x)[1](jnp.ones_like(x)))
    assert jnp.max(jnp.abs(run(x)[0])) < 1e-6


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_linear_cross_entropy_over_several_chunks(implementation):

    def several(key):
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[0], (2500, 768), jnp.bfloat16)
        w = (jax.random.normal(keys[1], (50304, 768)) / 16).astype(jnp.bfloat16)
        weights = jax.random.uniform(keys[3], (2500,))
        return (x, w, jax.random.randint(keys[2], (2500,), 0, 50304)), {
            "weights": weights,
            "z_loss": 1e-3,
            "ignore_id": 7,
        }

    case = Case(linear_cross_entropy, implementation, Spec("several chunks", several))
    if reason := conformance.refusal(case.op, implementation, conformance.call_of(case.op, case.spec)):
        pytest.skip(reason)
    call = conformance.call_of(case.op, case.spec, SEED)
    cotangents = conformance.cotangents_for(case.op, call, SEED)
    with tiles.cut("linear_cross_entropy", "chunks", bytes=0):
        found = conformance.compiled(case.op, implementation, case.spec)(call.arrays, cotangents)
    wide = conformance.call_of(case.op, case.spec, SEED, "float32").arrays
    exact = conformance.compiled(case.op, "xla", case.spec, "float32")(wide, cotangents)
    conformance.compare(case, found, exact, call)
