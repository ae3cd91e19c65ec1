"""Fingerprints of arrays, and which checkpoints stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments.runs.checkpoint import fingerprints
from crescendo.experiments.runs.keeping import FirstOfEach
from crescendo.parallel import Layout, make_mesh


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), st.integers(0, 3), st.integers(0, 31))
def test_any_flipped_bit_changes_the_fingerprint(values, at, bit):
    before = np.array(values, np.uint32)
    after = before.copy()
    after[at] ^= np.uint32(1 << bit)
    as_floats = lambda x: jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.float32)  # noqa: E731
    assert int(fingerprints(as_floats(before))) != int(fingerprints(as_floats(after)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_swapped_entries_change_it_and_the_layout_does_not(dtype):
    values = np.arange(16).reshape(8, 2).astype(bool if dtype == "bool" else np.int32)
    array = jnp.asarray(values).astype(dtype)
    swapped = jnp.asarray(values[::-1]).astype(dtype)
    sharded = jax.device_put(array, Layout(make_mesh()).rows(("length",)))
    assert int(fingerprints(array)) == int(fingerprints(sharded))
    assert int(fingerprints(array)) != int(fingerprints(swapped))


@given(st.lists(st.integers(0, 10_000), unique=True, max_size=30), st.integers(1, 3000))
def test_the_first_checkpoint_in_each_interval_stays(steps, interval):
    class Checkpoint:
        def __init__(self, step):
            self.step = step

    policy = FirstOfEach(lambda examples: 1 + examples // interval)
    kept = policy.should_preserve([Checkpoint(step) for step in sorted(steps)], context=None)
    firsts = {}
    for step in sorted(steps):
        firsts.setdefault(step // interval, step)
    assert [step for step, keep in zip(sorted(steps), kept, strict=True) if keep] == sorted(firsts.values())
