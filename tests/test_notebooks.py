"""The notebooks run from top to bottom, and are committed with their outputs."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert len(outputs) >= 3
    assert_no_complaint(notebook)


def assert_no_complaint(notebook):
    """No row of an output says that something failed or is to be worried about."""
    text = "\n".join(o.text for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "stream")
    assert not re.findall(r".*(?:\w+Error\b|\berror:|\bWARNING\b|Warning\b|Traceback).*", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("place", "gpu"), [("..", False), ("crescendo", True), (None, False)])
def test_the_first_cell_installs_from_the_clone_where_the_project_is_not_there(path, place, gpu, tmp_path, monkeypatch):
    """From a clone's own folder, from beside a clone (whose folder Python takes for the package), and from nowhere."""
    (tmp_path / "notebooks").mkdir()
    if place is not None:
        clone = (tmp_path / "notebooks" / place).resolve()
        (clone / "pallas_kernels").mkdir(parents=True)
        (clone / "pallas_kernels" / "op.py").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [])
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
    typed = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: typed.append(command))
    cell = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    if place is None:
        with pytest.raises(SystemExit, match="clone or upload the project's folder"):
            exec(cell.source, {})
    else:
        exec(cell.source, {})
        assert typed == [[sys.executable, "-m", "pip", "install", "-q", f"{clone}{'[cuda13]' if gpu else ''}"]]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)  # as for anybody who opens it
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # raises what a cell raises
    assert_no_complaint(notebook)
