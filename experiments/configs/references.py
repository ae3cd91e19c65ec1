"""What a configuration refers to, followed from the experiment before anything is built.

Gin calls a function only where a binding refers to it, `@name()` or `@name`, or where another calls it in Python, which
only functions that are decorated with gin's own `configurable` are. So what a run uses of what is bound can be read off
the bindings: a call takes of each parameter what is bound in the innermost of its scopes, and what that refers to is
called in turn. A macro is a call too, of `gin.macro` in the scope of the macro's name.
"""

import contextlib
import functools
import inspect
import re
import sys
import tokenize
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import gin
from gin import config_parser

from crescendo.experiments.configs.explain import elsewhere, nearest
from crescendo.experiments.runtime.command import parameter_docs
from crescendo.parallel.hosts import is_leader

MACRO = "gin.macro"


class Binding(NamedTuple):
    """What is bound: a parameter of a function, by its complete name, in a scope."""

    scope: str
    selector: str
    parameter: str

    def __str__(self) -> str:
        """As it is written."""
        if self.selector == MACRO:
            return self.scope
        return f"{self.scope}{'/' if self.scope else ''}{short(self.selector)}.{self.parameter}"


class Reached(NamedTuple):
    """What is called, and what of the bindings that uses.

    Attributes:
      calls: scope and complete name of each function.
      used: the values.
    """

    calls: dict[tuple[str, str], None]
    used: dict[Binding, Any]


def bound() -> dict[Binding, Any]:
    """Everything that is bound."""
    return {
        Binding(scope, selector, parameter): value
        for (scope, selector), values in gin.config._CONFIG.items()
        for parameter, value in values.items()
    }


def follow(experiment: str) -> Reached:
    """What a call of the experiment, a complete name, leads to."""
    reached = Reached({}, {})
    from_python = [call for call in gin.config._CONFIG if _called_from_python(call[1])]
    waiting = deque([("", experiment), *from_python])
    while waiting:
        call = waiting.popleft()
        if call in reached.calls:
            continue
        reached.calls[call] = None
        for binding, value in effective(*call).items():
            reached.used[binding] = value
            for reference in references(value):
                scopes = {"/".join(reference.scopes)}
                if not reference.scopes:
                    # Without () it is called later, by whoever was given it.
                    scopes = {call[0]} if reference.evaluate else {call[0], ""}
                waiting += [(scope, reference.configurable.selector) for scope in scopes]
    return reached


def effective(scope: str, selector: str) -> dict[Binding, Any]:
    """What a call in a scope is given: for each parameter what the innermost scope binds."""
    parts = scope.split("/") if scope else []
    given: dict[str, tuple[Binding, Any]] = {}
    for count in range(len(parts) + 1):
        outer = "/".join(parts[:count])
        for parameter, value in gin.config._CONFIG.get((outer, selector), {}).items():
            given[parameter] = Binding(outer, selector, parameter), value
    return dict(given.values())


def references(value: Any) -> Iterator[gin.config.ConfigurableReference]:
    """Every reference in a value, macros too."""
    return gin.config.iterate_references({"": value})


def resolved(experiment: str, without: Collection[str] = ()) -> str:
    """Every setting of what is called, defaults included and macros replaced by their values, in a line each.

    Args:
      experiment: a complete name.
      without: parameters of its that aren't settings.
    """
    lines = []
    for scope, selector in follow(experiment).calls:
        if selector.startswith("gin."):
            continue
        given = {binding.parameter: value for binding, value in effective(scope, selector).items()}
        for parameter in signature_of(selector).parameters.values():
            if parameter.name in given:
                value = _text(given[parameter.name])
            elif parameter.default is not parameter.empty:
                value = default_text(parameter)
            else:
                continue
            if selector != experiment or parameter.name not in without:
                lines.append(f"{Binding(scope, selector, parameter.name)} = {value}")
    return "\n".join(lines)


def default_text(parameter: inspect.Parameter) -> str:
    """A parameter's default as a config would write it; `required` where it has none."""
    if parameter.default is parameter.empty:
        return "required"
    return f"@{parameter.default.__name__}" if inspect.isfunction(parameter.default) else repr(parameter.default)


