"""Modules of a person's own, whose functions configs can name: `--module myopt.py`, or `import myopt` in a config."""

import argparse
import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from crescendo.experiments.runtime.errors import UserError
from crescendo.ranges import readable_signature

_PACKAGE = Path(__file__).resolve().parents[2]
LOADED: list[str] = []
"""The modules that were asked for, in order: configs that are read later import them."""
ANY_IMPORTS = False
"""Whether configs may import what the command line doesn't name: `--allow-imports`."""


class _AllowImports(argparse.Action):
    def __call__(self, *_: object) -> None:
        global ANY_IMPORTS
        ANY_IMPORTS = True


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--module` and `--allow-imports` to a command that reads configs."""
    parser.add_argument(
        "--module",
        action="append",
        type=load,
        default=[],
        metavar="FILE.py",
        help="a Python file of your own, or a module's name: configs can name its functions; may be repeated",
    )
    parser.add_argument(
        "--allow-imports",
        action=_AllowImports,
        nargs=0,
        default=False,
        help="let configs import any module, which runs its code; else only those that --module names",
    )


def check_import(name: str) -> None:
    """That a config may import a module: importing runs code, and a config may be anyone's.

    Raises:
      UserError: for one that the command line doesn't name, unless `--allow-imports` is given.
    """
    if not ANY_IMPORTS and name not in LOADED:
        shown = "dynamic_registration" if name.startswith("__gin__") else f"import {name}"
        fix = "" if name.startswith("__gin__") else "give its file with --module, its name where it is installed, or "
        raise UserError(f"{shown}: configs import nothing by themselves, as that runs code: {fix}add --allow-imports")


def load(text: str) -> str:
    """Imports a module, for `--module`; its own folder is on the path, as a script's is.

    Args:
      text: a file such as `methods/myopt.py`, or a module's name such as `methods.myopt`.

    Returns:
      The text.

    Raises:
      UserError: no such module, one of a name that is taken, or what it raises itself.
    """
    name = _on_the_path(text) if text.endswith(".py") else text
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    imported(name, f"--module {text}")
    if name not in LOADED:
        LOADED.append(name)
    return text


def _on_the_path(text: str) -> str:
    """The name of a file's module, once its folder is on the path."""
    path = Path(text).resolve()
    if not path.is_file():
        raise UserError(f"--module {text}: no such file")
    if not path.stem.isidentifier():
        raise UserError(f"--module {text}: {path.stem!r} is no name of a module: use letters, digits and _")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()
    there = sys.modules.get(path.stem) or importlib.util.find_spec(path.stem)
    origin = getattr(there, "__file__", None) or getattr(there, "origin", None)
    if origin is None or Path(origin).resolve() != path:
        raise UserError(f"--module {text}: another module has the name {path.stem}: rename the file")
    return path.stem


def imported(name: str, text: str) -> ModuleType:
    """The module of a name.

    Args:
      name: the module's.
      text: what the person wrote, for messages: `--module NAME`, `import NAME`.

    Raises:
      UserError: it isn't there, or what it raises itself.
    """
    try:
        return importlib.import_module(name)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            raise UserError(f"{text}: no module named {error.name} here: give its file with --module") from None
        raise UserError(f"{text}: {_told(error)}") from None
    except Exception as error:
        raise UserError(f"{text}: {_told(error)}") from None


def _told(error: Exception) -> str:
    """An exception in a line, with the place that raised it."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} (line {error.lineno} of {error.filename})"
    frames = traceback.extract_tb(error.__traceback__)
    # The last line of the person's own, which may be in a module that the named one imports.
    own = [f for f in frames if not f.filename.startswith(("<frozen", sys.prefix, sys.base_prefix, str(_PACKAGE)))]
    place = (own or frames)[-1]
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (line {place.lineno} of {place.filename})"


def offered(module: ModuleType) -> dict[str, Callable]:
    """What configs can name of a module: the public functions and dataclasses that it defines itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if name[0] != "_"
        and (inspect.isfunction(value) or (inspect.isclass(value) and dataclasses.is_dataclass(value)))
        and value.__module__ == module.__name__
    }


def signature(factory: Callable) -> inspect.Signature:
    """Of a function whose annotations may be text; those that can't be read are left out."""
    readable = readable_signature(factory)
    parameters = [
        p.replace(annotation=p.empty) if isinstance(p.annotation, str) else p for p in readable.parameters.values()
    ]
    return readable.replace(parameters=parameters)
