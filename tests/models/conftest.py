"""These tests compile whole models for a few tokens."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quick(quick_compilation):
    """For every module of the folder."""
