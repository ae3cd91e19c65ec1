"""The comparison behind `make demo`."""

import json

import pytest

from crescendo.experiments.batch_warmup import arms, batch_warmup
from crescendo.experiments.batch_warmup import main as batch_warmup_main
from crescendo.experiments.errors import UserError
from crescendo.experiments.metrics import read_run
from crescendo.experiments.report import compare


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
    }
    info = json.loads((tmp_path / "warmup-8-32" / "run.json").read_text())
    assert info["name"] == "warmup-8-32"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_warmup_ends_where_the_small_batch_ends_with_40_percent_fewer_steps(tmp_path):
    """On the standard library's source, 3 seeds."""
    batch_warmup(tmp_path, seeds=3)
    runs = [tmp_path / f"{arm}-seed{seed}" for arm in ("constant-2", "warmup-2-8") for seed in range(3)]
    _, warmup = compare([read_run(run) for run in runs])
    print(f"warmup {warmup.loss_difference:+.4f} nats, {100 * warmup.steps_saved:.1f}% fewer steps, mean of 3 seeds")
    assert warmup.loss_difference <= 0.02
    assert warmup.steps_saved >= 0.40
