"""Few queries over many keys: who takes which keys, and what becomes of the parts."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice

from crescendo.pallas_kernels import conformance
from crescendo.pallas_kernels.attention import attention
from crescendo.pallas_kernels.attention.contract import Config, Operands, positions, visible
from crescendo.pallas_kernels.attention.hopper import split_keys
from crescendo.pallas_kernels.attention.hopper.tiling import Arrays
from crescendo.pallas_kernels.attention.merging import merge
from crescendo.pallas_kernels.attention.specs import SPECS, tail
from crescendo.pallas_kernels.conformance import Case
from crescendo.pallas_kernels.interpreter import interpreted
from crescendo.pallas_kernels.op import explain, target

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.mark.slow
def test_parts_make_the_whole(quick_compilation):
    """Any sets of keys, some that a query sees nothing of and a query that sees nothing, with gradients."""
    random = np.random.default_rng()
    draw = lambda *shape: jnp.float32(random.normal(size=shape))  # noqa: E731
    q, k, v = draw(2, 3, 4, 8), draw(2, 30, 2, 8), draw(2, 30, 2, 8)
    ids = jnp.array([[1, 2, 3], [1, 1, 2]]), jnp.asarray(random.integers(1, 3, (2, 30))).at[0, :10].set(1)
    call = functools.partial(attention, return_lse=True, implementation="xla")
    ends = [0, 10, 11, 30]  # of row 0 the second query sees nothing in the first set, and the third sees nothing

    def parts(q, k, v):
        results = [
            call(q, k[:, a:b], v[:, a:b], segment_ids=(ids[0], ids[1][:, a:b])) for a, b in itertools.pairwise(ends)
        ]
        outs, lses = (jnp.stack(each) for each in zip(*results, strict=True))
        out, lse = merge(outs, lses.swapaxes(2, 3))
        return out, lse.swapaxes(1, 2)

    found, pull = jax.vjp(parts, q, k, v)
    wanted, wanted_pull = jax.vjp(functools.partial(call, segment_ids=ids), q, k, v)
    cotangents = draw(2, 3, 4, 8), jnp.where(jnp.isfinite(wanted[1]), draw(2, 3, 4), 0)
    assert not np.isfinite(wanted[1][0, 2]).any()
    for a, b in zip((*found, *pull(cotangents)), (*wanted, *wanted_pull(cotangents)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)  # rounding of float32 sums of about 1


@given(units=st.integers(1, 300), blocks=st.integers(2500, 5000))
def test_processors_have_nearly_the_same_work(units, blocks):
    parts = split_keys.parts_for(units, blocks, 132)
    most = -(-units * parts // 132) * -(-blocks // parts)  # rounds, of parts of whole blocks
    assert 132 * most <= 1.1 * units * blocks


@settings(deadline=None, max_examples=4)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 40),
    keys=st.integers(1, 1500),
    groups=st.sampled_from([1, 3, 4]),
    causal=st.booleans(),
    begun=st.sampled_from(["", "by arrays", "by a number"]),
)
def test_every_block_that_is_seen_is_taken_once(batch, length, keys, groups, causal, begun):
    """Of every tile the parts are runs one after the other, and they leave at places of their own."""
    q, k = jnp.zeros((batch, length, 2 * groups, 8), jnp.bfloat16), jnp.zeros((batch, keys, 2, 8), jnp.bfloat16)
    config = Config(1.0, causal=causal)
    operands = Operands(q, k, k)
    if causal and begun == "by a number":
        operands = operands._replace(begin=jnp.array([keys // 3]))
    elif causal and begun and length <= keys:
        q_positions, k_positions = (jnp.asarray(side) for side in tail(batch, length, keys))
        operands = operands._replace(q_positions=q_positions // 2, k_positions=k_positions)
    with target(H100):
        call = split_keys.call_of(config, operands, split_keys.default_tile(operands))
        ranges = call.ranges(operands)
        arrays = Arrays(*operands[:3], ranges=ranges, begin=operands.begin)
        taken = collections.defaultdict(list)
        places = [
            call.place(arrays, jnp.int32(block), jnp.int32(n))
            for block in range(call.schedule.blocks)
            for n in range(int(call.schedule.count(block)))
        ]
        for at in places:
            lo, full_lo, full_hi, hi = (int(x) for x in at.blocks)
            assert lo <= full_lo <= full_hi <= hi
            whole = call.needed(arrays, at.row, at.tile)
            inside = max(full_lo, int(whole.full_lo)), min(full_hi, int(whole.full_hi))
            assert inside == (full_lo, full_hi) or full_lo == full_hi
            taken[int(at.row), int(at.head), int(at.tile)].append((int(at.part), lo, hi))
    # The blocks that a tile needs are those that hold a key which one of its queries sees.
    seen = visible(config, None, None, *positions(operands))
    for row, _, tile in taken if seen is not None else ():
        queries = slice(tile * call.queries, (tile + 1) * call.queries)
        blocks = np.flatnonzero(np.asarray(seen[row % len(seen), queries].any(0))) // call.tile.block
        needed = call.needed(arrays, row, tile)
        assert set(blocks) <= set(range(int(needed.lo), int(needed.hi)))
        assert not len(blocks) or begun == "by arrays" or (blocks[0], blocks[-1] + 1) == (needed.lo, needed.hi)
    assert len(taken) == batch * 2 * call.tiles
    assert len({(int(call.leaves_at(at)), int(at.head), int(at.tile)) for at in places}) == len(places)
    for (row, _, tile), parts in taken.items():
        whole = call.needed(arrays, row, tile)
        ends = [int(whole.lo), *(hi for _, _, hi in sorted(parts))]
        assert [lo for _, lo, _ in sorted(parts)] == ends[:-1]
        assert ends[-1] == max(int(whole.hi), int(whole.lo))
        sizes = np.diff(ends)
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.slow
def test_parts_are_right_and_free_of_races():
    """Conformance has too few processors for more than a part or two."""
    assert split_keys.parts_for(units=4, blocks=3, cores=8) == 2
    with interpreted(AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=8, platform="gpu")):
        conformance.check(Case(attention, "split_keys", BY_NAME["few-queries"]), "float16")


def test_who_is_asked():
    arrays, kwargs = BY_NAME["decode-16"].abstract()
    with target(H100):
        assert explain(attention, *arrays, **kwargs).chosen == "split_keys"
        answers = explain(attention, *BY_NAME["llama"].abstract()[0], causal=True)
        assert answers.chosen == "mosaic_gpu"
        assert "at most 64 queries and at least 1024 keys, not 4096 and 4096" in answers.answers[0].reason
        wide = (
            jax.ShapeDtypeStruct((1, 1, 129, 64), jnp.bfloat16),
            *[jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.bfloat16)] * 2,
        )
        with pytest.raises(NotImplementedError, match="needs at most 128 query heads for a key head, not 129"):
            attention(*wide, implementation="split_keys")
