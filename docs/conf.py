"""The documentation site: `make docs` builds it, with no network and with every warning an error."""

import os
import re
import tomllib
from pathlib import Path

# Modules are imported to read their docstrings: on the CPU, wherever the site is built.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
project, release, author = "Crescendo", _project["version"], "Crescendo's authors"
html_title = "Crescendo"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline", "myst_nb"]
html_theme = "furo"
html_show_copyright = False
html_static_path: list[str] = []
pygments_style, pygments_dark_style = "friendly", "monokai"

default_role = "code"
add_module_names = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # the docstrings say shapes, dtypes and units
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
# Notebooks are committed with their outputs, and the tests run them.
nb_execution_mode = "off"


def _escape(app, what, name, obj, options, lines):
    """Docstrings write norms as ||g|| and products with *; between backticks and in blocks they stay as they are."""
    block: int | None = None  # the indentation of the line that opened one
    for i, line in enumerate(lines):
        indentation = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indentation <= block:
            block = None
        if block is None and not line.lstrip().startswith((">>>", "...")):
            block = indentation if line.endswith("::") else None
            parts = re.split(r"(`[^`]*`|\*\*)", line)
            line = "".join(part if part[:1] in ("`", "*") else re.sub(r"([|*])", r"\\\1", part) for part in parts)
            line = re.sub(r">`_(?!_)", ">`__", line)  # many functions may name one paper: a link without a name
            lines[i] = re.sub(r"(`[^`]*`)(?=[^\W_])", r"\1\\ ", line)  # a role ends where a word does


def setup(app):
    app.connect("autodoc-process-docstring", _escape, priority=100)
