"""Optimizers, transforms, schedules and batch-size policies for optax.

The tables of `registry` map the name that a config uses to its function; the common tests take every optimizer,
transform and schedule from them. What is registered is an attribute of this package, but for schedules: they are called
by their module (`schedules.linear`), since their names are too plain to stand alone. `reported` reads what the states
say of themselves, and `evaluation_params` what to evaluate.
"""

import importlib
import pkgutil

from crescendo.optim import schedules
from crescendo.optim.adafactor import adafactor
from crescendo.optim.adagrad import adagrad, adagrad_norm, scale_by_adagrad_norm
from crescendo.optim.adamw import adamw, nadamw
from crescendo.optim.averaging import average_weights, evaluation_params, has_evaluation_params
from crescendo.optim.batch_size import (
    BatchSizePolicy,
    BatchStats,
    adaptive_batch_size,
    current_batch_size,
    staged,
)
from crescendo.optim.combinators import chain
from crescendo.optim.groups import ParameterGroup, assign, frozen_mask, group, scale_groups
from crescendo.optim.guard import Guard, guard, guarded, passed
from crescendo.optim.lamb import lamb
from crescendo.optim.lars import lars, scale_by_lars
from crescendo.optim.lion import lion
from crescendo.optim.muon import muon
from crescendo.optim.noise_scale import NoiseScale, gradient_noise_scale, group_noise_scales, noise_scale
from crescendo.optim.policies import critical_batch_following, geometric_warmup, noise_scale_following, norm_test
from crescendo.optim.precision import in_float32
from crescendo.optim.prodigy import prodigy
from crescendo.optim.recipes import bert_76_minutes, bert_recipe, step_law
from crescendo.optim.refinement import (
    GradientNorms,
    record_gradient_norms,
    recorded_norms,
    refine,
    refined,
    refined_schedule,
    save_refined,
)
from crescendo.optim.registry import COMBINATORS, GUARDS, OPTIMIZERS, POLICIES, SCHEDULES, TRANSFORMS
from crescendo.optim.run_length import LengthError, LengthWarning, OfRun
from crescendo.optim.scaling import (
    learning_rate_factor,
    scale_by_learning_rate,
    with_learning_rate,
)
from crescendo.optim.schedule_free import schedule_free
from crescendo.optim.sgd import sgd
from crescendo.optim.sophia import sophia
from crescendo.optim.states import reported
from crescendo.optim.trust_ratio import scale_by_layer_trust_ratio, trust_ratios

# A new file needs no line here: what it defines it registers. The plot is a command, which reads the tables.
for _module in pkgutil.iter_modules(__path__):
    if _module.name != "plot":
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "COMBINATORS",
    "GUARDS",
    "OPTIMIZERS",
    "POLICIES",
    "SCHEDULES",
    "TRANSFORMS",
    "BatchSizePolicy",
    "BatchStats",
    "GradientNorms",
    "Guard",
    "LengthError",
    "LengthWarning",
    "NoiseScale",
    "OfRun",
    "ParameterGroup",
    "adafactor",
    "adagrad",
    "adagrad_norm",
    "adamw",
    "adaptive_batch_size",
    "assign",
    "average_weights",
    "bert_76_minutes",
    "bert_recipe",
    "chain",
    "critical_batch_following",
    "current_batch_size",
    "evaluation_params",
    "frozen_mask",
    "geometric_warmup",
    "gradient_noise_scale",
    "group",
    "group_noise_scales",
    "guard",
    "guarded",
    "has_evaluation_params",
    "in_float32",
    "lamb",
    "lars",
    "learning_rate_factor",
    "lion",
    "muon",
    "nadamw",
    "noise_scale",
    "noise_scale_following",
    "norm_test",
    "passed",
    "prodigy",
    "record_gradient_norms",
    "recorded_norms",
    "refine",
    "refined",
    "refined_schedule",
    "reported",
    "save_refined",
    "scale_by_adagrad_norm",
    "scale_by_lars",
    "scale_by_layer_trust_ratio",
    "scale_by_learning_rate",
    "scale_groups",
    "schedule_free",
    "schedules",
    "sgd",
    "sophia",
    "staged",
    "step_law",
    "trust_ratios",
    "with_learning_rate",
]

# Attributes of all that is registered, also where no import above says so to type checkers. `constant` is a schedule's
# name and a policy's: both are called by their modules.
_registered = OPTIMIZERS | TRANSFORMS | COMBINATORS | GUARDS
_registered |= {n: f for n, f in POLICIES.items() if n not in SCHEDULES}
globals().update(_registered)
__all__ += sorted(_registered.keys() - set(__all__))
