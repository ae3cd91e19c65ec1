"""Refinement from a run's own records."""

import json

import numpy as np
import pytest

from crescendo.experiments.papers.refine_schedule import main, recorded_norms, refine_schedule
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError
from crescendo.optim.refinement import refine


@pytest.mark.slow
def test_the_second_run_follows_the_schedule_refined_from_the_first(small_bindings, tmp_path):
    settings = [binding for binding in small_bindings if not binding.startswith("schedules.linear.peak")]
    results = refine_schedule(tmp_path, bindings=settings, learning_rate=1e-2, smoothing=0.2)
    assert {name: len(of_arm) for name, of_arm in results.items()} == {"linear": 1, "refined": 1}
    first, second = read_run(tmp_path / "linear").train, read_run(tmp_path / "refined").train
    norms = recorded_norms(tmp_path / "linear")
    np.testing.assert_array_equal(norms.l1, first["gradient_l1_norm"])
    expected = 1e-2 * refine(first["gradient_l1_norm"], smoothing=0.2)
    # The curve is stretched from the middle of the first batch to that of the last over all of the run.
    clock, fractions = second["examples_seen"] - 8, (norms.clock - norms.clock[0]) / np.ptp(norms.clock)
    stretched = np.interp(clock / 512, fractions, expected)
    np.testing.assert_allclose(second["learning_rate"], stretched, rtol=1e-4, atol=1e-8)
    assert (tmp_path / "report" / "report.html").exists()
    assert json.loads((tmp_path / "refined.json").read_text())["norm"] == "l1"


def test_a_run_without_two_good_steps_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"name": "short", "total_examples": 8}))
    record = {"kind": "train", "step": 1, "examples_seen": 8, "batch_size": 8, "gradient_norm": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record | {"gradient_l1_norm": 2.0}) + "\n")
    with pytest.raises(UserError, match="has 1 steps with a gradient norm; at least 2"):
        recorded_norms(tmp_path)


def test_a_schedule_refined_otherwise_is_refused(make_run, tmp_path):
    folder = tmp_path / "refined"
    folder.mkdir()
    for name in ("linear", "refined"):
        make_run(name, config="").rename(folder / name)
    text = json.dumps({"fractions": [0, 1], "multipliers": [1, 0], "norm": "l1", "smoothing": 0.1})
    (folder / "refined.json").write_text(text)
    with pytest.raises(
        UserError, match=r"refined can't go on: norm was l1 and is now l2; smoothing was 0.1 and is now"
    ):
        refine_schedule(folder, norm="l2", smoothing=0.2)
    assert (folder / "refined.json").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "-1.0"], r"--learning-rate -1\.0 must be above 0"),
        (["--peak-factor", "nan"], "--peak-factor = nan must be finite"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (
            ["--set", "LEARNING_RATE = 8e-3"],
            "refine_schedule sets LEARNING_RATE itself: give --learning-rate 8e-3 instead of --set",
        ),
        (["--set", "adamw.learning_rate = 1e-3"], "refine_schedule sets adamw.learning_rate itself: leave out --set"),
        (["--set", "schedules.linear.peak = 8e-3"], "sets LEARNING_RATE by --learning-rate, which nothing reads"),
    ],
)
def test_values_out_of_range_and_contradictions_are_one_line(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(["--run", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()
