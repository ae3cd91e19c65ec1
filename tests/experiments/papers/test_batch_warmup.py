"""The comparison behind `make demo`."""

import json

import pytest

from crescendo.experiments.papers.batch_warmup import ARMS, arms, batch_warmup
from crescendo.experiments.papers.batch_warmup import main as batch_warmup_main
from crescendo.experiments.reports.compare import compare
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError


def test_arms_share_the_base_batch_size_and_double_where_told():
    three = arms(4, [0.25, 0.5], 1000)
    assert list(three) == ["constant-4", "warmup-4-16", "constant-16"]
    assert all("train.base_batch_size = 4" in bindings for bindings in three.values())
    assert "staged.sizes = [4, 8, 16]" in three["warmup-4-16"]
    assert "staged.starts_examples = [0, 250, 500]" in three["warmup-4-16"]


@pytest.mark.parametrize("double_at", [[], [0.5, 0.2], [0.0, 0.5], [0.5, 1.0], [0.5, 0.5]])
def test_doublings_outside_the_run_or_out_of_order_are_refused(double_at):
    with pytest.raises(UserError, match="give shares of the run between 0 and 1, increasing"):
        arms(2, double_at, 1000)


def test_every_arm_has_its_bindings():
    six = arms(4, [0.5], 1000, chosen=ARMS, largest=32, curve="c.json")
    assert list(six) == ["constant-4", "warmup-4-8", "curve-4-32", "noise-scale-4-32", "norm-test-4-32", "constant-32"]
    assert "critical_batch_following.curve = 'c.json'" in six["curve-4-32"]
    assert "noise_scale_following.cap = 32" in six["noise-scale-4-32"]
    assert "train.max_microbatch_examples = 2" in six["norm-test-4-32"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen": ["biggest"]}, "--arms biggest: no such arm; there are constant, warmup"),
        ({"chosen": ["curve"]}, "the arm curve needs --curve FILE"),
        ({"largest": 4}, "--largest 4 must be above --batch-size 4"),
    ],
)
def test_arms_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        arms(4, [0.5], 1000, **options)


def test_no_seed_is_refused():
    with pytest.raises(UserError, match="--seeds 0 must be at least 1"):
        batch_warmup_main(["--seeds", "0"])


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
        "learning_rate.png",
        "loss_steps.png",
        "loss_tokens.png",
        "throughput.png",
    }
    info = json.loads((tmp_path / "warmup-8-32" / "run.json").read_text())
    assert info["name"] == "warmup-8-32"


def test_each_arm_goes_on_with_its_best_learning_rate_and_no_finished_run_is_run_again(
    small_bindings, tmp_path, capsys
):
    settings = [b for b in small_bindings if not b.startswith(("TOTAL", "train.batch_size", "schedules.linear.peak"))]
    options = {
        "bindings": settings,
        "batch_size": 16,
        "double_at": [0.5],
        "total_examples": 256,
        "chosen": ["constant"],
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
