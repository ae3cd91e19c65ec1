"""Ring and Ulysses attention on two GPUs or more, through the fused kernels, against one GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo.models.attention import packed_attention
from crescendo.pallas_kernels.attention.blocks import FusedBlockAttention
from crescendo.parallel import Layout, make_mesh, strategy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("ulysses", [1, 2])
def test_two_gpus_equal_one(ulysses):
    layout = Layout(make_mesh(data=1, sequence=2, devices=jax.devices()[:2]), strategy(ulysses=ulysses))
    length, random = 4096, np.random.default_rng()
    q, k, v, cotangent = (
        jnp.asarray(random.normal(size=(2, length, heads, 128)), jnp.bfloat16) for heads in (8, 4, 4, 8)
    )
    segment_ids = jnp.asarray(np.sort(random.integers(0, 6, size=(2, length)), axis=1), jnp.int32)
    order = np.arange(length) if layout.order(length) is None else layout.order(length)

    def ours(q, k, v):
        arrays = (x[:, order] for x in (q, k, v, segment_ids))
        return layout.attend(packed_attention, *arrays, causal=True, blocks=FusedBlockAttention)[:, np.argsort(order)]

    def theirs(q, k, v):
        return packed_attention(q, k, v, segment_ids, causal=True, implementation=("mosaic_gpu", "triton"))

    def reference(q, k, v):
        exact = (x.astype(jnp.float32) for x in (q, k, v))
        return packed_attention(*exact, segment_ids, causal=True, implementation="reference")

    def everything(function):
        output, pull = jax.vjp(jax.jit(function), q, k, v)
        return output, *pull(cotangent.astype(output.dtype))

    with jax.default_matmul_precision("highest"):
        exact = [np.asarray(x, np.float32) for x in everything(reference)]
    error = lambda a, b: np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)  # noqa: E731
    for mine, alone, wanted in zip(everything(ours), everything(theirs), exact, strict=True):
        # Partial results and gradients are rounded to bfloat16 once more than on one GPU.
        assert error(mine, wanted) <= 1.5 * error(alone, wanted) + 1e-4
        assert error(mine, wanted) < 1e-2
