"""The planner: every batch size is made of whole microbatches that the devices can divide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crescendo.parallel import plan_batches


@given(
    factors=st.lists(st.integers(1, 64), min_size=1, max_size=5),
    shards=st.integers(1, 16),
    bound=st.none() | st.integers(1, 500),
)
def test_every_size_is_whole_microbatches(factors, shards, bound):
    sizes = [factor * shards for factor in factors]
    plan = plan_batches(sizes, shards, bound)
    assert plan.microbatch_examples % shards == 0
    assert plan.max_microbatches * plan.microbatch_examples == max(sizes)
    for size in sizes:
        assert plan.microbatches(size) * plan.microbatch_examples == size
    if bound is not None:
        assert plan.microbatch_examples <= max(bound, shards)


def test_no_larger_microbatch_would_do():
    sizes, shards, bound = [12, 24, 60], 2, 7
    plan = plan_batches(sizes, shards, bound)
    larger = range(plan.microbatch_examples + 1, bound + 1)
    assert not any(all(size % m == 0 for size in sizes) and m % shards == 0 for m in larger)


@given(
    factors=st.lists(st.integers(1, 64), min_size=1, max_size=5),
    shards=st.integers(1, 16),
    least=st.integers(1, 8),
    bound=st.none() | st.integers(1, 500),
)
def test_every_size_is_cut_into_as_many_microbatches_as_asked_for(factors, shards, least, bound):
    sizes = [factor * shards for factor in factors]
    if min(factors) < least:
        over = f" over {shards} devices" if shards > 1 else ""
        with pytest.raises(ValueError, match=rf"\d{over} can't be cut into {least} microbatches") as error:
            plan_batches(sizes, shards, bound, min_microbatches=least)
        *_, below, _, above = str(error.value).split()
        assert all(plan_batches([int(n)], shards, bound, min_microbatches=least) for n in (below, above))
        return
    plan = plan_batches(sizes, shards, bound, min_microbatches=least)
    assert min(map(plan.microbatches, sizes)) >= least
    assert plan.microbatch_examples % shards == 0
    assert all(plan.microbatches(size) * plan.microbatch_examples == size for size in sizes)
    free = plan_batches(sizes, shards, bound)
    assert plan.microbatch_examples <= free.microbatch_examples
    if min(map(free.microbatches, sizes)) >= least:
        assert plan == free


@pytest.mark.parametrize(("sizes", "message"), [([0], "batch_size = 0"), ([-4], "batch_size = -4")])
def test_sizes_below_one_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        plan_batches(sizes, 1)


def test_a_size_that_the_devices_cannot_divide_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="batch_size = 12 does not divide over 8 devices: use 8 or 16"):
        plan_batches([12], 8)
