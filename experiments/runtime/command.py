"""A command's options, made from the function that it runs: names, types, defaults and help stand once, there."""

import argparse
import inspect
import re
import sys
import types
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import local_path
from crescendo.ranges import Refused, complaint, fitted, told

# What `--config` and `--set` give, which come with the parser that reads configs.
_PARAMETERS = {"config": "configs", "set": "bindings"}
_METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}


def plain_parser(description: str, epilog: str = "", *, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser without options, whose epilog is shown line by line."""
    return argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def make_parser(
    function: Callable,
    examples: str = "",
    start: Callable[[str, str], argparse.ArgumentParser] = plain_parser,
) -> argparse.ArgumentParser:
    """The parser whose options are a function's parameters.

    A parameter `batch_size: int = 2` is the option `--batch-size N`; one without a default is required. Types are int,
    float, str, Path, any of these `| None`, a `Sequence` of them (several words), `Literal` (a choice) and bool (a
    flag). The help of an option is what the docstring says of its parameter below `Args:`, its range and its
    default; other parameters between backticks become their options.

    Args:
      function: annotated, with a docstring in Google's style, whose first paragraph describes the command.
      examples: shown below the options.
      start: makes the parser of a description and an epilog. Where it has `--config` and `--set`, as that of configs
        does, these are the parameters `configs` and `bindings`.

    Raises:
      TypeError: for a parameter that no option can be made of, or of which the docstring says nothing.

    >>> def cook(minutes: float, *, seeds: Sequence[int] = (0, 1)):
    ...     '''Cooks.
    ...
    ...     Args:
    ...       minutes: how long.
    ...       seeds: of what is cooked for `minutes`.
    ...     '''
    >>> make_parser(cook).parse_args(["--minutes", "2.5", "--seeds", "3"])
    Namespace(minutes=2.5, seeds=[3])
    >>> make_parser(cook)._actions[-1].help
    'of what is cooked for --minutes (default 0 1)'
    """
    text = inspect.cleandoc(function.__doc__ or "")
    parser = start(" ".join(text.partition("\n\n")[0].split()), examples)
    parser.prog = f"crescendo {function.__name__}"
    there = {_PARAMETERS.get(action.dest, action.dest) for action in parser._actions}
    said, hints = _arguments_section(text), get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        if name in there:
            continue
        if name not in said or name not in hints:
            raise TypeError(f"{function.__name__}: {name} needs an annotation and a line below Args:")
        help_text = re.sub("`([^`]+)`", lambda match: _spelled(match[1], parameters), said[name])
        required = parameter.default is parameter.empty
        help_text += _notes(hints[name], None if required else parameter.default)
        options = _kind(f"{function.__name__}.{name}", hints[name], None if required else parameter.default)
        if required:
            options["required"] = True
        parser.add_argument(_option(name), dest=name, help=help_text.replace("%", "%%"), **options)
    return parser


def call(function: Callable, arguments: argparse.Namespace) -> Any:
    """Calls `function` with what a parser of `make_parser` read; `--config` not given is the function's own default.

    Raises:
      UserError: for a value out of its parameter's range.
    """
    values = {_PARAMETERS.get(name, name): value for name, value in vars(arguments).items()}
    values = {name: value for name, value in values.items() if name in inspect.signature(function).parameters}
    if values.get("configs", ()) is None:
        del values["configs"]
    hints, signature = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    for name, value in values.items():
        try:
            fitted(value, hints[name])
        except Refused as refused:
            raise UserError(complaint(value, _option(name), signature[name], refused)) from None
    return function(**values)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _spelled(name: str, parameters: Any) -> str:
    return _option(name) if name in parameters else name


def _kind(name: str, annotation: Any, default: Any) -> dict[str, Any]:
    """What `add_argument` takes for an annotation."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _kind(name, arguments[0], default)
    if get_origin(annotation) in (Union, types.UnionType) and len(arguments) == 2 and types.NoneType in arguments:
        return _kind(name, next(each for each in arguments if each is not types.NoneType), default)
    if get_origin(annotation) is Sequence:
        return _kind(name, arguments[0], default) | {"nargs": "+"}
    if get_origin(annotation) is Literal:
        return {"choices": arguments, "type": type(arguments[0]), "default": default}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction if default else "store_true", "default": default}
    if annotation in _METAVARS:
        return {
            "type": local_path if annotation is Path else annotation,
            "metavar": _METAVARS[annotation],
            "default": default,
        }
    raise TypeError(f"{name}: no option can be made of {annotation}")


def _notes(annotation: Any, default: Any) -> str:
    """For the help: a number's range, and the default; not that, where the text has to say what no value means."""
    notes = [] if _is_choice(annotation) else [told(annotation)]
    if default is not None and default is not False and default != ():
        several = default if isinstance(default, list | tuple) else (default,)
        shown = " ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in several)
        notes.append(f"default {shown}")
    notes = [note for note in notes if note]
    return f" ({'; '.join(notes)})" if notes else ""


def _is_choice(annotation: Any) -> bool:
    """Whether argparse shows what there is."""
    return get_origin(annotation) is Literal or any(map(_is_choice, get_args(annotation)))


def check_not_given(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, names: Collection[str], why: str
) -> None:
    """That options have their defaults: of a command that would do nothing with them.

    Args:
      parser: has the options.
      arguments: what it made of the command line.
      names: of the options, as `arguments` has them.
      why: goes on from the option's name.

    Raises:
      UserError: names the first that hasn't.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--top-k", type=int)
    >>> check_not_given(parser, parser.parse_args(["--top-k", "3"]), ["top_k"], " is of sampling: add --sample")
    Traceback (most recent call last):
    ...
    crescendo.experiments.runtime.errors.UserError: --top-k is of sampling: add --sample
    """
    for name in names:
        if getattr(arguments, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')}{why}")


def parameter_docs(function: Callable) -> dict[str, str]:
    """What is said of each parameter below `Args:`, also by whom its docstring names, and by its `options_of`.

    >>> def cook(*, minutes: float):
    ...     '''Cooks.
    ...
    ...     Args:
    ...       minutes: how long,
    ...         at most.
    ...     '''
    >>> def bake(**options): "Bakes."
    >>> bake.options_of = cook
    >>> parameter_docs(bake)
    {'minutes': 'how long, at most'}
    """
    function = inspect.unwrap(function)
    text, theirs = inspect.cleandoc(function.__doc__ or ""), getattr(function, "options_of", None)
    said = parameter_docs(theirs) if theirs else {}
    # "Args: as `adamw`", "see `ModelConfig`": where the module has them, the first that is named comes last.
    here = vars(sys.modules[function.__module__])
    for name in reversed(re.findall(r"`(?:\w+\.)*(\w+)", text)):
        if callable(here.get(name)):
            said |= _arguments_section(inspect.cleandoc(here[name].__doc__ or ""))
    own = said | _arguments_section(text)
    return {name: own[name] for name in own if name in inspect.signature(function).parameters or theirs}


def _arguments_section(docstring: str) -> dict[str, str]:
    """The entries below `Args:` or `Attributes:`, each on one line without its full stop."""
    section = re.search(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n(?=[ ]))+)", docstring, flags=re.MULTILINE)
    entries = re.split(r"^  (\w+): ", section[1], flags=re.MULTILINE)[1:] if section else []
    return {
        name: " ".join(text.split()).removesuffix(".") for name, text in zip(entries[::2], entries[1::2], strict=True)
    }
