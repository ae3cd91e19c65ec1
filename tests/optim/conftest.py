"""These tests compile hundreds of tiny programs and check arithmetic: the compiler need not work on their speed."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def _quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
