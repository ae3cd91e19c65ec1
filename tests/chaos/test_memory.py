"""Memory along a long run: a few bytes a step, once what the first steps take is there."""

import time

import pytest
from faults import MOVING, examples_seen, finish, wait_until

STEPS = 30_000
MOST_BYTES_PER_STEP = 100


def resident_bytes(process) -> int:
    """The least of a few readings: a save, which holds a copy of the state, may be under way at one of them."""
    readings = []
    for _ in range(20):
        with open(f"/proc/{process.pid}/status") as status:
            (line,) = (line for line in status if line.startswith("VmRSS:"))
        readings.append(1024 * int(line.split()[1]))
        time.sleep(0.05)
    return min(readings)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_memory_grows_by_a_few_bytes_a_step(start_train, tmp_path):
    run, steps = tmp_path / "run", STEPS
    process = start_train(
        run,
        f"TOTAL_EXAMPLES = {2 * steps}",
        *MOVING,
        "staged.sizes = [1, 2, 4]",
        f"staged.starts_examples = [0, {steps // 5}, {9 * steps // 5}]",
        f"train.checkpoint_every_examples = {steps // 5}",
        environment={"MALLOC_ARENA_MAX": "2"},  # else each core's share of the heap grows for a while of its own
    )
    measured = []
    for part in (0.5, 1.0, 1.5):
        wait_until(lambda part=part: examples_seen(run) >= part * steps, process, seconds=900)
        measured.append((examples_seen(run) // 2, resident_bytes(process)))
    finish(process, seconds=900)
    (first, before), *_, (last, after) = measured
    print(f"{(after - before) / (last - first):.1f} bytes a step from step {first} on: {measured}")
    assert (after - before) / (last - first) < MOST_BYTES_PER_STEP
