"""Meshes and the rules that place arrays on them."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from crescendo.models import ModelConfig, logical_axes
from crescendo.models import axes as names
from crescendo.parallel import STRATEGIES, batch_sharding, make_mesh, shard


def test_minus_one_takes_the_rest():
    assert dict(make_mesh(data=-1, fsdp=2).shape) == {"data": 4, "fsdp": 2}
    assert dict(make_mesh(data=1, fsdp=-1).shape) == {"data": 1, "fsdp": 8}


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (-1, -1), (0, 8), (4, 4)])
def test_a_mesh_that_does_not_cover_the_devices_is_refused(data, fsdp):
    with pytest.raises(ValueError, match=f"data = {data}, fsdp = {fsdp}"):
        make_mesh(data=data, fsdp=fsdp)


def test_rules_name_logical_axes_that_exist():
    for table in STRATEGIES.values():
        assert set(table) <= set(names.ALL)
    used = jax.tree.leaves(logical_axes(ModelConfig.preset("debug").for_platform("cpu")))
    assert set(used) <= set(names.ALL)
    assert len(names.ALL) <= 15


def test_fsdp_splits_every_matrix_and_data_splits_none():
    mesh = make_mesh(data=2, fsdp=4)
    axes = logical_axes(ModelConfig.preset("debug").for_platform("cpu"))
    for spec in (s.spec for s in jax.tree.leaves(shard(axes["blocks"]["mlp"], mesh, "fsdp"))):
        assert "fsdp" in spec
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shard(axes, mesh, "data")))
    with pytest.raises(ValueError, match="no sharding strategy 'zero'"):
        shard(axes, mesh, "zero")


def test_a_batch_is_split_over_all_devices():
    mesh = make_mesh(data=2, fsdp=4)
    sharding = batch_sharding(mesh, leading=1)
    assert sharding.spec == PartitionSpec(None, ("data", "fsdp"))
    array = jax.device_put(np.zeros((3, 8, 5)), sharding)
    assert {shard.data.shape for shard in array.addressable_shards} == {(3, 1, 5)}
