"""Whether a run is well, by its records; and that what went wrong leaves the checkpoints from before."""

import json
import math

import jax
import numpy as np
import pytest

from crescendo.experiments.runs import trained
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.health import LEVEL_STEPS, Health, Level

BATCH = 8


def due(start: int, end: int) -> bool:
    """Every 20 steps."""
    return end // 160 > start // 160


class Curve:
    """A run's training records, one a step; `health` follows them as they are made."""

    def __init__(self):
        self.records: list[dict] = []
        self.health = Health(due)
        self.said: list[str] = []
        self.skipped = 0
        self.random = np.random.default_rng(0)

    def steps(self, count: int, loss=3.0, update=1.0, *, skip: bool = False) -> "Curve":
        for _ in range(count):
            seen = BATCH * (len(self.records) + 1)
            self.skipped += skip
            values = {
                "loss": math.inf if skip else loss * (1 + 0.02 * self.random.standard_normal()),
                "update_norm": update * (1 + 0.1 * self.random.standard_normal()),
                "skipped_steps": self.skipped,
            }
            if said := self.health.step(seen, BATCH, values):
                self.said.append(said)
            at = {"kind": "train", "examples_seen": seen, "batch_size": BATCH}
            self.records.append(at | {name: x if math.isfinite(x) else None for name, x in values.items()})
        return self

    @property
    def seen(self) -> int:
        return BATCH * len(self.records)


def replayed(curve: Curve) -> Health:
    """From the records as a file gives them back."""
    return Health.of(json.loads(json.dumps(curve.records)), curve.seen, due)


def test_a_usual_curve_has_no_episode():
    curve = Curve()
    for step in range(1000):  # a warmup of the rate, a falling loss, a batch that grows
        curve.steps(1, 2 + 4 * math.exp(-step / 200), min(1, (step + 0.5) / 100) * (1 if step < 500 else 2))
    assert curve.health.began_at is None
    assert curve.health.keep([160, 7680, 7840, 8000], 2) == {7840, 8000}
    assert not curve.said


@pytest.mark.parametrize(
    ("wrong", "kept_up_to", "said"),
    [
        ({"skip": True}, 800, "a step was skipped"),
        ({"loss": 30.0}, 799, "the loss has jumped from 2.9"),
        ({"update": 100.0}, 800, None),
    ],
)
def test_an_episode_keeps_what_was_saved_before_it(wrong, kept_up_to, said):
    curve = Curve().steps(100)
    curve.steps(7, **wrong)
    assert curve.health.began_at == kept_up_to
    assert (curve.said == []) if said is None else curve.said[0].startswith(said)
    assert len(curve.said) <= 1
    saved = [160, 480, 640, 800, 808, 840]  # the last two in the episode
    newest = [at for at in saved if at <= kept_up_to]
    assert curve.health.keep(saved, 2) == set(newest[-2:])
    # Once it is over, the newest stays until the next.
    assert curve.steps(LEVEL_STEPS).health.ill is False
    assert curve.health.keep([*saved, 1368], 2) == {newest[-1], 640, 800}
    curve.steps(20)
    assert curve.health.keep([*saved, 1440], 1) == {newest[-1], 1440}
    curve.steps(1, skip=True)
    assert curve.health.keep([*saved, 1440], 1) == {1440}
    assert replayed(curve) == curve.health


def test_of_a_run_that_never_comes_back_the_good_checkpoint_stays():
    curve = Curve().steps(100, 2.0)
    curve.steps(1, 2.0, update=1e6).steps(200, 5.0)  # updates as usual, and a loss less than 3 times as high
    assert (curve.health.ill, curve.health.is_worse) == (False, True)
    curve.steps(1, skip=True)
    assert curve.health.keep([800, 1600, 2240, 2400], 1) == {800, 2400}
    curve.steps(400, 1.9)
    assert not curve.health.is_worse
    curve.steps(1, skip=True)
    assert curve.health.keep([800, 5440, 5600], 1) == {5600}
    assert replayed(curve) == curve.health


def test_larger_updates_that_do_no_harm_are_a_new_level():
    curve = Curve().steps(100).steps(LEVEL_STEPS - 1, update=10.0)
    assert curve.health.ill
    curve.steps(LEVEL_STEPS, update=10.0)
    assert (curve.health.ill, curve.health.is_worse, curve.said) == (False, False, [])


def test_early_on_only_what_lies_far_above_is_a_jump():
    level = Level()
    for value in (1.0, 2.0, 3.0):  # a warmup
        assert not level.jumped(value)
        level.add(value)
    assert not level.jumped(20.0)
    assert level.jumped(100.0)
    assert not level.jumped(math.nan)


def test_records_of_before_there_were_norms_of_updates():
    records = [
        {"kind": "train", "examples_seen": 8 * i, "batch_size": 8, "loss": 3.0, "skipped_steps": int(i > 20)}
        for i in range(1, 31)
    ]
    assert Health.of(records, 240).began_at == 160
    assert Health.of(records, 160) == Health.of(records[:20], 240)


def checkpoints(run) -> dict[int, float]:
    """The largest entry of the parameters of every checkpoint."""
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    return {at: max(float(np.abs(x).max()) for x in jax.tree.leaves(trained.load(run, at).parameters)) for at in steps}


@pytest.mark.slow
def test_a_rate_beyond_all_bounds_leaves_what_was_saved_before_it(train_small, tmp_path, capsys):
    """After 256 good examples; parameters and losses stay finite, so that each save is one more that looks sound."""
    run, often = tmp_path / "run", ("train.checkpoint_every_examples = 32", "train.evaluate_every_examples = 4096")
    train_small(run, "train.total_examples = 256", *often)
    # A step of a million, and sound ones again: skipped, since nothing has a gradient any more.
    wild = ("schedules.linear.peak = 1e6", "train.max_bad_steps = 8")
    with pytest.raises(UserError, match=rf"checkpoint from before is kept \(train.start_from = '{run}@256' in another"):
        train_small(run, *often, *wild)
    kept = checkpoints(run)
    assert list(kept)[:2] == [224, 256]
    assert max(kept[224], kept[256]) < 10 < 1e5 < kept[max(kept)]
    warned = [event["message"] for event in read_run(run).events if event["kind"] == "warning"]
    assert sum("newest checkpoint up to 256 examples is from before" in message for message in warned) == 1
    # The same command finds the same, and takes nothing away.
    with pytest.raises(UserError, match=f"{run}@256"):
        train_small(run, *often, *wild)
    assert {224, 256} <= checkpoints(run).keys()


@pytest.mark.slow  # the rule is seen above, and the one run shows that it is asked
def test_updates_that_are_not_finite_leave_what_was_saved_before_them(train_small, tmp_path):
    run = tmp_path / "run"
    rule = ("train.optimizer = @optax.adamw()", "optax.adamw.learning_rate = 1e-3", "optax.adamw.b2 = -1.0")
    with pytest.raises(UserError, match=f"'{run}@16'"):
        train_small(run, *rule, "train.checkpoint_every_examples = 16")
    kept = checkpoints(run)
    assert 16 in kept
    assert all(map(math.isfinite, kept.values()))


def test_steps_that_were_skipped_before_the_records_were_lost_begin_no_episode():
    health = Health.of([], 800)
    values = {"loss": 3.0, "update_norm": 1.0, "skipped_steps": 5, "skipped_in_a_row": 0}
    assert health.step(808, BATCH, values) is None
    assert not health.ill
    assert health.step(816, BATCH, values | {"skipped_steps": 6, "skipped_in_a_row": 1}) == "a step was skipped"
    assert health.began_at == 808
