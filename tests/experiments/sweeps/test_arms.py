"""Arms x seeds x learning rates, on runs that train nothing; the papers' tests train."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.statements import Macro
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import Interrupted
from crescendo.experiments.sweeps import arms as module
from crescendo.experiments.sweeps.arms import Trial, compare_arms

# What a run ends with: arm a is best at 1e-2, arm b at 1e-3 since its other rate diverges.
LOSSES = {("a", 1e-3): 2.5, ("a", 1e-2): 2.0, ("b", 1e-3): 2.25, ("b", 1e-2): math.nan}


class Trained(list):
    """The labels that were trained, in order, and the statements of each; `stop_at` a label, before it."""

    stop_at: str | None = None
    config = staticmethod(configurables.gin.config_str)  # what a run says that it was trained with

    def __init__(self) -> None:
        self.statements: dict[str, list[str]] = {}


@pytest.fixture
def trained(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Configs are read as ever; in place of training a folder is written."""
    result, bind = Trained(), configurables.bind

    def bind_only(experiment, configs, *, own):
        bind(experiment, configs, own=own)

        def run(run: str, label: str) -> dict:
            if label == result.stop_at:
                raise Interrupted("stopped")
            result.append(label)
            result.statements[label] = list(own)
            arm, rate = re.match(r"(\w)(?:-lr([\d.e-]+?))?(?:-seed\d)?$", label).groups()
            loss = LOSSES[arm, 1e-3 if rate is None else float(rate)]
            Path(run).parent.mkdir(exist_ok=True)
            make_run(label, loss=loss, config=result.config()).rename(run)
            return module.last_validation(Path(run))

        return run

    monkeypatch.setattr(module.configurables, "bind", bind_only)
    return result


def compare(folder: Path, arms=None, **options):
    arms = {"a": {"model.width": 16}, "b": {"model.width": 32}} if arms is None else arms
    return compare_arms(folder, arms, command="it", title="Compared", **options)


def test_every_arm_tries_all_rates_with_seed_0_and_goes_on_with_its_best(trained, tmp_path):
    outcomes = compare(tmp_path / "runs", learning_rates=[1e-3, 1e-2], seeds=2)
    of_a = ["a-lr0.001-seed0", "a-lr0.01-seed0", "a-lr0.01-seed1"]
    assert trained == [*of_a, "b-lr0.001-seed0", "b-lr0.01-seed0", "b-lr0.001-seed1"]
    assert outcomes["a"].learning_rate == 1e-2
    assert outcomes["a"].sweep == {1e-3: 2.5, 1e-2: 2.0}
    assert outcomes["b"].learning_rate == 1e-3
    assert math.isnan(outcomes["b"].sweep[1e-2])
    assert [path.name for path in outcomes["b"].runs] == ["b-lr0.001-seed0", "b-lr0.001-seed1"]
    assert [record["loss"] for record in outcomes["b"].records] == [2.25, 2.25]
    summary = json.loads((tmp_path / "runs" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert [arm["losses"] for arm in summary] == [[2.0, 2.0], [2.25, 2.25]]
    assert summary[1]["sweep"] == {"0.001": 2.25, "0.01": None}
    assert (tmp_path / "runs" / "report" / "report.html").exists()


@pytest.mark.parametrize(("seeds", "labels"), [(1, ["a", "b"]), (2, ["a-seed0", "a-seed1", "b-seed0", "b-seed1"])])
def test_folders_say_only_what_varies(trained, tmp_path, seeds, labels):
    outcomes = compare(tmp_path / "runs", seeds=seeds)
    assert trained == labels
    assert outcomes["a"].learning_rate is None
    assert outcomes["a"].sweep == {}


def test_a_finished_run_is_never_run_again(trained, tmp_path):
    options = {"learning_rates": [1e-3, 1e-2], "seeds": 2}
    trained.stop_at = "b-lr0.01-seed0"
    with pytest.raises(Interrupted):
        compare(tmp_path / "runs", **options)
    assert not (tmp_path / "runs" / "comparison.json").exists()
    before, trained.stop_at = list(trained), None
    outcomes = compare(tmp_path / "runs", **options)
    assert trained == [*before, "b-lr0.01-seed0", "b-lr0.001-seed1"]
    again = compare(tmp_path / "runs", **options)
    assert [outcome.runs for outcome in again.values()] == [outcome.runs for outcome in outcomes.values()]
    assert len(trained) == 6


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"bindings": ["model.layers = 2"]}, "model.layers was 1 and is now 2"),
        ({"common": {"train.total_examples": 128}}, "train.total_examples was 64 and is now 128"),
        ({"configs": ["lm_30m.gin"]}, "model.preset was 'debug' and is now '30m'"),
        ({"arms": {"a": {"model.width": 24}}}, "model.width was 16 and is now 24"),
    ],
)
def test_a_run_of_another_configuration_is_refused(trained, tmp_path, change, name):
    same = {
        "arms": {"a": {"model.width": 16}},
        "bindings": ["model.layers = 1"],
        "common": {"train.total_examples": 64},
        "configs": ["debug.gin"],
    }
    compare(tmp_path / "runs", **same)
    with pytest.raises(UserError, match=f"runs/a can't go on: .*{name}"):
        compare(tmp_path / "runs", **same | change)
    assert trained == ["a"]
    compare(tmp_path / "runs", **same)
    assert trained == ["a"]


