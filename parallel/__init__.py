"""Meshes, sharding rules, accumulation over microbatches, and the planner that splits a batch."""

from crescendo.parallel.accumulate import Accumulated, Deviations, accumulate, deviations
from crescendo.parallel.mesh import make_mesh
from crescendo.parallel.planner import BatchPlan, plan_batches
from crescendo.parallel.rules import STRATEGIES, batch_sharding, constrain, shard

__all__ = [
    "STRATEGIES",
    "Accumulated",
    "BatchPlan",
    "Deviations",
    "accumulate",
    "batch_sharding",
    "constrain",
    "deviations",
    "make_mesh",
    "plan_batches",
    "shard",
]
