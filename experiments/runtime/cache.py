"""Where prepared data and compiled programs are kept between runs."""

import os
from pathlib import Path


def folder() -> Path:
    """`$XDG_CACHE_HOME/crescendo`, or `~/.cache/crescendo`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crescendo"
