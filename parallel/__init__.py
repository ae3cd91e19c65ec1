"""Meshes, sharding rules, accumulation over microbatches, and the planner that splits a batch."""

from crescendo.parallel.accumulate import Accumulated, Deviations, Spread, accumulate, deviations
from crescendo.parallel.layout import Layout
from crescendo.parallel.mesh import MeshSpec, make_mesh
from crescendo.parallel.planner import BatchPlan, plan_batches
from crescendo.parallel.rules import STRATEGIES, Strategy, strategy

__all__ = [
    "STRATEGIES",
    "Accumulated",
    "BatchPlan",
    "Deviations",
    "Layout",
    "MeshSpec",
    "Spread",
    "Strategy",
    "accumulate",
    "deviations",
    "make_mesh",
    "plan_batches",
    "strategy",
]
