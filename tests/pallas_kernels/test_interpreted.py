"""Pallas' kernels for GPU and TPU on calls that are special to them, under JAX's interpreters; races are errors."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from crescendo.pallas_kernels import conformance, tiles
from crescendo.pallas_kernels.conformance import HOMES, Case
from crescendo.pallas_kernels.interpreter import interpreted
from crescendo.pallas_kernels.linear_cross_entropy import linear_cross_entropy
from crescendo.pallas_kernels.linear_cross_entropy.specs import EVERY_OPTION
from crescendo.pallas_kernels.op import Spec, target
from crescendo.pallas_kernels.softmax import log_softmax, softmax

SLOW = pytest.mark.slow
TPU = AbstractDevice("TPU v5e", 1, "tpu")
OPTIONS = {name: value for name, value in EVERY_OPTION.items() if name != "weighted"}
fine_rows = functools.partial(tiles.cut, "hopper", "rows", blocks=1, piece=512, cluster_rows=4)


def distance(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.0, 40.0], ids=["usual rows", "a loss that overflows"])
def test_linear_cross_entropy_for_hopper(spread):
    random = np.random.default_rng()
    x, w = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in ((300, 192), (256, 192)))
    w, labels = w / 8, jnp.asarray(random.integers(0, 256, 300))
    x = x.at[280].mul(spread)  # its logits are up to 200, in the second chunk

    def run(implementation, x, w):
        loss = lambda x, w: linear_cross_entropy(x, w, labels, **OPTIONS, implementation=implementation)[0]  # noqa: E731
        return jax.tree.leaves(jax.value_and_grad(loss, (0, 1))(x, w))

    cut = tiles.cut("linear_cross_entropy", "chunks", bytes=0, least_rows=256)
    with cut, interpreted(HOMES["mosaic_gpu"].stand_in):
        found = run("mosaic_gpu", x, w)
    expected = run("reference", x.astype(jnp.float32), w.astype(jnp.float32))
    assert distance(found[0], expected[0]) < 1e-5
    dx_error, dw_error = (distance(f, e) for f, e in zip(found[1:], expected[1:], strict=True))
    # Rounding the results alone costs 1.7e-3. The long row is nearly all of dW, which so is a product of two rounded
    # vectors: its exponentials, where one number may be all and off by 2^-8, and its scaled x, off by 1.7e-3.
    assert dx_error < 1.2 * 2**-9
    assert dw_error < (1.2 * 2**-9 if spread == 1 else 1.2 * 2**-8)


def extremes(key):
    """Rows of nothing, with a hole, with one entry that is all, and one that is half empty and far below 0."""
    x = 4 * jax.random.normal(key, (7, 1280))
    x = x.at[1].set(-jnp.inf).at[0, 5].set(-jnp.inf).at[2, 7].set(1e4).at[3, :640].set(-jnp.inf).at[3].add(-300)
    return (x,), {"scale": 0.5}


@pytest.mark.parametrize("op", [softmax, pytest.param(log_softmax, marks=SLOW)], ids=lambda op: op.__name__)
@pytest.mark.parametrize(
    ("held", "part"),
    [
        pytest.param(0, 2**20, id="read again", marks=SLOW),
        pytest.param(2**20, 2**20, id="held", marks=SLOW),
        pytest.param(0, 2048, id="shared"),
    ],
)
def test_softmax_for_hopper(op, held, part):
    with fine_rows(held=held, part_bytes=part), interpreted(HOMES["mosaic_gpu"].stand_in):
        conformance.check(Case(op, "mosaic_gpu", Spec("extremes", extremes)))


def gradient_of_the_sum(implementation):
    """Of bfloat16 softmaxes: 0 but for the rounding of float32 sums, for a row always adds up to 1."""
    x = jnp.asarray(4 * np.random.default_rng().normal(size=(5, 1280)), jnp.bfloat16)
    y, back = jax.vjp(lambda x: softmax(x, implementation=implementation), x)
    return back(jnp.ones_like(y))[0]


@pytest.mark.parametrize(
    ("implementation", "cut"),
    [
        pytest.param("mosaic_gpu", functools.partial(fine_rows, part_bytes=2**20), id="hopper-alone", marks=SLOW),
        pytest.param("mosaic_gpu", functools.partial(fine_rows, part_bytes=1024), id="hopper-shared"),
        pytest.param("mosaic_tpu", contextlib.nullcontext, id="tpu"),
    ],
)
def test_softmax_loses_nothing_to_rounded_results(implementation, cut):
    with cut(), interpreted(HOMES[implementation].stand_in):
        assert jnp.max(jnp.abs(gradient_of_the_sum(implementation))) < 1e-6


def test_kernels_for_tpu_leave_calls_that_xla_would_have_to_split():
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    run = lambda x: softmax(x, implementation="mosaic_tpu")  # noqa: E731
    with target(TPU):
        with pytest.raises(NotImplementedError, match=r"mosaic_tpu: .*inside jax.shard_map"):
            jax.jit(run).trace(x)
        mesh = AbstractMesh((1,), ("x",), abstract_device=TPU)
        mapped = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        with jax.sharding.use_abstract_mesh(mesh):
            assert "tpu_custom_call" in jax.jit(mapped).trace(x).lower(lowering_platforms=("tpu",)).as_text()
