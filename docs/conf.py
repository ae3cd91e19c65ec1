"""The documentation site: `make docs` builds it, with no network and with every warning an error."""

import importlib
import inspect
import os
import re
import tomllib
from pathlib import Path

from crescendo.ranges import told

# Modules are imported to read their docstrings: on the CPU, wherever the site is built.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_ROOT = Path(__file__).parent.parent
_project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
project, release, author = "Crescendo", _project["version"], "Crescendo's authors"
html_title = "Crescendo"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline", "sphinx_copybutton", "myst_nb"]
html_theme = "furo"
html_show_copyright = False
html_static_path: list[str] = []
# What is copied is what is typed: of an example in Python without its prompts and its output.
copybutton_prompt_text, copybutton_prompt_is_regexp = r">>> |\.\.\. ", True
pygments_style, pygments_dark_style = "friendly", "monokai"

default_role = "code"
add_module_names = False
autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
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


def _ranges(app, what, name, obj, options, lines):
    """Behind what is said of a parameter stands its range, which its annotation has."""
    try:
        parameters = inspect.signature(obj).parameters if callable(obj) else {}
    except (TypeError, ValueError):  # without a signature
        return
    for i in range(len(lines)):
        found = re.match(r"^  (\w+): ", lines[i])
        said = told(parameters[found[1]].annotation) if found and found[1] in parameters else ""
        if said and "'" not in said:  # choices are said there
            end = next((j for j in range(i + 1, len(lines)) if not lines[j].startswith("    ")), len(lines)) - 1
            lines[end] = f"{lines[end].removesuffix('.')} ({said})."


def _modules(folder: str) -> list[str]:
    """The modules of a folder by their names, then those of the folders in it; private ones are left out."""
    paths = sorted((_ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.stem != "__init__", path.stem))
    parts = [path.relative_to(_ROOT).with_suffix("").parts for path in paths]
    names = [".".join(("crescendo", *part)).removesuffix(".__init__") for part in parts]
    return [name for name in names if "._" not in name and _is_installed(name)]


def _is_installed(module: str) -> bool:
    """Whether the module can be imported; kernels in Triton need the GPU's extra."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name not in ("triton", "jax_triton"):
            raise
        return False
    return True


def _list_modules(app, page, source):
    """A line `{modules} FOLDER` becomes a section for each module of the folder: a new file needs no line."""

    def sections(line: re.Match) -> str:
        return "\n".join(f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n" for name in _modules(line[1]))

    source[0] = re.sub(r"(?m)^\{modules\} (\w+)$", sections, source[0])


def setup(app):
    app.connect("source-read", _list_modules)
    app.connect("autodoc-process-docstring", _ranges, priority=90)
    app.connect("autodoc-process-docstring", _escape, priority=100)
