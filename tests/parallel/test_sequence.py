"""Ring and Ulysses attention against attention in one place, in outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crescendo.models.attention import packed_attention
from crescendo.pallas_kernels.attention.blocks import FusedBlockAttention
from crescendo.parallel import Layout, make_mesh, strategy
from crescendo.parallel.collectives import collectives
from crescendo.parallel.sequence import zigzag

B, T, H, K, E = 2, 32, 4, 2, 8


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)
    draw = lambda heads: jnp.float32(random.normal(size=(B, T, heads, E)))  # noqa: E731
    segment_ids = np.sort(random.integers(0, 4, size=(B, T)), axis=1)
    segment_ids[1] = 1  # one document that spans all devices
    return draw(H), draw(K), draw(K), jnp.int32(segment_ids), draw(H)


@pytest.mark.parametrize(
    ("sizes", "ulysses", "causal"),
    [
        ({"sequence": 4, "tensor": 2}, 1, True),
        # More devices than key heads: these are copied.
        pytest.param({"sequence": 8}, 4, True, marks=pytest.mark.slow),
        pytest.param({"sequence": 4, "data": 2}, 2, False, marks=pytest.mark.slow),
        *(
            pytest.param(sizes, ulysses, causal, marks=pytest.mark.slow)
            for sizes, ulysses in [
                ({"sequence": 8}, 1),
                ({"sequence": 8}, 2),
                ({"sequence": 2, "tensor": 2, "data": 2}, 1),
                ({"sequence": 4, "fsdp": 2}, 4),
                ({"sequence": 2, "tensor": 2, "fsdp": 2}, 2),
            ]
            for causal in (True, False)
        ),
    ],
)
def test_equals_attention_in_one_place(quick_compilation, problem, sizes, ulysses, causal):
    layout = Layout(make_mesh(**{"data": 1} | sizes), strategy(ulysses=ulysses))
    q, k, v, segment_ids, cotangent = problem
    order = np.arange(T) if layout.order(T) is None else layout.order(T)

    def ours(q, k, v):
        arrays = (x[:, order] for x in (q, k, v, segment_ids))
        return layout.attend(packed_attention, *arrays, causal=causal, blocks=FusedBlockAttention)[:, np.argsort(order)]

    output, pull = jax.vjp(jax.jit(ours), q, k, v)
    theirs = jax.jit(functools.partial(packed_attention, causal=causal))
    wanted, wanted_pull = jax.vjp(lambda *x: theirs(*x, segment_ids), q, k, v)
    np.testing.assert_allclose(output, wanted, atol=2e-6)
    for a, b in zip(pull(cotangent), wanted_pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


@given(st.integers(1, 16), st.integers(1, 8))
def test_zigzag_gives_every_device_the_same_work(ring, chunk):
    order = zigzag(2 * ring * chunk, ring)
    assert sorted(order) == list(range(len(order)))
    # Under a causal mask token t attends to t + 1 tokens.
    work = (order + 1).reshape(ring, -1).sum(axis=1)
    assert len(set(work.tolist())) == 1


@pytest.mark.parametrize(("ulysses", "kinds"), [(1, {"collective-permute"}), (8, {"all-to-all", "all-gather"})])
def test_no_device_holds_a_whole_sequence_of_keys(ulysses, kinds):
    layout = Layout(make_mesh(data=1, sequence=8), strategy(ulysses=ulysses))
    shape = lambda heads: jax.ShapeDtypeStruct((1, 64, heads, E), jnp.float32)  # noqa: E731
    segment_ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def loss(q, k, v, segment_ids):
        return jnp.sum(layout.attend(packed_attention, q, k, v, segment_ids, causal=True, blocks=FusedBlockAttention))

    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.rows(("length",))),
        (shape(8), shape(8), shape(8), segment_ids),
    )
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*placed).compile().as_text()
    assert {c.kind for c in collectives(text)} == kinds
    # Of keys and values a device sees its own part and the one under way, or, with Ulysses, its own head.
    assert "f32[1,64,8,8]" not in text
