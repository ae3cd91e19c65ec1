"""The package as a whole: what it ships, who imports whom, and the examples in its docstrings."""

import ast
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"optim", "parallel", "pallas_kernels"}
ALLOWED = {
    "ranges": set(),
    **{leaf: {leaf, "ranges"} for leaf in LEAVES},
    "models": {"models", "pallas_kernels", "ranges"},
    "experiments": {"experiments", "models", "ranges"} | LEAVES,
}

# Rooms of `experiments` and which others each may import; a name with a dot is one module of a room. The commands at
# the top are imported by nobody, and papers by no other paper.
ROOMS = {
    "runtime": set(),
    "data": {"runtime"},
    "runs": {"runtime", "data"},
    "tasks": {"runtime", "data"},
    # `language_model` is the task that a session has by default.
    "trainer": {"runtime", "data", "runs", "tasks.base", "tasks.language_model"},
    "configs": {"runtime", "data", "tasks", "trainer.probes"},
    "reports": {"runtime", "runs"},
    "sweeps": {"runtime", "data", "runs", "reports", "configs", "tasks.base", "trainer"},
    "papers": {"runtime", "data", "runs", "tasks", "trainer", "configs", "reports", "scoring", "sweeps"},
    "benchmarks": {"runtime", "data", "runs", "trainer"},
    "scoring": {"runtime", "data", "runs", "configs", "tasks.base", "trainer"},
    "planning": {"runtime", "data", "tasks.base", "trainer"},
}
ROOMS["commands"] = set(ROOMS) - {"papers"}
TOPS = sorted(link.name for link in (ROOT / "typings" / "crescendo").iterdir())


def sources() -> dict[str, Path]:
    """The package's modules by their names."""
    found = {}
    for path in (path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(("crescendo", *parts)).removesuffix(".__init__")] = path
    return found


def test_every_folder_is_a_package_and_every_top_is_typed():
    for path in sources().values():
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py: no package"
    assert all((ROOT / top / "py.typed").exists() for top in TOPS)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(TOPS)


def imported(path: Path) -> set[str]:
    """The names from this package that a module imports, each written out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of {node.module}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("crescendo.")}


def test_packages_import_only_whom_they_may():
    for module, path in sources().items():
        ours = {name.split(".")[1] for name in imported(path)}
        allowed = ALLOWED[module.split(".")[1]]
        assert ours <= allowed, f"{path} imports {ours - allowed}"


def test_every_room_is_in_the_table():
    rooms = {path.parent.name for path in (ROOT / "experiments").glob("*/__init__.py")}
    assert rooms == set(ROOMS) - {"commands"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_is_below_it(room):
    experiments = {
        name.removeprefix("crescendo.experiments."): path for name, path in sources().items() if "experiments." in name
    }
    for module, path in experiments.items():
        own = path.relative_to(ROOT / "experiments").parts[0].removesuffix(path.name) or "commands"
        if own != room:
            continue
        for name in imported(path):
            # The list of papers is no paper.
            if not name.startswith("crescendo.experiments.") or name == "crescendo.experiments.papers":
                continue
            parts = name.split(".")[2:]
            allowed = parts[0] in ROOMS[room] | {room} or ".".join(parts[:2]) in ROOMS[room]
            assert allowed, f"{path}: {room} must not import {name}"
            if room == parts[0] == "papers":
                assert parts[1] in ("Paper", module.split(".")[1]), f"{path}: a paper must not import another, {name}"


def test_gin_is_imported_where_configs_are_read():
    importers = {path.name for path in sources().values() if "import gin" in path.read_text()}
    assert importers == {"binding.py", "checks.py", "explain.py", "references.py", "registration.py"}


def test_what_is_shown_is_never_read_as_markup():
    """Consoles are made in one place, and no text of rich's is made of markup."""
    made = {}
    for name, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                marked = {"TextColumn"} - ({called} if any(word.arg == "markup" for word in node.keywords) else set())
                if called in {"Console", "from_markup", "render_markup", "Prompt"} | marked:
                    made[name] = called
    assert made == {"crescendo.pallas_kernels.console": "Console"}


@pytest.mark.parametrize("name", [name for name in sources() if not name.endswith("__main__")])
def test_examples_in_docstrings_run(name, quick_compilation):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in ("triton", "jax_triton"):
            raise
        pytest.skip(f"{missing.name} belongs to the GPU's extra")
    assert doctest.testmod(module, optionflags=doctest.IGNORE_EXCEPTION_DETAIL).failed == 0
    # Functions under a decorator, which doctest takes for another module's.
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    for function in vars(module).values():
        if inspect.isfunction(function) and function.__module__ == name and hasattr(function, "__wrapped__"):
            for example in doctest.DocTestFinder().find(function, module=False, globs=dict(vars(module))):
                assert runner.run(example).failed == 0


MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 460, 100


def test_files_stay_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources().values()
        if (lines := len(path.read_text().splitlines())) > MOST_LINES_OF_A_FILE
    }
    assert not long


def test_functions_stay_short():
    """Without their docstrings."""
    long = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sources().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and lines_of(node) > MOST_LINES_OF_A_FUNCTION
    }
    assert not long


def lines_of(function: ast.FunctionDef) -> int:
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    last_of_docstring = first.end_lineno if documented else first.lineno - 1
    return function.end_lineno - function.lineno + 1 - (last_of_docstring - first.lineno + 1)


def test_the_editable_install_runs_from_anywhere():
    shown = subprocess.run(
        [sys.executable, "-m", "crescendo.experiments.train", "--help"], capture_output=True, text=True, cwd="/"
    )
    assert shown.returncode == 0, shown.stderr
    assert "debug.gin" in shown.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_built_wheel_works_without_the_source_tree(tmp_path):
    """From an empty folder, with a method in a file of one's own: the guide for that is typed as it stands."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "-o", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "v", with_pip=True)
    python = tmp_path / "v" / "bin" / "python"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "-q", *constraints, str(wheel)], check=True)
    shown = subprocess.run(
        [python, "-m", "crescendo.experiments.train", "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert shown.returncode == 0, shown.stderr
    assert "debug.gin" in shown.stdout
    page = (ROOT / "docs" / "guides" / "bring_your_own.md").read_text()
    script = "".join(re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))
    # The installed command too, which doesn't have the folder where it is typed on Python's path.
    again = "crescendo train --module mine.py --config runs/mine/config.gin --run runs/again\n"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JAX_NUM_CPU_DEVICES")
    }
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    (tmp_path / "empty").mkdir()
    typed = ["bash", "-euxo", "pipefail", "-c", script + again]
    done = subprocess.run(typed, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert len(list((tmp_path / "empty" / "runs").glob("**/config.gin"))) == 4
