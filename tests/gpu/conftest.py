"""Work begun ahead of the tests that will ask for it: compiling takes longer than what is compiled."""

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

# Lowering a kernel is Python's work, one thread's at a time, so `make test-gpu` runs several processes. They share the
# memory; some is left for the programs that tests start.
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.85 / processes:.2f}"


@pytest.fixture(scope="module")
def ahead(request):
    """`ahead(function, *arguments)`, once each; what the module's `foreseen(parameters)` names is begun in threads.

    `foreseen` gives the calls, `(function, *arguments)`, that a collected test of these parameters will ask for.
    """
    pool, begun = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 1)), {}

    def begin(*call):
        if call not in begun:
            begun[call] = pool.submit(*call)
        return begun[call]

    # With several worker processes every one holds all tests, and compiles what it comes to.
    for item in () if "PYTEST_XDIST_WORKER" in os.environ else request.session.items:
        if item.module is request.module:
            for call in request.module.foreseen(getattr(getattr(item, "callspec", None), "params", {})):
                begin(*call)
    yield lambda *call: begin(*call).result()
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def poisoned():
    """`poisoned(compiled, *arguments)`: results in memory that was full of NaN: one that nobody wrote shows."""

    def run(compiled, *arguments):
        nan = [jnp.full(info.shape, jnp.nan, info.dtype) for info in jax.tree.leaves(compiled.out_info) * 2]
        jax.block_until_ready(nan)
        del nan
        return compiled(*arguments)

    return run
