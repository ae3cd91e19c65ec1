"""A console for tables that a pipe doesn't break."""

import os
import sys
from typing import Any

from rich.console import Console

WIDTH = 1000  # columns, where nobody sees where a line ends: no table comes near


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
        return Console(**options)
    return Console(force_terminal=False, width=None if "COLUMNS" in os.environ else WIDTH, **options)
