"""Eight simulated CPU devices for every test, set before JAX is imported; `make test-gpu` asks for the GPU.

Prepared data and compiled programs go to a cache of the session's own, shared by its worker processes.
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.pop("COLUMNS", None)  # xdist gives its workers a terminal's width; what the tests see is a pipe
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="crescendo-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
    # A program that a test before has compiled is not compiled again, small ones neither.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{os.environ['XDG_CACHE_HOME']}/crescendo/xla"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest


# By module: without an __init__.py beside it, a package's fixture would last to the end of the session.
@pytest.fixture(scope="module")
def quick_compilation():
    """For tests that compile much and check arithmetic: the compiler need not work on the programs' speed."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
