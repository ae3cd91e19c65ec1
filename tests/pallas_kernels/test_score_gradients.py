"""The gradients of attention's scores, kept: where they lie, which calls keep them, and the gradient of q from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice

from crescendo.pallas_kernels.attention.contract import Config, Operands
from crescendo.pallas_kernels.attention.hopper import tiling
from crescendo.pallas_kernels.attention.hopper.scores import Bounds, FromScores, ScoresTile, Store, compute, parts_for
from crescendo.pallas_kernels.attention.hopper.tiles import BackwardTile
from crescendo.pallas_kernels.conformance import HOMES
from crescendo.pallas_kernels.interpreter import interpreted
from crescendo.pallas_kernels.op import target

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def seen_blocks(store: Store) -> list[tuple[int, int, int]]:
    """Every head, tile of keys and block of 64 queries that is written."""
    return [
        (head, tile_k, block)
        for head in range(store.heads)
        for tile_k in range(store.tiles_k)
        for block in range(2 * store.tiles_q)
        if not store.causal or block // 2 >= tile_k
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_every_block_has_a_place_of_its_own_beside_the_other_of_its_tile(heads, tiles_q, tiles_k, causal):
    store = Store(heads, tiles_q, tiles_k, causal)
    places = {block: tuple(map(int, store.place(*block))) for block in seen_blocks(store)}
    assert len(set(places.values())) == len(places)
    assert all(0 <= row < store.shape[0] and 0 <= column < store.shape[1] for row, column in places.values())
    for (head, tile_k, block), (row, column) in places.items():
        if block % 2 == 0:
            assert places[head, tile_k, block + 1] == (row, column + 1)


def test_causal_scores_take_half_of_the_memory():
    whole, half = (Store(2, 64, 64, causal).size_bytes for causal in (False, True))
    assert whole == 2 * 2 * (64 * 128) ** 2
    assert half / whole == 65 / 128


def call(batch=4, length=4096, heads=16, kv_heads=16, width=128, **metadata) -> Operands:
    q, k = (jax.ShapeDtypeStruct((batch, length, n, width), jnp.bfloat16) for n in (heads, kv_heads))
    return Operands(q, k, k, **metadata)


KEYS_TILE = BackwardTile(block=64)


@pytest.mark.parametrize(
    ("config", "operands"),
    [
        (Config(1.0), call(width=64)),
        (Config(1.0), call(width=256)),
        (Config(1.0, causal=True, window=100), call()),
        (Config(1.0), call(q_segments=jnp.zeros(1), k_segments=jnp.zeros(1))),
        (Config(1.0, causal=True), call(length=2**16)),
        (Config(1.0, causal=True), call(length=2**15, heads=32, kv_heads=8)),
    ],
    ids=["narrow", "wide", "window", "segments", "long", "long and grouped"],
)
def test_calls_that_keep_nothing(config, operands):
    with target(H100):
        assert parts_for(config, operands, KEYS_TILE) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9000), st.integers(1, 8), st.integers(1, 4), st.booleans())
def test_parts_divide_a_call_and_bound_its_memory(batch, length, kv_heads, groups, causal):
    operands = call(batch, length, kv_heads * groups, kv_heads)
    with target(H100):
        parts = parts_for(Config(1.0, causal=causal), operands, KEYS_TILE)
    assert parts is not None
    assert parts.units * parts.count == batch * kv_heads
    assert parts.store.heads == parts.units * groups
    assert parts.store.size_bytes <= (Bounds.most_bytes if parts.units == 1 else Bounds.usual_bytes)


def test_parts_leave_few_cores_idle():
    with target(H100):
        parts = parts_for(Config(1.0, causal=True), call(kv_heads=8, heads=32), KEYS_TILE)
    # 128 pairs of tiles for 132 cores, four times; parts of 4 units would take eight rounds with half of the cores.
    assert (parts.units, parts.count) == (8, 4)


@pytest.mark.parametrize(
    ("causal", "tile"),
    [
        (True, ScoresTile(stages=2)),
        pytest.param(False, ScoresTile(blocks=1, persistent=False), marks=pytest.mark.slow),
    ],
    ids=["causal, in pairs on two cores", "full, a block for each tile"],
)
def test_the_gradient_of_q_interpreted(causal, tile):
    random = np.random.default_rng()
    length, keys, heads, width = 600, 300, 4, 64  # two of the four query heads are a part
    config = Config(0.3, causal=causal)
    paired = tiling.in_pairs(config, tile, length, tile.rows)
    rows = tile.rows * (2 if paired else 1)
    store = Store(2, -(-length // 128), -(-keys // 128), causal)

    def rounded(shape):
        return random.normal(size=shape).astype(jnp.bfloat16).astype(np.float64)

    dscores, k = rounded((2, length, keys)), rounded((keys, 2, width))
    if causal:
        dscores *= np.tri(length, keys)
    whole = np.zeros((2, 128 * store.tiles_q, 128 * store.tiles_k))
    whole[:, :length, :keys] = dscores
    scores = np.full(store.shape, np.nan)  # what nobody wrote must not be read
    for head, tile_k, block in seen_blocks(store):
        of_block = whole[head, 64 * block : 64 * (block + 1), 128 * tile_k : 128 * (tile_k + 1)]
        scores[*map(int, store.place(head, tile_k, block))] = of_block.T.reshape(2, 64, 64)
    padded = np.zeros((1, 512, 2, width))
    padded[0, :keys] = k

    @jax.jit
    def run(k, scores):
        q = jnp.zeros((1, -(-length // rows) * rows, heads, width), jnp.bfloat16)
        dq = jax.new_ref(q)
        kernel = FromScores(config, tile, Operands(q, k, k), (length, keys), paired, store)
        kernel.run(compute, kernel.reads(scores, jnp.array([2])), (), (dq,))
        return jax.freeze(dq)

    with interpreted(HOMES["mosaic_gpu"].stand_in):
        dq = np.asarray(run(*(jnp.asarray(array, jnp.bfloat16) for array in (padded, scores))), np.float64)
    expected = config.scale * np.einsum("hts,sd->thd", dscores, k[:, 1])  # the second key head's
    error = np.linalg.norm(dq[0, :length, 2:] - expected) / np.linalg.norm(expected)
    assert error < 1.2 * 2**-9  # the results are rounded: 1.7e-3
    assert not dq[0, :, :2].any()  # the other part's
