"""A console for tables that a pipe doesn't break."""

import os
import sys
from typing import Any

import rich.console

WIDTH = 1000  # columns, where nobody sees where a line ends: no table comes near


class Console(rich.console.Console):
    """rich's, but a reader that went away is a `BrokenPipeError`, as of any other file.

    rich would put /dev/null in the place of standard output, whatever the console writes to, and end with exit code 1.
    """

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def plain_console(**options: Any) -> Console:
    """A console that shows text as it is: `[x]` in a folder's name is no markup, and `:x:` no emoji.

    All consoles are made here, since a name that a person chose would otherwise vanish from a message, or end it.

    Args:
      options: of `rich.console.Console`.

    >>> plain_console().print("runs/a[/b]:+1:", highlight=False)
    runs/a[/b]:+1:
    """
    return Console(markup=False, emoji=False, **options)


def output_console(**options: Any) -> Console:
    """A console for standard output, whose tables are as wide as their cells where that is no terminal.

    Left to itself rich takes a pipe or a file for 80 columns and breaks the cells; `COLUMNS` in the environment is
    heeded. And a notebook's kernel sets `FORCE_COLOR`, which would have lines redrawn in what is no terminal.

    Args:
      options: of `rich.console.Console`.

    >>> output_console().is_terminal
    False
    """
    if sys.stdout.isatty():
        return plain_console(**options)
    return plain_console(force_terminal=False, width=None if "COLUMNS" in os.environ else WIDTH, **options)
