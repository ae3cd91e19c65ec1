"""The file tree of `docs/design.md`, a sentence a file: the first of its docstring.

`python docs/file_tree.py` writes it.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "design.md"
TOPS = ("models", "optim", "parallel", "pallas_kernels", "ranges", "experiments")
BEGIN, END = "<!-- the tree: written by docs/file_tree.py -->\n", "<!-- the end of the tree -->\n"


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without a command at its end."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    text = " ".join(text.split("\n\n")[0].split())
    return re.split(r": `(?:python -m|crescendo) |(?<=[^.]\.)\s", text)[0].rstrip(".")


def lines(folder: Path, depth: int = 0) -> list[str]:
    """A folder, its modules and its folders, each indented below it."""
    entries = [f"{'  ' * depth}{folder.name}/".ljust(34) + sentence(folder / "__init__.py")]
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    entries += [f"{'  ' * (depth + 1)}{path.name}".ljust(34) + sentence(path) for path in modules]
    for inner in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        entries += lines(inner, depth + 1)
    return entries


def tree() -> str:
    """The block between the marks."""
    text = "\n".join(line.rstrip() for top in TOPS for line in lines(ROOT / top))
    return f"{BEGIN}\n```text\n{text}\n```\n\n{END}"


def written(page: str) -> str:
    """The page with the tree as it is now."""
    before, _, rest = page.partition(BEGIN)
    return before + tree() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
