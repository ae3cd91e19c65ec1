"""A run's guard on planted bad batches: it finds them and no others, and goes back, again and again the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo import optim, parallel
from crescendo.experiments.data.rows import Shuffled
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.recorder import Recorder
from crescendo.experiments.trainer.training import train
from crescendo.experiments.trainer.watching import Watch
from crescendo.models import ModelConfig

VOCAB, LENGTH, BATCH, STEPS = 32, 16, 8, 200
MODEL = ModelConfig(vocab_size=VOCAB, width=16, layers=1, heads=2, kv_heads=1, mlp_width=32)
GUARD = {"window": 32, "z": 8.0}


class Chain:
    """Rows of a chain in which nine of ten tokens follow from the one before; a function of their number.

    Args:
      planted: by step, "noise" (random tokens) or "labels" (shuffled ones), for all of the step's rows.
    """

    vocab_size, sequence_length, fingerprint, tokenizer = VOCAB, LENGTH, "chain", None

    def __init__(self, planted: dict[int, str] | None = None):
        self.train, self.held_out = self, {"validation": self}
        order = Shuffled(len(self), seed=0)(range(BATCH * STEPS))
        planted = {} if planted is None else planted
        self._planted = {int(order[BATCH * step + i]): kind for step, kind in planted.items() for i in range(BATCH)}

    def __len__(self) -> int:
        return 65536

    def take(self, row_numbers) -> dict[str, np.ndarray]:
        rows = [self._row(int(number)) for number in np.asarray(row_numbers)]
        tokens, labels = (np.stack(each).astype(np.int32) for each in zip(*rows, strict=True))
        ones = np.ones_like(tokens)
        return {"tokens": tokens, "labels": labels, "segment_ids": ones, "positions": ones * np.arange(LENGTH)}

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        random, kind = np.random.default_rng(number), getattr(self, "_planted", {}).get(number)
        tokens = np.zeros(LENGTH + 1, np.int64)
        for i in range(LENGTH):
            tokens[i + 1] = (5 * tokens[i] + 7) % VOCAB if random.random() < 0.9 else random.integers(VOCAB)
        if kind == "noise":
            tokens = random.integers(VOCAB, size=LENGTH + 1)
        labels = tokens[1:].copy()
        if kind == "labels":
            random.shuffle(labels)
        return tokens[:-1], labels


def run(folder, planted=None, *, devices: int = 1, steps: int = STEPS, **options) -> dict:
    """A short run; the last validation record."""
    given = {
        "optimizer": optim.adamw(1e-2, weight_decay=0.0),
        "guard": optim.guard(**GUARD),
        "checkpoint_every_examples": 20 * BATCH,
        "evaluate_every_examples": STEPS * BATCH,
        "evaluation_examples": 64,
        "mesh": parallel.make_mesh(devices=jax.devices()[:devices]),
    }
    return train(
        run=str(folder),
        data=Chain(planted),
        model=MODEL,
        batch_size=BATCH,
        total_examples=steps * BATCH,
        **given | options,
    )


def skipped_steps(folder) -> list[int]:
    """The steps, from 0 on, that were left out."""
    train_records = read_run(folder).train
    return (train_records["step"][np.diff(train_records["skipped_steps"], prepend=0) > 0] - 1).astype(int).tolist()


PLANTED = {90: "noise", 120: "labels", 121: "noise", 150: "labels"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run without bad batches, and its last validation."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    return folder, run(folder)


@pytest.mark.slow
def test_planted_batches_are_left_out_and_no_others(clean, tmp_path):
    folder = tmp_path / "run"
    last = run(folder, PLANTED)
    assert skipped_steps(folder) == list(PLANTED)
    assert skipped_steps(clean[0]) == []
    # Four updates less of 200 is all the difference.
    assert last["loss"] == pytest.approx(clean[1]["loss"], abs=0.02)
    warned = [event for event in read_run(folder).events if "first_example" in event]
    assert [(event["first_example"], event["last_example"]) for event in warned] == [
        (BATCH * step, BATCH * step + BATCH - 1) for step in PLANTED
    ]
    assert "the guard found an outlier" in warned[0]["message"]
    assert "examples 720 to 727" in warned[0]["message"]


def wild(begin: int, end: int) -> optax.GradientTransformation:
    """AdamW whose updates from one step to another are a thousand times too long; loss and gradient are as usual."""

    def update(updates, state, params=None, *, examples_seen, **extra):
        factor = jnp.where((examples_seen > BATCH * begin) & (examples_seen < BATCH * end), 1000.0, 1.0)
        return jax.tree.map(lambda u: factor * u, updates), state

    factor = optax.GradientTransformationExtraArgs(lambda params: (), update)
    return optax.chain(optim.adamw(1e-2, weight_decay=0.0), factor)


WILD = wild(100, 101)


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory):
    """A run that a wild update ruins, and that goes back."""
    folder = tmp_path_factory.mktemp("back") / "run"
    return folder, run(folder, optimizer=WILD)


def rollbacks(folder) -> list[dict]:
    return [event for event in read_run(folder).events if event["kind"] == "rollback"]


@pytest.mark.slow
def test_a_ruined_run_goes_back_and_on_past_the_examples(clean, gone_back):
    folder, last = gone_back
    (event,) = rollbacks(folder)
    # Steps 101 to 105 are left out, and the 106th was on its way.
    assert (event["to"], event["first_example"], event["last_example"]) == (100 * BATCH, 100 * BATCH, 107 * BATCH - 1)
    assert skipped_steps(folder) == [101, 102, 103, 104, 105, 106]
    # The clock went on, and the loss is that of a run which never saw those examples.
    assert last["examples_seen"] == STEPS * BATCH
    assert last["loss"] == pytest.approx(clean[1]["loss"], abs=0.03)


def everything(folder) -> list[dict]:
    """The records without what the clock on the wall decides."""
    timed = {"seconds", "tokens_per_second", "mfu"}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if name not in timed} for line in lines if line["kind"] != "time"
    ]


class KilledError(Exception):
    """Stands for a SIGKILL."""


@pytest.mark.slow
@pytest.mark.parametrize("at", [105, 107, 108])
def test_a_run_that_is_killed_about_its_way_back_does_the_same_again(gone_back, tmp_path, monkeypatch, at):
    folder, step = tmp_path / "run", Recorder.step

    def kill(self, clock, *rest):
        if clock.steps == at:
            raise KilledError
        return step(self, clock, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "step", kill)
        with pytest.raises(KilledError):
            run(folder, optimizer=WILD)
    run(folder, optimizer=WILD)
    assert everything(folder) == everything(gone_back[0])


@pytest.mark.slow
def test_past_a_damaged_checkpoint_it_goes_back_to_the_one_before(tmp_path, monkeypatch):
    folder, go_back = tmp_path / "run", Watch.go_back

    def damage(self, *arguments):
        self.checkpoints.wait()
        for path in (folder / "checkpoints" / f"{100 * BATCH}" / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"\0" * path.stat().st_size)
        return go_back(self, *arguments)

    monkeypatch.setattr(Watch, "go_back", damage)
    run(folder, optimizer=WILD)
    assert [event["to"] for event in rollbacks(folder)] == [80 * BATCH]
    (said,) = (event for event in read_run(folder).events if "is damaged" in event.get("message", ""))
    assert "800 is damaged" in said["message"]


@pytest.mark.slow
def test_two_devices_decide_alike(gone_back, tmp_path):
    run(tmp_path / "run", optimizer=WILD, devices=2)
    assert rollbacks(tmp_path / "run") == rollbacks(gone_back[0])


@pytest.mark.slow
def test_a_run_that_stays_ruined_gives_up_and_names_what_is_good(tmp_path):
    """Every update from the 100th on is wild."""
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"gone back 2 times \(max_rollbacks\).*start_from = '.*run@800'") as stopped:
        run(folder, optimizer=wild(100, 200), guard=optim.guard(**GUARD, max_rollbacks=2))
    assert "\n" not in str(stopped.value)
    assert [event["to"] for event in rollbacks(folder)] == [800, 640]


@pytest.mark.slow
def test_without_a_checkpoint_from_before_it_gives_up_as_a_run_without_a_guard(tmp_path):
    planted = dict.fromkeys(range(60, 100), "noise")
    with pytest.raises(UserError, match=r"in 10 steps in a row .* there is no checkpoint from before"):
        run(tmp_path / "run", planted, checkpoint_every_examples=190 * BATCH)


def test_a_guard_that_would_never_go_back_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"after 9 steps in a row .*max_bad_steps = 10 .* raise that to 11"):
        run(tmp_path / "run", guard=optim.guard(patience=9))
    assert not (tmp_path / "run").exists()
