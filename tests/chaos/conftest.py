"""One seed for the whole session, printed at its head."""

import os
import time

import pytest

# Before xdist starts its workers, which have it too.
os.environ.setdefault("CRESCENDO_CHAOS_SEED", str(time.time_ns() % 10**9))


def pytest_report_header() -> str:
    """How to see the same moments again, as far as the machine's own speed allows."""
    return f"random moments and malformed files by CRESCENDO_CHAOS_SEED={os.environ['CRESCENDO_CHAOS_SEED']}"


@pytest.fixture(autouse=True)
def _nothing_is_left_running(request):
    """A test that fails leaves no process behind."""
    yield
    if "start_train" not in request.fixturenames:
        return
    started = request.getfixturevalue("start_train").started
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
    started.clear()
