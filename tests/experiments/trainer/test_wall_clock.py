"""Where a run's seconds go, over all the processes that worked on it."""

import shutil
from pathlib import Path

import pytest

from crescendo.experiments.reports.seconds import spent
from crescendo.experiments.runs.records import read_records
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.trainer.wall_clock import WallClock


def test_steps_that_are_done_again_are_lost_and_nothing_is_counted_twice():
    before = {"kind": "time", "seconds": 10.0, "wall_seconds": 20.0, "compile_seconds": 4.0, "evaluation_seconds": 2.0}
    before |= {"saving_seconds": 1.0, "lost_seconds": 0.5}
    steps = [{"kind": "train", "seconds": second} for second in (9.0, 10.0, 12.0)]
    wall = WallClock(now=lambda: 0.0)
    wall.go_on([*steps[:2], before, steps[2]], seconds=7.0)  # of 12 seconds of training 7 were saved
    assert wall.record(compile_seconds=3.0) == {
        "wall_seconds": 22.0,
        "compile_seconds": 7.0,
        "evaluation_seconds": 2.0,
        "saving_seconds": 1.0,
        "lost_seconds": 5.5,
    }


def test_a_state_of_another_run_brings_its_training_along():
    wall = WallClock(now=lambda: 0.0)
    wall.go_on([], seconds=30.0)
    assert wall.record(0.0)["wall_seconds"] == 30.0
    assert wall.record(0.0)["lost_seconds"] == 0.0


@pytest.mark.slow
def test_seconds_add_up_over_processes(train_small, tmp_path: Path):
    run, often = tmp_path / "run", "train.checkpoint_every_examples = 256"
    train_small(run, often)
    first = spent(read_run(run))
    assert first is not None
    shutil.rmtree(run / "checkpoints" / "512")
    train_small(run, often)
    second = spent(read_run(run))
    assert second is not None
    trained = [record["seconds"] for record in read_records(run / "metrics.jsonl") if record["kind"] == "train"]
    assert second.lost > 0
    assert second.training == pytest.approx(trained[-1])
    assert second.total > first.total
    assert second.compiling > first.compiling
