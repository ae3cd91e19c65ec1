"""Optimizers, transforms and schedules for optax.

The tables map the name that a config uses to its function; the common tests find every optimizer, transform and
schedule in them. Schedules are called by their module (`schedules.linear`), since their names are too plain to stand
alone. `reported` reads what the states say of themselves, and `evaluation_params` what to evaluate.
"""

from collections.abc import Callable

import optax

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

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    function.__name__: function
    for function in (
        adamw,
        nadamw,
        lamb,
        lars,
        lion,
        sgd,
        adafactor,
        muon,
        schedule_free,
        prodigy,
        sophia,
        adagrad,
        adagrad_norm,
    )
}
"""Aliases `name(learning_rate, **options)`."""

TRANSFORMS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    function.__name__: function
    for function in (
        scale_by_learning_rate,
        scale_by_layer_trust_ratio,
        scale_by_lars,
        record_gradient_norms,
        scale_by_adagrad_norm,
        gradient_noise_scale,
    )
}
"""Pieces to chain."""

COMBINATORS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    function.__name__: function for function in (chain, average_weights)
}
"""What makes an optimizer of others."""

SCHEDULES: dict[str, Callable[..., optax.Schedule | OfRun]] = {
    function.__name__: function
    for function in (
        schedules.constant,
        schedules.linear,
        schedules.cosine,
        schedules.wsd,
        schedules.rex,
        schedules.power,
        schedules.infinite,
        schedules.rewarm,
        schedules.step,
        refined,
    )
}
"""Schedules `name(peak, total=None, *, warmup=0, **options)`; without a total they end with the run."""

__all__ = [
    "COMBINATORS",
    "OPTIMIZERS",
    "SCHEDULES",
    "TRANSFORMS",
    "BatchSizePolicy",
    "BatchStats",
    "GradientNorms",
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
