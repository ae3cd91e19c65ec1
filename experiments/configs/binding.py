"""Gin: how a command's configs are read, bound to an experiment, and written back."""

import argparse
import contextlib
import copy
import functools
import inspect
import io
import itertools
import tokenize
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib import resources
from typing import Any

import gin
from gin import config_parser

from crescendo.experiments.configs import checks, own_modules, references
from crescendo.experiments.configs.explain import explained, quoted
from crescendo.experiments.configs.references import MACRO, Binding
from crescendo.experiments.configs.registration import register, register_factories
from crescendo.experiments.runtime import arguments as checked_arguments
from crescendo.experiments.runtime.command import plain_parser
from crescendo.experiments.runtime.encoding import check_typed, decoded, read_text
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import local_path
from crescendo.experiments.runtime.from_python import check_repeatable
from crescendo.experiments.runtime.interruption import Interrupted

CONFIGS = resources.files("crescendo.experiments.configs")
# Where a binding comes from, other than a file.
TYPED, OWN = "--set", "the command"
# Parameters of an experiment that are no settings: `bind` gives them.
GIVEN = ("operative_config", "differences", "written")
# The files that gin's `include` names are found and decoded as those of `--config` are.
gin.config._FILE_READERS[:] = [(lambda path: io.StringIO(_read(path, "include")), lambda path: True)]


def parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """An argument parser with `--module`, `--config` and `--set`."""
    result = plain_parser(description, epilog)
    own_modules.add_option(result)
    result.add_argument(
        "--config",
        action="append",
        metavar="FILE.gin",
        help=f"a gin file, or one that ships with Crescendo ({', '.join(shipped())}); may be repeated",
    )
    result.add_argument(
        "--set", action="append", default=[], metavar="'NAME = VALUE'", help="one gin binding; may be repeated"
    )
    return result


def shipped() -> list[str]:
    """The names of the configs in the package."""
    return sorted(entry.name for entry in CONFIGS.iterdir() if entry.name.endswith(".gin"))


def bind(
    experiment: Callable, configs: Sequence[str], bindings: Sequence[str] = (), *, own: Sequence[str] = ()
) -> Callable:
    """`experiment` with the parameters that the configs bind; later files and bindings win.

    Args:
      experiment: a function with annotated parameters; configs name it by its own name. Where it has parameters
        `operative_config`, `differences` and `written`, it is given the functions of these names, the last of a
        parameter's name.
      configs: paths of gin files, or names of shipped ones. What they bind and nothing uses is warned of in a line when
        the experiment is called.
      bindings: gin statements that a person typed, such as `"train.total_examples = 100"`.
      own: those of the command itself, read before.

    Raises:
      UserError: for a file that isn't there, a syntax error, an unknown name (with the nearest known ones), one of the
        bindings that nothing uses, or, when the result is called, a value of the wrong type.
    """
    origins = _load(experiment, configs, bindings, own)
    wrapped, reached = register(experiment), references.follow(_name(experiment))
    checks.check_all(_name(experiment), reached)
    idle = [binding for binding in origins if binding not in reached.used]
    for binding in idle:
        if origins[binding] == TYPED:
            raise UserError(f"{TYPED}: {references.why_unused(binding, reached)}")
    parameters = inspect.signature(experiment).parameters
    own_values = {
        "operative_config": operative_config,
        "differences": differences,
        "written": functools.partial(references.written, _name(experiment)),
    }
    own_values = {name: value for name, value in own_values.items() if name in parameters}

    @functools.wraps(experiment)
    def call(**kwargs):
        for binding in reached.used:
            if origins.get(binding) == TYPED and binding.selector == _name(experiment) and binding.parameter in kwargs:
                raise UserError(f"{TYPED}: {binding} is set by the command itself: leave it out, or see --help")
        references.warn_of({binding: origins[binding] for binding in idle if origins[binding] not in (OWN, TYPED)})
        with _own_errors():
            return wrapped(**(own_values | kwargs))

    return call


def unused(
    experiment: Callable, configs: Sequence[str], bindings: Sequence[str], own: Sequence[str] = ()
) -> dict[str, str]:
    """The statements of a person and of the command that nothing uses; for each, why.

    Where one of several runs may use what another doesn't.

    Raises:
      UserError: as `bind`, and for a statement that binds something used and something that isn't.

    >>> def descend(*, rate: float): ...
    >>> unused(descend, [], ["RTE = 0.1", "descend.rate = %RATE"], own=["RATE = 0.5"])
    {'RTE = 0.1': 'nothing reads the macro RTE; nearest: RATE'}
    """
    _load(experiment, configs, bindings, own)
    reached, result = references.follow(_name(experiment)), {}
    for statement in (*bindings, *own):
        keys = references.keys(statement)
        if idle := [binding for binding in keys if binding not in reached.used]:
            why = references.why_unused(idle[0], reached)
            if len(idle) < len(keys):
                raise UserError(f"{TYPED}: {why}; give every binding a {TYPED} of its own")
            result[statement] = why
    return result