def test_statements_stand_in_order_and_the_users_pass(trained, tmp_path):
    common = {"TOTAL_EXAMPLES": 64, "train.total_examples": Macro("TOTAL_EXAMPLES")}
    compare(
        tmp_path / "runs", bindings=["model.layers = 1"], common=common, learning_rates=[1e-3], configs=["lm_30m.gin"]
    )
    assert trained.statements["b-lr0.001-seed0"] == [
        "TOTAL_EXAMPLES = 64",
        "train.total_examples = %TOTAL_EXAMPLES",
        "train.seed = 0",
        "model.width = 32",
        "model.layers = 1",
        "LEARNING_RATE = 0.001",
    ]


def test_a_value_may_depend_on_the_seed_and_on_the_earlier_arms_run_of_the_same_seed(trained, tmp_path):
    trials = []

    def width(trial: Trial) -> int:
        trials.append(trial)
        assert module.last_validation(trial.before["a"])["loss"] == 2.0
        return 16 + 2 * trial.seed

    arms = {"a": {}, "b": {"model.width": width}}
    compare(tmp_path / "runs", arms, learning_rates=[1e-3, 1e-2], seeds=2)
    assert [(trial.arm, trial.learning_rate, trial.seed, trial.folder.name) for trial in trials] == [
        ("b", 1e-3, 0, "b-lr0.001-seed0"),
        ("b", 1e-2, 0, "b-lr0.01-seed0"),
        ("b", 1e-3, 1, "b-lr0.001-seed1"),
    ]
    assert [trial.before["a"].name for trial in trials] == ["a-lr0.01-seed0", "a-lr0.01-seed0", "a-lr0.01-seed1"]
    assert "model.width = 18" in trained.statements["b-lr0.001-seed1"]


def test_a_user_binds_nothing_that_the_comparison_binds(trained, tmp_path):
    for statement, options, message in (
        ("model.width = 8", {}, "it sets model.width itself: give --width 8 instead of --set"),
        ("train.seed = 1", {}, "it sets train.seed itself: give --seeds N instead of --set"),
        ("LEARNING_RATE = 1", {"learning_rates": [1e-3]}, "it sets LEARNING_RATE itself: give --learning-rates 1"),
        ("schedules.linear.peak = 1", {"learning_rates": [1e-3]}, "sets LEARNING_RATE by --learning-rates, which noth"),
    ):
        with pytest.raises(UserError, match=message):
            compare(tmp_path / "runs", bindings=[statement], options={"model.width": "--width"}, **options)
    assert trained == []
    compare(tmp_path / "runs", bindings=["LEARNING_RATE = 1"])
    assert "LEARNING_RATE = 1" in trained.statements["a"]
