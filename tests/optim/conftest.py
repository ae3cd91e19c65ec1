"""These tests compile hundreds of tiny programs and check arithmetic: the compiler need not work on their speed."""

import jax
import pytest


# By module: without an __init__.py here, a package's fixture would last to the end of the session.
@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
