"""Here charts are drawn."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _drawn_elsewhere():
    """Not these."""
