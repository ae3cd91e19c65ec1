"""Steps and time at equal loss, from validation curves."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from crescendo.experiments.reports.compare import compare
from crescendo.experiments.reports.equal_loss import equal_loss_table, reached
from crescendo.experiments.runs.run import Run


def make_run(name: str, losses: list[float], steps_each: int, seconds_each: float) -> Run:
    count = np.arange(1, len(losses) + 1)
    tokens = 1000.0 * count
    place = {"step": steps_each * count, "examples_seen": tokens / 10, "units_seen": tokens}
    validation = {**place, "loss": np.array(losses), "seconds": seconds_each * count}
    train = {**validation, "batch_size": np.full(len(losses), 4)}
    info = {"name": name, "total_examples": tokens[-1] / 10}
    return Run(folder=Path(name), info=info, config="", train=train, validation=validation, events=[])


def test_the_crossing_is_interpolated_between_evaluations_of_the_mean_over_seeds():
    baseline = make_run("small", [4.0, 3.0, 2.0], steps_each=100, seconds_each=10.0)
    seeds = [
        make_run("large-seed0", [3.0, 2.4, 1.4], steps_each=20, seconds_each=5.0),
        make_run("large-seed1", [3.0, 2.6, 1.6], steps_each=20, seconds_each=5.0),
    ]
    small, large = compare([baseline, *seeds])
    found = reached(large, small)
    # The mean falls from 2.5 to 1.5 between the second and the third evaluation, and passes 2 half-way.
    assert found.loss == 2.0
    assert found.steps == pytest.approx(50)
    assert found.seconds == pytest.approx(12.5)
    assert found.tokens == pytest.approx(2500)
    assert found.steps_saved == pytest.approx(1 - 50 / 300)
    assert found.seconds_saved == pytest.approx(1 - 12.5 / 30)


def test_an_arm_that_never_gets_there_says_so():
    arms = compare([make_run("small", [3.0, 2.0], 100, 10.0), make_run("large", [3.0, 2.1], 20, 5.0)])
    assert reached(arms[1], arms[0]).steps is None
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(equal_loss_table(arms))
    said = console.export_text()
    assert "to reach 2.000 nats" in said
    assert "not reached" in said
