"""One seed for the whole session, printed at its head."""

import os
import time

# Before xdist starts its workers, which have it too.
os.environ.setdefault("CRESCENDO_CHAOS_SEED", str(time.time_ns() % 10**9))


def pytest_report_header() -> str:
    """How to see the same moments again, as far as the machine's own speed allows."""
    return f"random moments and malformed files by CRESCENDO_CHAOS_SEED={os.environ['CRESCENDO_CHAOS_SEED']}"
