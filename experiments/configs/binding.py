"""Gin: how a command's configs are read, bound to an experiment, and written back. The only import of gin."""

import argparse
import contextlib
import copy
import difflib
import functools
import inspect
import io
import itertools
import os.path
import re
import tokenize
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gin
import typeguard
from gin import config_parser, selector_map

from crescendo.experiments.configs.factories import FACTORIES, optax_factories
from crescendo.experiments.runtime.command import plain_parser
from crescendo.experiments.runtime.encoding import check_typed, decoded, read_text
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.runtime.interruption import Interrupted

CONFIGS = resources.files("crescendo.experiments.configs")
# The files that gin's `include` names are decoded as the others are.
gin.config._FILE_READERS.insert(0, (lambda path: io.StringIO(read_text(Path(path))), os.path.isfile))


def _checked(factory: Callable, called: str | None = None) -> Callable:
    """`factory`, its arguments checked against their annotations: a mistake in a config is a `UserError`."""
    signature, called = inspect.signature(factory), called or factory.__name__

    @functools.wraps(factory)
    def call(*args, **kwargs):
        bound = _all_given(signature, called, args, kwargs)
        for name, value in bound.arguments.items():
            annotation = signature.parameters[name].annotation
            if annotation is inspect.Parameter.empty or signature.parameters[name].kind in (
                inspect.Parameter.VAR_KEYWORD,
                inspect.Parameter.VAR_POSITIONAL,
            ):
                continue
            try:
                typeguard.check_type(value, annotation)
            except typeguard.TypeCheckError:
                wanted = getattr(annotation, "__name__", None) or str(annotation)
                if re.search(r"[|\[]", str(annotation)):
                    wanted = str(annotation).replace("typing.", "").replace("collections.abc.", "")
                raise UserError(f"{called}.{name} = {value!r} must be {wanted}") from None
        return factory(*args, **kwargs)

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


def _bound(factory: Callable, called: str) -> Callable:
    """`factory`, whose missing arguments are a `UserError`; a library's own annotations are not checked."""
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def call(*args, **kwargs):
        _all_given(signature, called, args, kwargs)
        return factory(*args, **kwargs)

    return call


class _OursFirst(selector_map.SelectorMap):
    """Gin's table of names, in which a name of optax's must be written out where Crescendo has it too."""

    def matching_selectors(self, partial_selector: str) -> list[str]:
        """Every complete name that ends with the partial one; optax's only where there is no other."""
        matches = super().matching_selectors(partial_selector)
        return [name for name in matches if not name.startswith("optax.")] or matches


@functools.cache
def _register_factories() -> None:
    ours_first = _OursFirst()
    for name, value in gin.config._REGISTRY.items():
        ours_first[name] = value
    gin.config._REGISTRY = ours_first
    for module, factories in FACTORIES.items():
        for name, factory in factories.items():
            gin.external_configurable(_checked(user_values()(factory), name), name=name, module=module)
    for module, factories in optax_factories().items():
        for name, factory in factories.items():
            gin.external_configurable(_bound(user_values()(factory), f"{module}.{name}"), name=name, module=module)


@functools.cache
def _register(experiment: Callable) -> Callable:
    return gin.external_configurable(_checked(experiment), name=experiment.__name__, module="experiments")


def parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """An argument parser with `--config` and `--set`."""
    result = plain_parser(description, epilog)
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


def bind(experiment: Callable, configs: Sequence[str], bindings: Sequence[str] = ()) -> Callable:
    """`experiment` with the parameters that the configs bind; later files and bindings win.

    Args:
      experiment: a function with annotated parameters; configs name it by its own name. Where it has a parameter
        `operative_config`, it is given the function of that name.
      configs: paths of gin files, or names of shipped ones.
      bindings: gin statements such as `"train.total_examples = 100"`.

    Raises:
      UserError: for a file that isn't there, a syntax error, an unknown name (with the nearest known ones), or, when
        the result is called, a value of the wrong type.
    """
    gin.clear_config()  # also unlocks it
    _register_factories()
    wrapped = _register(experiment)
    for config in configs:
        _parse(_read(config), config)
    for binding in bindings:
        _parse(binding, "--set")
    try:
        gin.finalize()
    except ValueError as error:
        raise UserError(_one_line(error)) from None

    takes_text = "operative_config" in inspect.signature(experiment).parameters
    given = {"operative_config": operative_config} if takes_text else {}

    @functools.wraps(experiment)
    def call(**kwargs):
        with _own_errors():
            return wrapped(**(given | kwargs))

    return call


def arguments(experiment: Callable, names: Collection[str] | None = None) -> dict[str, Any]:
    """What the configs of the latest `bind` give the experiment's parameters: factories called, defaults filled in.

    Args:
      experiment: as it was bound.
      names: of the parameters; the factories of others aren't called. None: all.

    Raises:
      UserError: what a factory says of its arguments.

    >>> def tune(*, rate: float, steps: int = 10): ...
    >>> _ = bind(tune, [], ["tune.rate = 0.5"])
    >>> arguments(tune), arguments(tune, ["rate"])
    ({'steps': 10, 'rate': 0.5}, {'rate': 0.5})
    """
    bound = gin.get_bindings(_register(experiment), resolve_references=False)
    parameters = inspect.signature(experiment).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty} | bound
    with _own_errors():  # gin calls a factory when its reference is copied
        return copy.deepcopy({name: value for name, value in given.items() if names is None or name in names})


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Gin raises a look-alike that says where in the config a call stood; the first line is ours."""
    try:
        yield
    except (UserError, Interrupted) as stop:
        kind = UserError if isinstance(stop, UserError) else Interrupted
        raise kind(str(stop).splitlines()[0]) from None


def operative_config() -> str:
    """The bindings in force for what was called so far, defaults included, as gin text that repeats the run."""
    return gin.operative_config_str(max_line_length=120)


class _Names(config_parser.ParserDelegate):
    """For reading what is bound: the values are left alone."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        del scoped_configurable_name, evaluate

    def macro(self, macro_name: str) -> None:
        del macro_name


