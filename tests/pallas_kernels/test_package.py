"""The ops of the package: found in their folders, functions as attributes, and cheap to import."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

from crescendo import pallas_kernels
from crescendo.pallas_kernels import bench

PIECES = {"hopper"}  # that kernels are made of
FOLDERS = {module.name for module in pkgutil.iter_modules(pallas_kernels.__path__) if module.ispkg} - PIECES


def test_the_names_of_the_package_are_functions_and_the_folders_still_modules():
    # In this order: whoever imports a submodule first must not get its folder in the place of the op afterwards.
    code = """
import crescendo.pallas_kernels.attention.specs, crescendo.pallas_kernels.softmax.xla
from crescendo.pallas_kernels import attention, softmax, linear_cross_entropy, rms_norm
import crescendo.pallas_kernels.attention.op
from crescendo.pallas_kernels.attention import op, xla
from crescendo.pallas_kernels.rms_norm import reference

assert op.attention is attention is crescendo.pallas_kernels.attention
assert all(map(callable, (attention, softmax, linear_cross_entropy, rms_norm, xla.attention, reference.rms_norm)))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_to_import_it_needs_jax_and_no_implementation():
    code = """
import sys
import crescendo.pallas_kernels

print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    implementations = {path for op in pallas_kernels.OPS.values() for path in op.implementations.values()}
    assert not loaded & implementations
    assert not loaded & {"triton", "jax_triton", "jax.experimental.pallas.mosaic_gpu", "matplotlib", "rich", "torch"}


@pytest.mark.parametrize("name", pallas_kernels.OPS)
def test_an_op_has_a_folder_with_specs_and_a_reference(name):
    op = pallas_kernels.OPS[name]
    assert getattr(pallas_kernels, name) is op
    assert "implementation" in inspect.signature(op).parameters
    assert list(op.implementations)[-1] == "reference"
    assert all(path.split(".")[2] in FOLDERS for path in op.implementations.values())
    assert bench.specs(name, ["small"])
    assert bench.specs(name, ["speed"])


def test_every_folder_has_an_op():
    assert {bench.module(name, "specs").__name__.split(".")[2] for name in pallas_kernels.OPS} == FOLDERS
    for folder in FOLDERS:
        assert inspect.ismodule(importlib.import_module(f"crescendo.pallas_kernels.{folder}"))