def resolved(experiment: Callable) -> str:
    """The settings of all that a call of the experiment leads to after the latest `bind`, defaults included.

    >>> def boil(*, egg: str, minutes: int = 6): ...
    >>> _ = bind(boil, [], ["EGG = 'small'", "boil.egg = %EGG"])
    >>> print(resolved(boil))
    boil.egg = 'small'
    boil.minutes = 6
    """
    return references.resolved(_name(experiment), without=["run", *GIVEN])


def given(name: str) -> dict[str, Any]:
    """What the latest `bind` gives a function's parameters, outside of scopes.

    >>> def brew(*, water: int = 1): ...
    >>> _ = bind(brew, [], own=["mesh.fsdp = 2"])
    >>> given("mesh")
    {'fsdp': 2}
    """
    return gin.get_bindings(name)


def _load(
    experiment: Callable, configs: Sequence[str], bindings: Sequence[str], own: Sequence[str]
) -> dict[Binding, str]:
    """Reads all of it anew; where each binding comes from: a config's name, `OWN` or `TYPED`."""
    gin.clear_config()  # also unlocks it
    register_factories()
    register(experiment)
    for module in own_modules.LOADED:
        _parse(f"import {module}", "--module")
    origins: dict[Binding, str] = {}
    read = [(config, _read(config, "--config")) for config in configs]
    for origin, text in [*read, *((OWN, each) for each in own), *((TYPED, each) for each in bindings)]:
        before = references.bound()
        _parse(text, origin)
        # What a file includes is the file's.
        included = [binding for binding in references.bound() if binding not in before]
        origins |= dict.fromkeys([*included, *references.keys(text)], origin)
    try:
        gin.finalize()
    except ValueError as error:
        raise UserError(explained(_one_line(error))) from None
    return origins


def _name(experiment: Callable) -> str:
    return f"experiments.{experiment.__name__}"


def arguments(experiment: Callable, names: Collection[str] | None = None) -> dict[str, Any]:
    """What the configs of the latest `bind` give the experiment's parameters: factories called, defaults filled in.

    Args:
      experiment: as it was bound.
      names: of the parameters; the factories of others aren't called. None: all.

    Raises:
      UserError: what a factory says of its arguments; no value for one of `names`.

    >>> def tune(*, rate: float, steps: int = 10): ...
    >>> _ = bind(tune, [], ["tune.rate = 0.5"])
    >>> arguments(tune), arguments(tune, ["rate"])
    ({'steps': 10, 'rate': 0.5}, {'rate': 0.5})
    """
    bound = gin.get_bindings(register(experiment), resolve_references=False)
    parameters = inspect.signature(experiment).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty} | bound
    if missing := [name for name in names or () if name not in given]:
        raise UserError(f"{experiment.__name__}.{missing[0]} is not set: set it in a config or with --set")
    with _own_errors():  # gin calls a factory when its reference is copied
        made = copy.deepcopy({name: value for name, value in given.items() if names is None or name in names})
    of_bound = {name: value for name, value in made.items() if name in bound}
    checked_arguments.fit(of_bound, inspect.signature(experiment).parameters, experiment.__name__)
    return made | of_bound


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Gin raises a look-alike that says where in the config a call stood; the first line is ours."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).splitlines()[0]) from None
    except Interrupted as stop:
        raise Interrupted(str(stop).splitlines()[0], stop.reason) from None


def operative_config() -> str:
    """The bindings in force for what was called so far, defaults included, as gin text that repeats the run."""
    return gin.operative_config_str(max_line_length=120)


def names_bound(statements: str) -> list[str]:
    """What gin statements bind: `NAME.PARAMETER` as it is written, without its scope, and macros by name.

    What isn't gin binds nothing; `bind` complains of it.

    >>> names_bound("peak/schedules.linear.total = 1\\nLEARNING_RATE = @rate()")
    ['schedules.linear.total', 'LEARNING_RATE']
    """
    names = []
    for scope, selector, parameter in references.bound_names(statements):
        of_macro = selector in ("macro", MACRO) and parameter == "value"
        names.append(scope if of_macro else f"{selector}.{parameter}" if parameter else selector)
    return names


class _Text(str):
    """A reference or a macro as gin writes it: shown without quotes."""

    __repr__ = str.__str__


class _Macro(_Text):
    pass


