"""The branched measurement: the rule, the curve, and the command on a small model."""

import contextlib
import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo.experiments.papers import critical_batch as module
from crescendo.experiments.papers.batch_warmup import batch_warmup
from crescendo.experiments.papers.critical_batch import Branch, critical_batch
from crescendo.experiments.papers.critical_batch import main as critical_batch_main
from crescendo.experiments.papers.critical_batch.curve import (
    CriticalBatch,
    critical_batch_at,
    critical_factor,
    make_curve,
    over_seeds,
    smoothed_loss,
)
from crescendo.experiments.runs.results import Results
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import Interrupted
from crescendo.optim import critical_batch_following

FACTORS = [1, 2, 4, 8, 16, 32, 64]


@settings(deadline=None, max_examples=200)
@given(st.floats(1, 2000), st.integers(1, 64), st.floats(0.002, 0.2))
def test_the_interval_holds_the_critical_batch_size_known_in_closed_form(noise_scale, batch_size, tolerance):
    """A step of batch b makes progress 1 / (1 + noise / b), so D examples make D / (b + noise) (McCandlish et al.)."""
    progress = 4 * (batch_size + noise_scale)  # in nats times examples: branch 1 gains 4 nats

    def loss(b):
        return 10 - progress / (b + noise_scale)

    losses = {k: loss(k * batch_size) for k in FACTORS}
    # loss(critical) = loss(B) + tolerance, solved for the batch size.
    critical = 1 / (1 / (batch_size + noise_scale) - tolerance / progress) - noise_scale
    found = critical_batch_at(losses, batch_size, tolerance)
    assert found.low <= critical * (1 + 1e-9)
    if found.high is None:
        assert found.low == FACTORS[-1] * batch_size
    else:
        assert critical < found.high * (1 + 1e-9)
        assert found.value == pytest.approx(math.sqrt(found.low * found.high))


@given(st.lists(st.floats(0, 3), min_size=1, max_size=7), st.floats(0.001, 1))
def test_the_factor_is_the_largest_that_loses_nothing_to_any_smaller_one(values, tolerance):
    losses = dict(zip(FACTORS, values, strict=False))
    allowed = [k for k in losses if all(losses[k] <= losses[j] + tolerance for j in losses if j < k)]
    assert critical_factor(losses, tolerance) == max(allowed)


def test_a_branch_that_diverged_is_past_every_tolerance():
    assert critical_factor({1: 2.0, 2: 2.0, 4: math.nan, 8: 2.0}, 0.01) == 8
    assert critical_factor({1: 2.0, 2: math.nan, 4: math.nan}, 0.01) == 1
    assert math.isnan(smoothed_loss([1.0, math.nan, 1.0]))


def test_losses_are_smoothed_as_an_exponential_average():
    losses = [3.0, 2.5, 2.25, 2.0]
    weights = np.array([1 / 8, 1 / 8, 1 / 4, 1 / 2])
    assert smoothed_loss(losses) == pytest.approx(weights @ losses)


def test_the_curve_has_the_points_whose_branches_are_all_there():
    setup = {"batch_size": 8, "sequence_length": 10, "tolerance": 0.01, "fingerprint": "f", "factors": [1, 2, 4]}
    branches = [
        {"seed": seed, "examples": examples, "factor": k, "losses": [2.0 + (0.1 if k > best else 0)]}
        for seed, best in ((0, 1), (1, 4))
        for examples in (100, 200)
        for k in (1, 2, 4)
    ]
    branches.remove({"seed": 1, "examples": 200, "factor": 4, "losses": [2.0]})
    curve = make_curve(branches, setup | {"seeds": 2})
    assert curve["tokens"] == [1000]
    # Seed 0 says 8 to 16, seed 1 at least 32.
    assert curve["interval"] == [[8.0, None]]
    assert curve["critical_batch_size"] == pytest.approx([math.sqrt(math.sqrt(8 * 16) * 32)])
    assert over_seeds([CriticalBatch(4.0, 2.0, 8.0)]) == CriticalBatch(pytest.approx(4.0), 2.0, 8.0)
    policy = critical_batch_following(curve, 8, 32, sequence_length=10, lower_bound=True)
    assert policy.measured_on == "f"


