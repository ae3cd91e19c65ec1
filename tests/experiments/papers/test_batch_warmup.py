"""The comparison behind `make demo`."""

import json
import re
from pathlib import Path

import pytest

from crescendo.experiments.configs.statements import Call
from crescendo.experiments.papers.batch_warmup import ARMS, batch_warmup, make_arms, parser
from crescendo.experiments.papers.batch_warmup import main as batch_warmup_main
from crescendo.experiments.reports.compare import compare
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError


def test_arms_share_the_base_batch_size_and_double_where_told():
    three = make_arms(4, [0.25, 0.5], 1000)
    assert list(three) == ["constant-4", "warmup-4-16", "constant-16"]
    assert all(bindings["train.base_batch_size"] == 4 for bindings in three.values())
    assert three["warmup-4-16"]["train.batch_size"] == Call("staged")
    assert three["warmup-4-16"]["staged.sizes"] == [4, 8, 16]
    assert three["warmup-4-16"]["staged.starts_examples"] == [0, 250, 500]


@pytest.mark.parametrize("double_at", [[], [0.5, 0.2], [0.0, 0.5], [0.5, 1.0], [0.5, 0.5]])
def test_doublings_outside_the_run_or_out_of_order_are_refused(double_at):
    with pytest.raises(UserError, match="give shares of the run between 0 and 1, increasing"):
        make_arms(2, double_at, 1000)


def test_every_arm_has_its_bindings():
    six = make_arms(4, [0.5], 1000, arms=ARMS, largest=32, curve=Path("c.json"))
    assert list(six) == ["constant-4", "warmup-4-8", "curve-4-32", "noise-scale-4-32", "norm-test-4-32", "constant-32"]
    assert six["curve-4-32"]["critical_batch_following.curve"] == "c.json"
    assert six["noise-scale-4-32"]["noise_scale_following.cap"] == 32
    assert six["norm-test-4-32"]["train.max_microbatch_examples"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["biggest"]}, "--arms biggest: no such arm; there are constant, warmup"),
        ({"arms": ["curve"]}, "the arm curve needs --curve FILE"),
        ({"largest": 4}, "--largest 4 must be above --batch-size 4"),
    ],
)
def test_arms_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_arms(4, [0.5], 1000, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--learning-rates", "1e-3", "0"], r"--learning-rates 0\.0 must be above 0 and finite"),
        (["--learning-rates", "1e-3", "1.0000001e-3"], "two differ by less than their folders' names"),
        (["--minutes", "-1"], r"--minutes -1\.0 must be above 0 and finite"),
        (
            ["--set", "TOTAL_EXAMPLES = 512"],
            "batch_warmup sets TOTAL_EXAMPLES itself: give --total-examples 512 instead",
        ),
        (["--set", "train.total_examples = 512"], "give --total-examples 512 instead of --set"),
        (["--set", "train.batch_size = 4"], "batch_warmup sets train.batch_size itself: give --batch-size 4 instead"),
        (["--set", "train.seed = 3"], "batch_warmup sets train.seed itself: give --seeds N instead of --set"),
        (
            ["--learning-rates", "1e-3", "--set", "LEARNING_RATE = 8e-3"],
            "batch_warmup sets LEARNING_RATE itself: give --learning-rates 8e-3 instead",
        ),
        (
            ["--arms", "constant", "norm-test", "--set", "train.max_microbatch_examples = 4"],
            "sets train.max_microbatch_examples itself: leave out --set 'train.max_microbatch_examples = 4'",
        ),
    ],
)
def test_values_out_of_range_and_contradictions_are_one_line(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        batch_warmup_main(["--run", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()


def test_the_help_names_every_arm():
    assert all(re.search(rf"\b{arm}\b", parser().format_help()) for arm in ARMS)


@pytest.mark.slow
def test_the_comparison_trains_every_arm_on_the_same_examples_and_reports(small_bindings, tmp_path, capsys):
    settings = [binding for binding in small_bindings if not binding.startswith(("TOTAL", "train.batch_size"))]
    results = batch_warmup(tmp_path, bindings=settings, batch_size=8, double_at=[0.4, 0.7], total_examples=512)
    assert list(results) == ["constant-8", "warmup-8-32", "constant-32"]
    assert {result[0]["examples_seen"] for result in results.values()} == {512}
    steps = {name: result[0]["step"] for name, result in results.items()}
    assert steps["constant-32"] < steps["warmup-8-32"] < steps["constant-8"]
    said = capsys.readouterr().out
    assert "saved" in said
    assert "warmup-8-32" in said
    page = (tmp_path / "report" / "report.html").read_text()
    assert "warmup-8-32" in page
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {
        "batch_size.png",
        "gradient_norm.png",
        "learning_rate.png",
        "loss_flops.png",
        "loss_seconds.png",
        "loss_steps.png",
        "loss_tokens.png",
        "throughput.png",
    }
    info = json.loads((tmp_path / "warmup-8-32" / "run.json").read_text())
    assert info["name"] == "warmup-8-32"


@pytest.mark.slow
def test_each_arm_goes_on_with_its_best_learning_rate_and_no_finished_run_is_run_again(
    small_bindings, tmp_path, capsys
):
    settings = [b for b in small_bindings if not b.startswith(("TOTAL", "train.batch_size", "schedules.linear.peak"))]
    options = {
        "bindings": settings,
        "batch_size": 16,
        "double_at": [0.5],
        "total_examples": 256,
        "arms": ["constant"],
        "learning_rates": [1e-6, 1e-2],
        "seeds": 2,
    }
    results = batch_warmup(tmp_path, **options)
    summary = json.loads((tmp_path / "comparison.json").read_text())
    (arm,) = summary
    assert arm["learning_rate"] == 1e-2
    assert arm["sweep"]["1e-06"] > arm["sweep"]["0.01"]
    assert len(arm["losses"]) == 2
    assert arm["at_equal_loss"]["steps_saved"] == pytest.approx(0, abs=1e-6)
    folders = sorted(path.name for path in tmp_path.iterdir() if (path / "run.json").exists())
    assert folders == [f"constant-16-lr{lr}" for lr in ("0.01-seed0", "0.01-seed1", "1e-06-seed0")]
    capsys.readouterr()
    assert batch_warmup(tmp_path, **options) == results
    assert "model:" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_warmup_ends_where_the_small_batch_ends_with_40_percent_fewer_steps(run_experiment, tmp_path):
    """On the standard library's source, 3 seeds."""
    run_experiment("batch_warmup", "--run", str(tmp_path), "--seeds", "3")
    runs = [tmp_path / f"{arm}-seed{seed}" for arm in ("constant-2", "warmup-2-8") for seed in range(3)]
    _, warmup = compare([read_run(run) for run in runs])
    print(f"warmup {warmup.loss_difference:+.4f} nats, {100 * warmup.steps_saved:.1f}% fewer steps, mean of 3 seeds")
    assert warmup.loss_difference <= 0.02
    assert warmup.steps_saved >= 0.40
