"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

from crescendo import optim


@pytest.mark.parametrize("name", sorted(module.name for module in pkgutil.iter_modules(optim.__path__)))
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"crescendo.optim.{name}")).failed == 0