def names_bound(statements: str) -> list[str]:
    """What gin statements bind: `NAME.PARAMETER` as it is written, without its scope, and macros by name.

    What isn't gin binds nothing; `bind` complains of it.

    >>> names_bound("peak/schedules.linear.total = 1\\nLEARNING_RATE = @rate()")
    ['schedules.linear.total', 'LEARNING_RATE']
    """
    names = []
    with contextlib.suppress(SyntaxError, tokenize.TokenError):
        for statement in config_parser.ConfigParser(statements, _Names()):
            if not isinstance(statement, config_parser.BindingStatement):
                continue
            scope, selector, parameter = statement.scope, statement.selector, statement.arg_name
            of_macro = selector in ("macro", "gin.macro") and parameter == "value"
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
        return _Text(f"@{scope}{slash}{_complete(selector)}{'()' if evaluate else ''}")

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)


def differences(operative: str, *, but_for: Collection[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """The settings of an earlier run to which the latest `bind` gives other values: `(before, now)`, text by name.

    However they are written: a macro is its value, a default that is written out is one that is left out. What the
    earlier run never called doesn't count.

    Args:
      operative: what `operative_config` gave in the earlier run.
      but_for: settings that may differ.

    >>> def fit(*, rate: float, steps: int = 10): ...
    >>> _ = bind(fit, [], ["RATE = 0.5", "fit.rate = %RATE"])
    >>> differences("fit.rate = 0.5\\nfit.steps = 10")
    ({}, {})
    >>> differences("fit.rate = 0.25\\nfit.steps = 20", but_for=["fit.rate"])
    ({'fit.steps': '20'}, {'fit.steps': '10'})
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
    return _Text(f"@{_complete(default.__name__)}") if inspect.isfunction(default) else default


def _settings(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What gin text binds, by scope and complete name: the parameters' values, without macros."""
    settings: dict[tuple[str, str], dict[str, Any]] = {}
    macros: dict[str, Any] = {}
    for statement in config_parser.ConfigParser(text, _Values()):
        if not isinstance(statement, config_parser.BindingStatement):
            continue
        if statement.arg_name:
            key = statement.scope, _complete(statement.selector)
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


def _complete(selector: str) -> str:
    """The one name that a part of it stands for; the part, where there is none."""
    matches = gin.config._REGISTRY.matching_selectors(selector)
    return matches[0] if len(matches) == 1 else selector


def macros_read() -> set[str]:
    """The macros that something bound by the latest `bind` refers to."""
    references = gin.config.iterate_references(gin.config._CONFIG, to=gin.get_configurable("gin.macro"))
    return {reference.config_key[0] for reference in references}


def _read(config: str) -> str:
    path = Path(config)
    if path.is_file():
        return read_text(path)
    if (CONFIGS / path.name).is_file() and path.name == config.removesuffix(".gin") + ".gin":
        return decoded((CONFIGS / path.name).read_bytes(), config)
    raise UserError(f"--config {config}: no such file; Crescendo ships {', '.join(shipped())}")


def _parse(text: str, origin: str) -> None:
    text = check_typed(text, origin)
    try:
        gin.parse_config(text)
    except (SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{origin}: not gin: {_one_line(error)}; write NAME.PARAMETER = VALUE") from None
    except RecursionError:
        raise UserError(f"{origin}: it includes itself, or nests more deeply than can be read") from None
    except (ValueError, TypeError, OSError, ImportError, UserError) as error:
        raise UserError(f"{origin}: {_explain(_one_line(error))}") from None


def _one_line(error: Exception) -> str:
    told = error.args[0] if isinstance(error, tokenize.TokenError) else error  # whose text is a tuple's
    return str(told).strip().splitlines()[0]


def _explain(message: str) -> str:
    """Adds the nearest known names to gin's own words."""
    unknown_factory = re.search(r"No configurable matching (?:reference )?'?@?([\w./]+)", message)
    unknown_parameter = re.search(r"Configurable '?([\w.]+)'? doesn't have a parameter named '?(\w+)'?", message)
    if unknown_factory:
        name = unknown_factory.group(1).split("/")[-1]
        return f"unknown name {name!r}{_nearest(name.split('.')[-1], _known_names())}"
    if unknown_parameter:
        name, parameter = unknown_parameter.groups()
        known = list(inspect.signature(gin.get_configurable(name)).parameters)
        if parameter.endswith("steps") and "total_examples" in known:
            return (
                f"{name.split('.')[-1]} has no parameter {parameter!r}; a run's length is total_examples, not in steps"
            )
        return f"{name.split('.')[-1]} has no parameter {parameter!r}{_nearest(parameter, known)}"
    return message


def _known_names() -> list[str]:
    return sorted({name for factories in FACTORIES.values() for name in factories} | {"train"})


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else f"; known: {', '.join(known)}"