@pytest.fixture(scope="module")
def bindings(small_bindings) -> list[str]:
    kept = [b for b in small_bindings if not b.startswith("train.batch_size")]
    return [*kept, "train.evaluate_every_examples = 128"]


@pytest.fixture(scope="module")
def measured(bindings, tmp_path_factory):
    """A measurement in two pieces: the folder, and the branches that the first piece finished."""
    folder = tmp_path_factory.mktemp("critical")
    options = {"batch_size": 16, "factors": [2, 4], "points": [0.25, 0.5], "branch_examples": 128}
    with pytest.MonkeyPatch.context() as patch:
        # The base run may end; the time is over as soon as the first branch has.
        patch.setattr(module, "interrupted_at", lambda deadline: contextlib.nullcontext())
        with pytest.raises(Interrupted, match=r"5 of 6 branches are left in .*; the same command goes on"):
            critical_batch(folder, bindings=bindings, minutes=1e-6, **options)
    first = dict(Results(folder, "branches.jsonl", Branch).records)
    return folder, first, critical_batch(folder, bindings=bindings, **options), options


@pytest.mark.slow
def test_it_goes_on_branch_by_branch_and_ends_with_a_curve(measured):
    folder, first, curve, _ = measured
    assert list(first) == [Branch(0, 128, 1)]
    lines = (folder / "branches.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert curve == json.loads((folder / "critical_batch.json").read_text())
    assert curve["tokens"] == [128 * 32, 256 * 32]
    assert (folder / "critical_batch.png").stat().st_size > 10_000
    assert all(low >= 16 for low, _ in curve["interval"])


@pytest.mark.slow
def test_the_branch_with_the_same_batch_is_the_base_run_itself(measured):
    """128 examples from 128 on: the branch's last evaluation is the base run's at 256."""
    folder, first, _, _ = measured
    base = read_run(folder / "base-seed0").validation
    at_256 = base["loss"][base["examples_seen"] == 256]
    assert [first[Branch(0, 128, 1)]["losses"][-1]] == pytest.approx(at_256.tolist(), abs=1e-6)


@pytest.mark.slow
def test_base_runs_record_both_noise_scales(measured):
    train = read_run(measured[0] / "base-seed0").train
    assert np.isfinite(train["noise_scale_error"][2:]).any()
    assert {"noise_scale", "norm_layers_noise_scale", "norm_layers_noise_scale_error"} <= set(train)


@pytest.mark.slow
def test_a_run_can_follow_its_curve_and_no_other_ones(measured, train_small, tmp_path, bindings):
    _, _, curve, _ = measured
    path = tmp_path / "curve.json"
    # A curve that surely doubles: past 32 from the first point on.
    path.write_text(json.dumps(curve | {"critical_batch_size": [40.0, 40.0]}))
    results = batch_warmup(
        tmp_path / "warmup",
        bindings=[b for b in bindings if not b.startswith("TOTAL")],
        batch_size=16,
        total_examples=512,
        arms=["constant", "curve"],
        largest=32,
        curve=path,
    )
    assert results["curve-16-32"][0]["step"] < results["constant-16"][0]["step"]
    with pytest.raises(UserError, match=r"another model or data \(fingerprint .*measure it on this"):
        train_small(
            tmp_path / "other",
            "model.width = 32",
            "train.batch_size = @critical_batch_following()",
            f"critical_batch_following.curve = '{path}'",
            "critical_batch_following.start = 16",
            "critical_batch_following.cap = 32",
        )


@pytest.mark.slow
def test_other_settings_are_refused_and_nothing_is_lost(measured, bindings, tmp_path):
    folder, _, _, options = measured
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(UserError, match=r"can't go on: branch_examples was 128 and is now 64"):
        critical_batch(copy, bindings=bindings, **{**options, "branch_examples": 64})
    assert (copy / "branches.jsonl").read_bytes() == (folder / "branches.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1"], "--batch-size 1 must be at least 2"),
        (["--factors", "0"], "--factors 0 must be at least 1"),
        (["--points", "0.5", "0.2"], "--points 0.5 0.2: give shares of the run between 0 and 1, increasing"),
        (["--branch-examples", "100"], "--branch-examples 100 must be whole batches of .* 16 examples: use 112"),
        (["--seeds", "0"], "--seeds 0 must be above 0"),
        (["--tolerance", "nan"], "--tolerance = nan must be finite"),
        (["--minutes", "0"], "--minutes 0.0 must be above 0 and finite"),
        (["--set", "train.batch_size = 4"], "critical_batch sets train.batch_size itself: give --batch-size 4 instead"),
        (["--set", "experiments.train.seed = 4"], "sets experiments.train.seed itself: give --first-seed 4 instead"),
        (["--set", "train.noise_scale = None"], "leave out --set 'train.noise_scale = None'"),
    ],
)
def test_values_out_of_range_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        critical_batch_main(arguments)


