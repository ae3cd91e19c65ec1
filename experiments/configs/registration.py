"""What configs can name, in gin's table: each with its arguments checked against their annotations."""

import functools
import inspect
from collections.abc import Callable

import gin
from gin import config_parser, selector_map

from crescendo.experiments.configs import own_modules
from crescendo.experiments.configs.factories import FACTORIES, optax_factories
from crescendo.experiments.runtime import arguments
from crescendo.experiments.runtime.errors import UserError, user_values


def checked(factory: Callable, called: str | None = None) -> Callable:
    """`factory`, its arguments checked against their annotations: a mistake in a config is a `UserError`."""
    signature, called = own_modules.signature(factory), called or factory.__name__

    @functools.wraps(factory)
    def call(*args, **kwargs):
        bound = _all_given(signature, called, args, kwargs)
        arguments.fit(bound.arguments, signature.parameters, called)
        return factory(*bound.args, **bound.kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _all_given(signature: inspect.Signature, called: str, args: tuple, kwargs: dict) -> inspect.BoundArguments:
    """The arguments, bound.

    Raises:
      UserError: names all that are missing, or the first that is too much.
    """
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise UserError(f"{called}: {error}") from None
    some = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        f"{called}.{name}"
        for name, p in signature.parameters.items()
        if p.default is p.empty and p.kind not in some and name not in bound.arguments
    ]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"{', '.join(missing)} {are} not set: set {'it' if are == 'is' else 'them'} in a config or with --set"
        )
    return bound


def _of_a_library(factory: Callable, called: str) -> Callable:
    """`factory`, whose missing arguments and complaints are a `UserError`; its annotations are its own."""
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def call(*args, **kwargs):
        _all_given(signature, called, args, kwargs)
        try:
            return factory(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # a library's own words for values that a person gave
            first = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"{called}: {first or type(error).__name__}") from None

    return call


class _OursFirst(selector_map.SelectorMap):
    """Gin's table of names, in which a name of optax's must be written out where Crescendo has it too."""

    def matching_selectors(self, partial_selector: str) -> list[str]:
        """Every complete name that ends with the partial one; optax's only where there is no other."""
        matches = super().matching_selectors(partial_selector)
        return [name for name in matches if not name.startswith("optax.")] or matches


@functools.cache
def register_factories() -> None:
    """Enters every factory that ships with Crescendo, and optax's."""
    ours_first = _OursFirst()
    for name, value in gin.config._REGISTRY.items():
        ours_first[name] = value
    gin.config._REGISTRY = ours_first
    for module, factories in FACTORIES.items():
        for name, factory in factories.items():
            gin.external_configurable(checked(user_values()(factory), name), name=name, module=module)
    for module, factories in optax_factories().items():
        for name, factory in factories.items():
            gin.external_configurable(_of_a_library(factory, f"{module}.{name}"), name=name, module=module)


def _process_import(context: gin.config.ParseContext, statement: config_parser.ImportStatement) -> None:
    """`import NAME` in a config: what the module defines can then be named, under the module's name."""
    own_modules.check_import(statement.module)
    if not statement.module.startswith("__gin__."):
        module = own_modules.imported(statement.module, f"import {statement.module}")
        offered = own_modules.offered(module)
        for name, factory in offered.items():
            if f"{statement.module}.{name}" not in gin.config._REGISTRY:
                gin.external_configurable(checked(user_values()(factory), name), name=name, module=statement.module)
        FACTORIES[statement.module] = offered
    _gin_process_import(context, statement)


_gin_process_import = gin.config.ParseContext.process_import
gin.config.ParseContext.process_import = _process_import


@functools.cache
def register(experiment: Callable) -> Callable:
    """The experiment, as configs name it: by its own name."""
    return gin.external_configurable(checked(experiment), name=experiment.__name__, module="experiments")
