"""These tests compile hundreds of tiny programs."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quick(quick_compilation):
    """For every module of the folder."""