def test_a_last_point_without_room_for_a_branch_is_refused(bindings, tmp_path):
    with pytest.raises(UserError, match="the last must leave room for a branch of 256 examples"):
        critical_batch(tmp_path, bindings=bindings, batch_size=16, factors=[2], points=[0.5, 0.9], branch_examples=256)


def test_stops_are_refused_as_branches_begin_all_along_the_run(bindings, tmp_path):
    with pytest.raises(UserError, match=r"train\.stop_at_loss = 3\.0: branches begin all along the base run: leave it"):
        critical_batch(tmp_path / "run", bindings=[*bindings, "train.stop_at_loss = 3.0"])
    assert not (tmp_path / "run").exists()


def test_a_base_run_that_was_trained_otherwise_is_refused(bindings, make_run, tmp_path):
    options = {"batch_size": 16, "factors": [2], "points": [0.25], "branch_examples": 128}
    folder = tmp_path / "critical"
    folder.mkdir()
    config = "adamw.weight_decay = 0.1"
    make_run("base", config=config).rename(folder / "base-seed0")
    with pytest.raises(UserError, match=r"base-seed0 can't go on: .*adamw.weight_decay was 0.1 and is now 0.2"):
        critical_batch(folder, bindings=[*bindings, "adamw.weight_decay = 0.2"], **options)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_measured_curve_saves_steps_at_no_loss(run_experiment, tmp_path):
    """The whole way on the CPU: measure the curve on the standard library's source, then train by it."""
    measured, trained = tmp_path / "critical", tmp_path / "warmup"
    run_experiment(
        *("critical_batch", "--run", str(measured), "--batch-size", "2", "--branch-examples", "384"),
        *("--factors", "2", "4", "8", "16", "--points", "0.1", "0.25", "0.4", "0.6"),
        *("--set", "train.evaluation_examples = 64"),
    )
    curve = json.loads((measured / "critical_batch.json").read_text())
    print(list(zip(curve["tokens"], curve["critical_batch_size"], strict=True)))
    assert curve["critical_batch_size"][0] < curve["critical_batch_size"][-1]
    run_experiment(
        *("batch_warmup", "--run", str(trained), "--batch-size", "2", "--largest", "16"),
        *("--arms", "constant", "curve", "--curve", str(measured / "critical_batch.json")),
    )
    constant, followed = json.loads((trained / "comparison.json").read_text())
    print(constant, followed)
    # The rule lets every branch length (384 of 6,144 examples, so 16 of them) lose 0.01 nats: 0.037 were measured.
    assert followed["losses"][0] <= constant["losses"][0] + 0.05
    assert followed["steps_saved"] >= 0.43
