"""Runs killed at random moments, in processes of their own: the same command ends with the same bits."""

import random
import time

import pytest
from faults import (
    MEASURED,
    MOVING,
    examples_seen,
    fingerprints,
    finish,
    half_saved,
    kill,
    random_moments,
    times,
    wait_until,
)

TOTAL = 12_288
RUNS, KILLS = 10, 90

# What a run keeps and does that a kill may find half done; each is tried in turn.
KINDS = {
    "moving batch and noise scale": MOVING,
    "keeps its best": (*MOVING, "train.keep_best_checkpoint = True", "train.evaluate_every_examples = 700"),
    "other parameters to evaluate": (
        *MOVING,
        "train.optimizer = @schedule_free()",
        "schedule_free.learning_rate = @schedules.linear()",
    ),
    "saves often and keeps some": (
        *MOVING,
        "train.checkpoint_every_examples = 100",
        "train.keep_checkpoint_every_examples = 3000",
        "train.keep_last_checkpoints = 1",
    ),
    "batch by the noise scale": (
        *MEASURED,
        "train.batch_size = @noise_scale_following()",
        "noise_scale_following.start = 8",
        "noise_scale_following.cap = 32",
        "noise_scale_following.decay = 0.9",
    ),
}


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_killed_at_random_moments_ends_bit_identical(start_train, tmp_path, records, number):
    moments, kills = random_moments(), times(KILLS // RUNS)
    kind = list(KINDS)[number % len(KINDS)]
    bindings = (f"TOTAL_EXAMPLES = {TOTAL}", *KINDS[kind])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start_train(whole, *bindings))
    assert len({record["batch_size"] for record in records(whole) if record["kind"] == "train"}) > 1

    killed_at = []
    for part in range(kills):
        process = start_train(killed, *bindings)
        wait(process, killed, moments, range(part * TOTAL // (kills + 1), (part + 1) * TOTAL // (kills + 1)))
        assert kill(process), "the run ended before it was killed"
        killed_at.append(examples_seen(killed))
    finish(start_train(killed, *bindings))
    print(f"{kind}: killed at {killed_at} of {TOTAL} examples")
    assert records(killed) == records(whole)
    assert fingerprints(killed) == fingerprints(whole)


def wait(process, run, moments: random.Random, part: range) -> None:
    """For a moment within a part of the run: while it starts, between steps, in the middle of a save."""
    before = set(half_saved(run))
    match moments.choice(("start", "steps", "steps", "save")):
        case "start":
            end = time.monotonic() + moments.random() * 10
            wait_until(lambda: time.monotonic() > end or examples_seen(run) >= part.stop, process)
        case "steps":
            at = moments.choice(part)
            wait_until(lambda: examples_seen(run) >= at, process)
        case "save":
            wait_until(lambda: set(half_saved(run)) - before or examples_seen(run) >= part.stop, process)
