"""Meshes, sharding rules, accumulation over microbatches, and the planner that splits a batch."""

from crescendo.parallel.accumulate import Accumulated, accumulate
from crescendo.parallel.mesh import make_mesh
from crescendo.parallel.planner import BatchPlan, plan_batches
from crescendo.parallel.rules import STRATEGIES, batch_sharding, shard

__all__ = [
    "STRATEGIES",
    "Accumulated",
    "BatchPlan",
    "accumulate",
    "batch_sharding",
    "make_mesh",
    "plan_batches",
    "shard",
]
