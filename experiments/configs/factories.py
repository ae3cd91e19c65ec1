"""What configs can name: models, optimizers, schedules, policies, tasks, sources, probes, meshes."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any, get_type_hints

import optax

import crescendo.optim as optim
from crescendo.experiments import data, tasks
from crescendo.experiments.trainer import probes
from crescendo.models import ModelConfig
from crescendo.models.config import PRESETS
from crescendo.models.resnet import ResNetConfig
from crescendo.models.vit import ViTConfig
from crescendo.optim import batch_size
from crescendo.optim.groups import group
from crescendo.parallel import make_mesh, strategy
from crescendo.ranges import OneOf


def model(preset: str = "debug", **changes: Any) -> ModelConfig:
    """`ModelConfig.preset(preset)` with the fields that are not None changed.

    Args:
      preset: a key of `crescendo.models.config.PRESETS`, such as "124m".
    """
    return ModelConfig.preset(preset, **{name: value for name, value in changes.items() if value is not None})


# Gin checks names against the signature, so the fields are spelled out there.
_fields = get_type_hints(ModelConfig, include_extras=True)
model.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            "preset",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default="debug",
            annotation=Annotated[str, OneOf(PRESETS)],
        )
    ]
    + [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_fields[f.name] | None)
        for f in dataclasses.fields(ModelConfig)
    ]
)
model.options_of = ModelConfig  # type: ignore[attr-defined]


def namesakes(room: ModuleType) -> dict[str, Callable]:
    """The functions that a room offers to configs: of each of its modules the one that has its name.

    >>> sorted(namesakes(probes))
    ['parameter_norms', 'samples']
    """
    names = [module.name for module in pkgutil.iter_modules(room.__path__)]
    modules = {name: importlib.import_module(f"{room.__name__}.{name}") for name in names}
    functions = {name: getattr(module, name, None) for name, module in modules.items()}
    return {name: function for name, function in functions.items() if inspect.isfunction(function)}


def optax_factories() -> dict[str, dict[str, Callable]]:
    """Every public function of optax and optax.contrib, by module."""
    return {
        module.__name__: {
            name: f for name, f in vars(module).items() if name[0] != "_" and inspect.isfunction(f) and _is_optax(f)
        }
        for module in (optax, optax.contrib)
    }


def _is_optax(function: Callable) -> bool:
    return function.__module__.partition(".")[0] == "optax"


# What configs can name, by the module that qualifies a name used twice (schedules.constant, batch_size.constant).
FACTORIES: dict[str, dict[str, Callable]] = {
    "optim": optim.OPTIMIZERS | optim.TRANSFORMS | optim.COMBINATORS,
    "optim.schedules": optim.SCHEDULES,
    "optim.groups": {"group": group},
    "optim.batch_size": {n: f for n, f in optim.POLICIES.items() if f.__module__ == batch_size.__name__},
    "optim.policies": {n: f for n, f in optim.POLICIES.items() if f.__module__ != batch_size.__name__},
    "optim.guards": optim.GUARDS,
    "models": {"model": model, "resnet": ResNetConfig, "vit": ViTConfig},
    "tasks": namesakes(tasks),
    "probes": namesakes(probes),
    "parallel": {"mesh": make_mesh, "strategy": strategy},
    "data": namesakes(data),
}