class _Values(config_parser.ParserDelegate):
    """For reading what is bound to what: nothing is called."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Text:
        scope, slash, selector = scoped_configurable_name.rpartition("/")
        return _Text(f"@{scope}{slash}{references.complete(selector)}{'()' if evaluate else ''}")

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)


def differences(operative: str, *, but_for: Collection[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """The settings of an earlier run to which the latest `bind` gives other values: `(before, now)`, text by name.

    However they are written: a macro is its value, a default that is written out is one that is left out. What the
    earlier run never called doesn't count.

    Args:
      operative: what `operative_config` gave in the earlier run.
      but_for: settings that may differ.

    >>> def warm(*, rate: float, steps: int = 10): ...
    >>> _ = bind(warm, [], ["RATE = 0.5", "warm.rate = %RATE"])
    >>> differences("warm.rate = 0.5\\nwarm.steps = 10")
    ({}, {})
    >>> differences("warm.rate = 0.25\\nwarm.steps = 20", but_for=["warm.rate"])
    ({'warm.steps': '20'}, {'warm.steps': '10'})
    """
    earlier, bound = _settings(operative), _settings(gin.config_str())
    before, now = {}, {}
    for (scope, selector), old in earlier.items():
        known = gin.config._REGISTRY.get_match(selector)
        parameters = inspect.signature(known.wrapped).parameters.values() if known else ()
        defaults = {p.name: _as_text(p.default) for p in parameters if p.default is not p.empty}
        # The text has all defaults but those that are functions.
        old = {name: value for name, value in defaults.items() if isinstance(value, _Text)} | old
        defaults = {name: value for name, value in defaults.items() if name in old}
        outer = ["", *itertools.accumulate(scope.split("/"), "{}/{}".format)] if scope else [""]
        new = functools.reduce(dict.__or__, (bound.get((each, selector), {}) for each in outer), defaults)
        shown = f"{scope}{'/' if scope else ''}{gin.config._REGISTRY.minimal_selector(selector) if known else selector}"
        for parameter in dict.fromkeys([*old, *new]):
            name, pair = f"{shown}.{parameter}", [values.get(parameter, _Text("not set")) for values in (old, new)]
            if pair[0] != pair[1] and name not in but_for:
                before[name], now[name] = map(repr, pair)
    return before, now


def _as_text(default: Any) -> Any:
    """A default; a function as the reference that gives it."""
    return _Text(f"@{references.complete(default.__name__)}") if inspect.isfunction(default) else default


def _settings(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What gin text binds, by scope and complete name: the parameters' values, without macros."""
    settings: dict[tuple[str, str], dict[str, Any]] = {}
    macros: dict[str, Any] = {}
    for statement in config_parser.ConfigParser(text, _Values()):
        if not isinstance(statement, config_parser.BindingStatement):
            continue
        if statement.arg_name:
            key = statement.scope, references.complete(statement.selector)
            settings.setdefault(key, {})[statement.arg_name] = statement.value
        else:
            macros[statement.selector] = statement.value

    def resolved(value: Any) -> Any:
        match value:
            case _Macro():
                return resolved(macros[value]) if value in macros else value
            case list() | tuple():
                return type(value)(map(resolved, value))
            case dict():
                return {key: resolved(item) for key, item in value.items()}
        return value

    return {key: resolved(values) for key, values in settings.items()}


def _read(config: str, said: str) -> str:
    path = local_path(config)
    if path.is_file():
        text = read_text(path)
        check_repeatable(text, f"{said} {config}")
        return text
    if (path / "config.gin").is_file():
        raise UserError(f"{said} {config} is a folder: write {path / 'config.gin'}")
    if (CONFIGS / path.name).is_file() and path.name == config.removesuffix(".gin") + ".gin":
        return decoded((CONFIGS / path.name).read_bytes(), config)
    raise UserError(f"{said} {config}: no such file; Crescendo ships {', '.join(shipped())}")


def _parse(text: str, origin: str) -> None:
    text = check_typed(text, origin)
    try:
        gin.parse_config(text)
    except (SyntaxError, tokenize.TokenError) as error:
        with_quotes = quoted(text)
        if with_quotes is not None and references.is_gin(with_quotes):
            instead = f"--set '{with_quotes}'" if origin == TYPED else with_quotes
            raise UserError(f"{origin}: {text.strip()} isn't gin: write {instead}") from None
        raise UserError(f"{origin}: not gin: {explained(_one_line(error))}; write NAME.PARAMETER = VALUE") from None
    except RecursionError:
        raise UserError(f"{origin}: it includes itself, or nests more deeply than can be read") from None
    except (ValueError, TypeError, KeyError, OSError, ImportError, UserError) as error:
        raise UserError(f"{origin}: {explained(_one_line(error))}") from None


def _one_line(error: Exception) -> str:
    told = error.args[0] if isinstance(error, tokenize.TokenError) else error  # whose text is a tuple's
    return str(told).strip().splitlines()[0]