def written(experiment: str, parameter: str) -> str:
    """A setting with all that it refers to, such as `adamw(learning_rate=linear(peak=0.001))`; "" if it isn't set."""
    given = {binding.parameter: value for binding, value in effective("", experiment).items()}
    return _text(given[parameter], written_out=True) if parameter in given else ""


def _text(value: Any, scope: str = "", *, written_out: bool = False) -> str:
    """A value as gin writes it, macros replaced by theirs; `written_out`: what it refers to in the form of a call."""
    match value:
        case gin.config.ConfigurableReference():
            inner = "/".join(value.scopes) or scope
            selector = value.configurable.selector
            given = effective(inner, selector)
            if selector == MACRO and given:
                return _text(next(iter(given.values())), inner, written_out=written_out)
            if not written_out or selector.startswith("gin."):
                return repr(value)
            arguments = [f"{each.parameter}={_text(its, inner, written_out=True)}" for each, its in given.items()]
            return f"{short(selector)}({', '.join(arguments)})" if value.evaluate else short(selector)
        case list() | tuple():
            inside = ", ".join(_text(each, scope, written_out=written_out) for each in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
        case dict():
            inside = ", ".join(f"{key!r}: {_text(its, scope, written_out=written_out)}" for key, its in value.items())
            return f"{{{inside}}}"
    return repr(value)


def why_unused(binding: Binding, reached: Reached) -> str:
    """Says that nothing uses a binding, and what would, in one line."""
    top = _unused_reader(binding, reached)
    belongs = (
        "" if top[:2] == binding[:2] else f", which is for {top if top.selector == MACRO else short(top.selector)}"
    )
    if top.selector == MACRO:
        return f"nothing reads the macro {binding}{belongs}{_instead_of(top.scope, reached)}"
    if any(selector == top.selector for _, selector in reached.calls):
        inner = [each for each in reached.used if each[1:] == top[1:]]
        instead = f"what is called takes {inner[0]}" if inner else f"{short(top.selector)} isn't called there"
    else:
        instead = _place(top.selector, reached)
    return f"nothing uses {binding}{belongs}: {instead}"


def _instead_of(macro: str, reached: Reached) -> str:
    read = [each.scope for each in reached.used if each.selector == MACRO]
    parameters = {
        str(Binding("", selector, parameter))
        for _, selector in reached.calls
        if not selector.startswith("gin.")
        for parameter in signature_of(selector).parameters
        if parameter.lower() == macro.lower()
    }
    if parameters and macro.upper() not in read:
        return f"; as a parameter it is {' or '.join(sorted(parameters))}"
    place = elsewhere(macro)
    return f": {place}" if place else nearest(macro, read)


def _unused_reader(binding: Binding, reached: Reached) -> Binding:
    """The last in the chain of unused bindings that refer to each other, up from this one."""
    seen = {binding}
    while True:
        readers = [
            reader
            for reader, value in bound().items()
            if not {reader} & ({*reached.used} | seen) and any(_names(each, binding) for each in references(value))
        ]
        if not readers:
            return binding
        binding = readers[0]
        seen.add(binding)


def _names(reference: gin.config.ConfigurableReference, binding: Binding) -> bool:
    same = reference.configurable.selector == binding.selector
    return same and (binding.selector != MACRO or "/".join(reference.scopes) == binding.scope)


def _place(selector: str, reached: Reached) -> str:
    """Where a function that isn't called would be named."""
    places = [
        _possible(selector, scope, caller, parameter)
        for scope, caller in reached.calls
        if not caller.startswith("gin.")
        for parameter in signature_of(caller).parameters.values()
    ]
    rank, text = min(places, key=lambda place: place[0], default=(None, ""))
    return (
        text if rank is not None and rank < len(_RANKS) else f"refer to it, as @{short(selector)}(), where it belongs"
    )


# How well a parameter fits a function, the best first.
_RANKS = ("said to be @name()", "holds one of its kind", "said to be one", "of its type", "holds one of its table")


def _possible(selector: str, scope: str, caller: str, parameter: inspect.Parameter) -> tuple[int, str]:
    """How well a parameter of a call fits a function, as an index of `_RANKS`, and how to name the function there."""
    (table, made), annotation = _kind(selector), str(parameter.annotation)
    said = parameter_docs(_function(caller)).get(parameter.name, "")
    mentioned = re.search(rf"`@?(\w+\.)*{re.escape(selector.rpartition('.')[2])}(\(\))?`", said)
    given = {binding.parameter: value for binding, value in effective(scope, caller).items()}
    held = [each.configurable.selector for each in references(given.get(parameter.name))]
    if parameter.name not in given and inspect.isfunction(parameter.default):
        held = [f"{table}.{parameter.default.__name__}"]
    held = [each for each in held if each in gin.config._REGISTRY]
    fits = (
        mentioned is not None and "@" in mentioned[0],
        (table, made) in map(_kind, held),
        mentioned is not None,
        _names_type(annotation, made),
        table in [_kind(each)[0] for each in held],
    )
    binding, name = Binding(scope, caller, parameter.name), f"@{short(selector)}"
    name += "" if "Callable[..." in annotation else "()"
    if "Sequence[" in annotation and "str | " not in annotation:
        name = f"[{name}]"
    now = given.get(parameter.name)
    state = "" if now is None else f"{binding} is {now!r}; "
    return fits.index(True) if any(fits) else len(_RANKS), f"{state}name it: {binding} = {name}"


def _names_type(annotation: str, made: Any) -> bool:
    """Whether an annotation has a class, or what it derives from, by name."""
    classes = [each for each in getattr(made, "__mro__", ()) if each.__module__ not in ("builtins", "typing")]
    return any(re.search(rf"\b{each.__name__}\b", annotation) for each in classes)


def _kind(selector: str) -> tuple[str, Any]:
    """The table that a function stands in, and the type of what it makes."""
    function = inspect.unwrap(_function(selector))
    made = function if inspect.isclass(function) else inspect.signature(function).return_annotation
    return selector.rpartition(".")[0], made


def _called_from_python(selector: str) -> bool:
    """Whether a module holds gin's own version of a function, so that Python's calls of it read what is bound."""
    configurable = gin.config._REGISTRY[selector]
    function = inspect.unwrap(configurable.wrapped)
    module = sys.modules.get(getattr(function, "__module__", ""))
    return getattr(module, getattr(function, "__name__", ""), None) is configurable.wrapper


def _function(selector: str) -> Any:
    return gin.config._REGISTRY[selector].wrapped


def signature_of(selector: str) -> inspect.Signature:
    return inspect.signature(_function(selector))


def short(selector: str) -> str:
    """The shortest end of a complete name that means it."""
    parts = selector.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next(end for end in ends if gin.config._REGISTRY.matching_selectors(end) == [selector])


class Names(config_parser.ParserDelegate):
    """For reading what is bound: the values are left alone."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        del scoped_configurable_name, evaluate

    def macro(self, macro_name: str) -> None:
        del macro_name


def bound_names(statements: str) -> Iterator[tuple[str, str, str]]:
    """Scope, name and parameter of each binding in gin statements, as they are written; a macro has no parameter."""
    with contextlib.suppress(SyntaxError, tokenize.TokenError):
        for statement in config_parser.ConfigParser(statements, Names()):
            if isinstance(statement, config_parser.BindingStatement):
                yield statement.scope, statement.selector, statement.arg_name


def keys(text: str) -> list[Binding]:
    """What gin text that was read binds."""
    return [
        Binding(scope, complete(selector), parameter)
        if parameter
        else Binding(f"{scope}/{selector}" if scope else selector, MACRO, "value")
        for scope, selector, parameter in bound_names(text)
    ]


def complete(selector: str) -> str:
    """The one name that a part of it stands for; the part, where there is none."""
    matches = gin.config._REGISTRY.matching_selectors(selector)
    return matches[0] if len(matches) == 1 else selector


def warn_of(idle: Mapping[Binding, str]) -> None:
    """Says, once in a process, what files bind and nothing uses; of several processes of a run the first does.

    Args:
      idle: the file of each binding.
    """
    for file in dict.fromkeys(idle.values()):
        names = [str(binding) for binding in idle if idle[binding] == file]
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        _say_once(f"warning: nothing uses what {file} binds as {', '.join(names[:6])}{more}")


@functools.cache
def _say_once(line: str) -> None:
    if is_leader():
        print(line, file=sys.stderr)


def is_gin(text: str) -> bool:
    try:
        return bool(list(config_parser.ConfigParser(text, Names())))
    except (SyntaxError, tokenize.TokenError):
        return False
