"""The package as a whole: what it ships, who imports whom, and the examples in its docstrings."""

import ast
import doctest
import importlib
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]
LEAVES = {"optim", "parallel", "pallas_kernels"}
ALLOWED = {
    **{leaf: {leaf} for leaf in LEAVES},
    "models": {"models", "pallas_kernels"},
    "experiments": {"experiments", "models"} | LEAVES,
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / FOLDERS[package]).glob("*.py"))


def modules() -> list[str]:
    return [
        package if path.stem == "__init__" else f"{package}.{path.stem}"
        for package in PACKAGES
        for path in sources(package)
    ]


def test_every_folder_with_python_in_it_is_listed():
    tops = [folder for folder in ROOT.iterdir() if (folder / "__init__.py").exists()]
    folders = {
        str(path.parent.relative_to(ROOT)) for top in tops for path in top.rglob("__init__.py") if path.parent.is_dir()
    }
    assert folders == set(FOLDERS.values())
    assert set(PACKAGES) == set(FOLDERS)
    assert all((ROOT / folder / "py.typed").exists() for folder in folders)


def test_packages_import_only_whom_they_may():
    for package in PACKAGES:
        own = package.split(".")[1]
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}: write the whole name of {node.module}"
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                ours = {name.split(".")[1] for name in names if name.startswith("crescendo.")}
                assert ours <= ALLOWED[own], f"{path} imports {ours - ALLOWED[own]}"


def test_gin_is_imported_in_one_place():
    importers = [path.name for package in PACKAGES for path in sources(package) if "import gin" in path.read_text()]
    assert importers == ["configurables.py"]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in ("triton", "jax_triton"):
            raise
        pytest.skip(f"{missing.name} belongs to the GPU's extra")
    assert doctest.testmod(module, optionflags=doctest.IGNORE_EXCEPTION_DETAIL).failed == 0


def test_files_stay_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for package in PACKAGES
        for path in sources(package)
        if (lines := len(path.read_text().splitlines())) > (700 if "pallas_kernels" in package else 460)
    }
    assert not long


COMMANDS = [
    *(
        f"experiments.{name}"
        for name in ("train", "report", "batch_warmup", "refine_schedule", "large_batch", "benchmark", "describe")
    ),
    "models.describe",
    "pallas_kernels.bench",
    "pallas_kernels.tune",
    "optim.plot",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves(command, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"crescendo.{command}").main(["--help"])
    assert ended.value.code == 0
    assert "example" in capsys.readouterr().out


def test_the_editable_install_runs_from_anywhere():
    shown = subprocess.run(
        [sys.executable, "-m", "crescendo.experiments.train", "--help"], capture_output=True, text=True, cwd="/"
    )
    assert shown.returncode == 0, shown.stderr
    assert "debug.gin" in shown.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_built_wheel_works_without_the_source_tree(tmp_path):
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
