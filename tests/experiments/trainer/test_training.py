"""What a run can be asked for besides: probes, groups, averages, the best checkpoint, another run's state."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo import optim, parallel
from crescendo.experiments.benchmarks.profile import spans_of_cpu
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.reports.compare import compare
from crescendo.experiments.reports.seconds import spent
from crescendo.experiments.reports.write import _bindings
from crescendo.experiments.runs import trained
from crescendo.experiments.runs.checkpoint import Checkpoints
from crescendo.experiments.runs.records import read_records
from crescendo.experiments.runs.run import is_complete, read_run
from crescendo.experiments.runs.state import Clock
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import Interrupted
from crescendo.experiments.sweeps.finished import is_finished
from crescendo.experiments.tasks.base import Context
from crescendo.experiments.trainer import loop, step_trace
from crescendo.experiments.trainer import recorder as recorder_module
from crescendo.experiments.trainer import session as session_module
from crescendo.experiments.trainer.frozen import Trainable
from crescendo.experiments.trainer.optimizer_checks import climbs
from crescendo.experiments.trainer.recorder import Recorder
from crescendo.experiments.trainer.session import Session, session_options
from crescendo.experiments.trainer.starting import state_of
from crescendo.experiments.trainer.step_trace import StepTrace
from crescendo.experiments.trainer.stopping import Stops
from crescendo.experiments.trainer.training import make_recorder, train
from crescendo.models import ModelConfig
from crescendo.models.resnet import ResNetConfig

SMALL = ModelConfig(vocab_size=128, width=16, layers=1, heads=4, kv_heads=2, mlp_width=32)


def one_device():
    return parallel.make_mesh(devices=jax.devices()[:1])


def staged(stages: int, **options) -> dict:
    """The options of a session over so many stages."""
    mesh = parallel.make_mesh(data=1, stage=stages, devices=jax.devices()[:stages])
    return {"mesh": mesh, "model": dataclasses.replace(SMALL, layers=4)} | options


def small_session(**options) -> Session:
    """A session of random text on one device."""
    given = {"model": SMALL, "optimizer": optim.adamw(1e-2), "batch_size": 8, "total_examples": 64}
    return Session(data=RandomText(128, 16), **{**given, "mesh": one_device(), **options})


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "traced"), [(2, 2), (100, 5)], ids=["some", "to the end"])
def test_steps_are_traced_for_the_usual_viewers(tmp_path, monkeypatch, steps, traced):
    session, said, records = small_session(), [], []
    ticks, real = itertools.count(), step_trace.traced
    seconds = {"away": 0.0}
    now = lambda: seconds["away"] + 1e-3 * next(ticks)  # noqa: E731
    monkeypatch.setattr(recorder_module, "time", SimpleNamespace(perf_counter=now))

    @contextlib.contextmanager
    def slow(folder):
        seconds["away"] += 100
        with real(folder):
            yield
        seconds["away"] += 100

    monkeypatch.setattr(step_trace, "traced", slow)
    with StepTrace(tmp_path / "profile", steps, said.append) as trace:
        loop.run(
            session,
            session.fresh_state(),
            Clock(batch_size=8),
            end=64,
            recorder=make_recorder(session, records.append),
            trace=trace,
        )
    assert records[-1]["seconds"] < 1  # of training, without the profiler's own
    assert said == [f"profile of {traced} steps: see it with tensorboard --logdir {tmp_path}/profile, or xprof"]
    ran = collections.Counter(span.instruction for span in spans_of_cpu(tmp_path / "profile"))
    assert traced in ran.values()  # instructions outside of loops, each on one thread


def test_a_profile_that_has_no_place_says_that_alone(tmp_path):
    (tmp_path / "profile").touch()
    said: list[str] = []
    trace = StepTrace(tmp_path / "profile", 2, said.append)
    for _ in range(step_trace.BEFORE):
        trace.before_step(lambda: None)
    with pytest.raises(UserError, match=r"^cannot write .*/profile: File exists"), trace:
        trace.before_step(lambda: None)
    assert said == []


def run(session: Session, end: int | None = None):
    """The state at the end, and the records."""
    records: list[dict] = []
    state, _ = loop.run(
        session,
        session.fresh_state(),
        Clock(batch_size=session.policy.sizes[0]),
        end=session.total_examples if end is None else end,
        recorder=make_recorder(session, records.append),
    )
    return state, [record for record in records if record["kind"] == "train"]


@pytest.fixture(scope="module")
def asked(train_small, tmp_path_factory):
    """A run that asks for everything at once; its folder and its last validation record."""
    folder = tmp_path_factory.mktemp("asked") / "run"
    return folder, train_small(
        folder,
        "train.probes = [@parameter_norms()]",
        "parameter_norms.every_examples = 128",
        "train.keep_best_checkpoint = True",
        "train.keep_last_checkpoints = 1",
        "train.average_examples = 64",
        "train.groups = [@tables/group(), @slow/group()]",
        "tables/group.axis = 'vocab'",
        "tables/group.frozen = True",
        "slow/group.path = 'blocks/mlp/*'",
        "slow/group.learning_rate = 0.5",
        "slow/group.weight_decay = 0.0",
        "train.evaluate_every_examples = 64",
        "train.total_examples = 300",
        "train.checkpoint_every_examples = 256",
    )


def test_a_probe_looks_and_changes_nothing(asked):
    records = [record for record in read_records(asked[0] / "metrics.jsonl") if record["kind"] == "probe"]
    assert [record["examples_seen"] for record in records] == [128, 256, 288]
    assert records[0]["norm/blocks/mlp/up/kernel"] > 0


def test_frozen_parameters_stay_and_have_no_optimizer_state(asked):
    names = [record for record in read_records(asked[0] / "metrics.jsonl") if record["kind"] == "probe"]
    assert len({record["norm/embedding/table"] for record in names}) == 1
    assert len({record["norm/blocks/mlp/up/kernel"] for record in names}) > 1
    arrays = json.loads((asked[0] / "run.json").read_text())["fixed"]["arrays"]
    assert not [name for name in arrays if name.startswith(".opt_state") and "embedding" in name]
    assert [name for name in arrays if name.startswith(".parameters") and "embedding" in name]


def test_the_best_checkpoint_stays_and_the_average_is_what_is_used(asked):
    folder, last = asked
    validations = [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == "validation"]
    best = min(validations, key=lambda record: record["loss"])["examples_seen"]
    with Checkpoints(folder / "checkpoints") as checkpoints:
        saved = checkpoints.saved()
    assert best in saved
    assert last["examples_seen"] in saved
    assert len(saved) <= 2
    model = trained.load(folder)
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert (newest / "evaluation").is_dir()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(model.parameters))


def test_a_length_that_is_no_whole_number_of_microbatches_ends_the_schedule_too(asked, capsys):
    # 300 examples in microbatches of 16: the run and its schedule end at 288.
    run_of = read_run(asked[0])
    assert run_of.info["total_examples"] == 288
    middle = run_of.train["examples_seen"] - run_of.train["batch_size"] / 2
    expected = 1e-2 * np.where(middle < 64, middle / 64, (288 - middle) / (288 - 64))
    np.testing.assert_allclose(run_of.train["learning_rate"], expected, rtol=1e-4)


def test_a_run_says_where_its_seconds_went(asked):
    where = spent(read_run(asked[0]))
    assert where is not None
    assert min(where.compiling, where.evaluating, where.saving, where.other) > 0
    assert where.lost == 0
    assert sum(where[1:-1]) == pytest.approx(where.total)
    assert 0 < where.goodput < 1


@pytest.mark.slow
def test_speed_is_not_identity(asked, train_small):
    """The finished run is recognised under another scan, remat and dtype."""
    folder, last = asked
    config = folder / "config.gin"
    bound = configurables.bind(train, [str(config)], ["model.scan_layers = True", "model.remat = 'full'"])
    assert bound(run=str(folder)) == last


@pytest.mark.slow
def test_a_run_starts_from_another_ones_state_and_clock(train_small, tmp_path):
    stable = tmp_path / "stable"
    shape = ("adamw.learning_rate = @schedules.wsd()", "schedules.wsd.peak = 1e-2", "schedules.wsd.warmup = 64")
    train_small(stable, *shape, "schedules.wsd.decay = 0", "train.keep_checkpoints_at_examples = [256]")
    annealed = tmp_path / "annealed"
    start = f"train.start_from = '{stable}@256'"
    train_small(annealed, *shape, start, "train.total_examples = 384", "schedules.wsd.decay = 128")
    first, second = read_run(stable).train, read_run(annealed).train
    assert second["examples_seen"][0] == 272
    assert second["step"][0] == 17
    assert first["learning_rate"][-1] == pytest.approx(1e-2)
    middle = second["examples_seen"] - 8
    np.testing.assert_allclose(second["learning_rate"], 1e-2 * (384 - middle) / 128, rtol=1e-4)
    # The same rows as the run that it left.
    np.testing.assert_allclose(second["loss"][0], first["loss"][16], rtol=1e-5)
    session = Session(**session_options(configurables.arguments(train)) | {"mesh": one_device()})
    for wrong, message in {
        f"{stable}": "must be RUN@EXAMPLES",
        f"{stable}@100": "no checkpoint at 100 examples",
        f"{stable}@384": "at or past the end",
    }.items():
        with pytest.raises(UserError, match=message):
            state_of(wrong, session)


@pytest.mark.slow
def test_an_update_that_is_not_finite_changes_no_parameter_and_is_counted():
    def poisoned(updates, state, params=None):
        return jax.tree.map(lambda u: jnp.where(state == 1, jnp.nan, -0.01 * u), updates), state + 1

    optimizer = optax.GradientTransformation(lambda params: jnp.int32(0), poisoned)
    session = small_session(optimizer=optimizer)
    state, feed, skipped, before = session.fresh_state(), session.feed(), [], None
    for step in range(3):
        if step == 1:
            before = jax.device_get(state.parameters)
        state, metrics = session.step(state, feed.read(8 * step, 8))
        skipped.append(int(metrics["skipped_steps"]))
        if step == 1:
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.parameters), before)
    assert skipped == [0, 1, 1]
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(state.parameters), jax.tree.leaves(before), strict=True))


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_never_saved(train_small, tmp_path):
    """A decay beyond all bounds: the update overflows while loss and gradient are finite."""
    run_folder = tmp_path / "run"
    poison = ("train.optimizer = @optim.chain()", "optim.chain.transforms = [@sgd(), @optax.scale(), @optax.trace()]")
    factor = ("sgd.learning_rate = 1.0", "optax.scale.step_size = 1e38", "optax.trace.decay = 0.9")
    with pytest.raises(UserError, match=r"in 3 steps in a row|not finite at"):
        train_small(run_folder, *poison, *factor, "train.max_bad_steps = 3", "train.checkpoint_every_examples = 16")
    kept = trained.load(run_folder).parameters
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))


@functools.cache
def session_of(batch_size: int) -> Session:
    options = {"optimizer": optim.sgd(1e-2), "base_batch_size": 4, "max_microbatch_examples": 16}
    return small_session(batch_size=batch_size, total_examples=72, **options)


@functools.cache
def fresh_state_of(batch_size: int):
    return jax.device_get(session_of(batch_size).fresh_state())


@pytest.mark.parametrize("skipped", [False, True], ids=["", "steps skipped"])
@pytest.mark.parametrize(
    ("before", "after", "seen", "steps"),
    [
        (4, 16, 12, 3),
        (4, 16, 60, 0),
        *(pytest.param(16, 4, *rest, marks=pytest.mark.slow) for rest in ((72, 0), (32, 10))),
    ],
)
def test_what_was_pending_fits_another_batch_size(before, after, seen, steps, skipped):
    """Clock and state of a run in batches of `before`: from the first step on the batch is `after`, to the end.

    Steps that are skipped decide nothing, so that the state goes on holding the other size.
    """
    session, records = session_of(after), []
    state = jax.device_put(fresh_state_of(before), session_of(before).shardings)
    if skipped:
        state = dataclasses.replace(state, parameters=jax.tree.map(lambda x: x * jnp.nan, state.parameters))
    clock, end = Clock(examples_seen=seen, batch_size=before), session.end_from(seen)
    recorder = make_recorder(session, records.append)
    _, clock = loop.run(session, state, clock, end=end, recorder=recorder, max_bad_steps=100)
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["batch_size"] for record in trained] == [after] * steps
    assert [record["microbatches"] for record in trained] == [after // session.plan.microbatch_examples] * steps
    assert clock.examples_seen == end == seen + steps * after
    if not skipped:
        assert [record["learning_rate"] for record in trained] == pytest.approx([1e-2 * (after / 4) ** 0.5] * steps)


STOPS = {  # of a run of 512 examples in batches of 16, rows of 32 tokens
    "train.stop_after_tokens = 4097": (144, r"4,608 tokens reached train.stop_after_tokens = 4,097"),
    "train.stop_at_loss = 4.5": (192, r"validation loss 4[.]\d+ reached train.stop_at_loss = 4.5"),
    "train.stop_after_minutes = 2": (112, r"[\d.]+ minutes of training reached train.stop_after_minutes = 2"),
}


@pytest.fixture
def slow_clock(monkeypatch):
    """Every step takes 20 seconds more."""
    step = Recorder.step

    def slow(self, *arguments):
        self.seconds += 20
        return step(self, *arguments)

    monkeypatch.setattr(Recorder, "step", slow)


# Their rules are quick to see by themselves (`test_stops_look_at_the_clock_and_its_validation`).
SLOW_STOPS = [pytest.param(stop, marks=() if "tokens" in stop else pytest.mark.slow) for stop in STOPS]


@pytest.mark.parametrize("stop", SLOW_STOPS)
def test_a_run_ends_where_its_stop_is_evaluated_saved_and_done(
    train_small, whole, tmp_path, records, capsys, stop, slow_clock
):
    folder, (end, reason) = tmp_path / "run", STOPS[stop]
    stopped = ("train.evaluate_every_examples = 64", stop)
    last = train_small(folder, *stopped)
    said = capsys.readouterr().out
    assert re.search(rf"ended at {end} of 512 examples: {reason}", said), said
    info = json.loads((folder / "run.json").read_text())
    assert (last["examples_seen"], info["total_examples"], info["total_tokens"]) == (end, end, 32 * end)
    assert re.fullmatch(reason, info["ended"])
    assert trained.load(folder).examples_seen == end
    assert is_complete(folder)
    assert [arm.done for arm in compare([read_run(folder)])] == [1.0]
    # The same command says that it is done, and changes nothing.
    before = (folder / "metrics.jsonl").read_bytes(), (folder / "run.json").read_bytes()
    assert train_small(folder, *stopped) == last
    assert re.search(rf"is complete \({reason}\)", capsys.readouterr().out)
    assert ((folder / "metrics.jsonl").read_bytes(), (folder / "run.json").read_bytes()) == before
    # Without the stop it goes on, as the run that never had one.
    train_small(folder, stopped[0])
    assert json.loads((folder / "run.json").read_text())["ended"] == "512 examples, its whole length"
    steps = [[record for record in records(run) if record["kind"] == "train"] for run in (folder, whole)]
    assert steps[0] == steps[1]
    setting = next(event for event in read_run(folder).events if event["kind"] == "setting")
    assert (setting["name"], setting["to"], setting["examples_seen"]) == (stop.split(" = ")[0], "None", end)


@pytest.fixture(scope="module")
def whole(train_small, tmp_path_factory):
    """The folder of a run without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_small(folder, "train.evaluate_every_examples = 64")
    return folder


def test_a_signal_before_the_last_evaluation_of_a_stopped_run_leaves_it_to_the_same_command(
    train_small, tmp_path, monkeypatch
):
    folder, step = tmp_path / "run", Recorder.step

    def interrupt(self, clock, *rest):
        if clock.examples_seen == 64:
            signal.raise_signal(signal.SIGTERM)
        return step(self, clock, *rest)

    monkeypatch.setattr(Recorder, "step", interrupt)
    with pytest.raises(Interrupted) as stopped:
        train_small(folder, "train.stop_after_tokens = 2048")
    assert stopped.value.exit_code == 143
    assert not is_complete(folder)
    assert train_small(folder, "train.stop_after_tokens = 2048")["examples_seen"] == 64
    assert is_complete(folder)


@pytest.mark.parametrize(
    ("stops", "said"),
    [
        ({}, None),
        ({"at_loss": 3.0}, "validation loss 3 reached train.stop_at_loss = 3"),
        ({"at_loss": 2.9}, None),
        ({"after_minutes": 1.5}, "1.5 minutes of training reached train.stop_after_minutes = 1.5"),
        ({"after_minutes": 1.6}, None),
        ({"after_tokens": 256}, "256 tokens reached train.stop_after_tokens = 256"),
        ({"after_tokens": 257}, None),
    ],
)
def test_stops_look_at_the_clock_and_its_validation(stops, said):
    task, clock = SimpleNamespace(unit="token", units_per_example=32), Clock(examples_seen=8)
    assert Stops(**stops).reason(task, clock, 90.0, {"examples_seen": 8, "loss": 3.0}) == said
    for earlier in ({}, {"examples_seen": 7, "loss": 3.0}, {"examples_seen": 8, "loss": math.nan}):
        assert Stops(at_loss=3.0).reason(task, clock, 90.0, earlier) is None


@pytest.mark.parametrize(
    ("task", "stops", "message"),
    [
        ("image", {"after_tokens": 8}, "train.stop_after_tokens = 8: this task counts images"),
    ],
)
def test_stops_of_another_unit_are_refused(task, stops, message):
    with pytest.raises(UserError, match=message):
        Stops(**stops).notes(SimpleNamespace(unit=task, units_per_example=1), 64)


def test_tokens_that_leave_the_schedule_unfinished_are_said_aloud():
    task = SimpleNamespace(unit="token", units_per_example=32)
    assert "for a shorter schedule, train.total_examples = 2" in Stops(after_tokens=64).notes(task, 8)[0]
    assert "lies past the run's 256 tokens" in Stops(after_tokens=256).notes(task, 8)[0]


@pytest.mark.slow
@pytest.mark.parametrize("validated", [False, True])
def test_a_run_that_another_batch_size_ends_is_validated_and_complete(train_small, tmp_path, capsys, validated):
    """No step is left where the run was stopped, short of its end."""
    folder, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    short = ("train.total_examples = 24", "schedules.linear.warmup = 8")
    train_small(folder, "train.batch_size = 8", *short)
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if validated or '"validation"' not in line))
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"total_examples": 36}))
    assert not is_complete(folder)
    longer = ("train.batch_size = 16", "train.max_microbatch_examples = 16", "train.total_examples = 36", *short[1:])
    validation = train_small(folder, *longer)
    assert "ends at 24 examples" in capsys.readouterr().out
    assert validation["examples_seen"] == 24
    assert is_complete(folder)
    assert train_small(folder, *longer)["loss"] == validation["loss"]
    assert "is complete" in capsys.readouterr().out


@pytest.mark.slow
def test_another_batch_size_is_taken_up_on_resuming_and_by_a_run_started_from_it(train_small, tmp_path):
    run_folder = tmp_path / "small"
    train_small(run_folder, "train.batch_size = 8", "train.total_examples = 128", devices=8)
    other = ("train.batch_size = 32", f"train.start_from = '{run_folder}@128'", "train.total_examples = 240")
    train_small(tmp_path / "large", *other, "train.max_microbatch_examples = 32", devices=8)
    record = read_run(tmp_path / "large").train
    assert record["batch_size"].tolist() == [32, 32, 32]
    assert record["examples_seen"].tolist() == [160, 192, 224]
    assert (record["loss"] > 0).all()
    assert (record["microbatches"] == 1).all()


@pytest.mark.slow
def test_policies_that_compare_microbatches_get_them():
    policy = optim.noise_scale_following(4, 16)
    assert small_session(batch_size=policy).plan.microbatch_examples == 2
    on_many = parallel.make_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
    with pytest.raises(UserError, match=r"batch_size = 4 over 4 devices can't be cut into 2 microbatches"):
        _ = small_session(batch_size=policy, mesh=on_many).plan
    # Where every shard keeps its own sum, its part is a microbatch to compare.
    apart = parallel.make_mesh(data=4, devices=jax.devices()[:4])
    assert small_session(batch_size=policy, mesh=apart).plan.microbatch_examples == 4


def test_axes_that_a_dense_model_has_no_use_for_are_refused():
    mesh = parallel.make_mesh(data=1, expert=2, devices=jax.devices()[:2])
    with pytest.raises(UserError, match="mesh expert = 2: this model has no experts"):
        small_session(mesh=mesh)


def test_a_schedule_that_ends_elsewhere_is_said_aloud_and_one_that_does_not_fit_is_refused(monkeypatch):
    # Both are known from the step's trace.
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: "the step")
    monkeypatch.setattr(session_module, "peak_bytes", lambda compiled: 0)
    session = small_session(optimizer=optim.adamw(optim.schedules.linear(1e-2, 640)))
    assert session.plan
    assert any("640" in note and "64" in note for note in session.notes)
    with pytest.raises(UserError, match="warmup"):
        _ = small_session(optimizer=optim.adamw(optim.schedules.linear(1e-2, warmup=64))).plan


@pytest.mark.slow
def test_the_power_schedule_is_capped_behind_the_batch():
    power = optim.schedules.power(0.02, tokens_per_count=16)
    policy = optim.staged([8, 32], starts_examples=[0, 8])
    _, records = run(small_session(optimizer=optim.sgd(power), batch_size=policy, total_examples=128))
    assert max(record["learning_rate"] for record in records) == pytest.approx(0.02)
    assert {record["batch_size"] for record in records} >= {8, 32}


@pytest.mark.slow
def test_the_loss_of_each_row_is_that_of_its_own_batch():
    session = small_session()
    state, task = session.fresh_state(), session.task
    numbers = np.array([3, 11, 5, 700, 2])
    found = session.row_losses()(state, numbers)
    rows, context = task.train.take(numbers), Context(training=False)
    for i, loss in enumerate(found):
        row = {name: jnp.asarray(x[i : i + 1]) for name, x in rows.items()}
        total, weight = task.evaluate(state.parameters, row | {"example": jnp.zeros(1, jnp.int32)}, context)["loss"]
        assert loss == pytest.approx(float(total / weight), rel=1e-5)


@pytest.mark.slow
def test_schedule_free_is_evaluated_where_it_says():
    session = small_session(optimizer=optim.schedule_free(1e-2))
    state, _ = run(session)
    evaluate = session.evaluation(16)
    at_average = optim.evaluation_params(state.opt_state, state.parameters)
    plain = small_session()
    plain_state = plain.fresh_state(jax.device_get(at_average))
    assert evaluate(state)["loss"] == pytest.approx(plain.evaluation(16)(plain_state)["loss"], rel=1e-5)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (at_average, state.parameters)), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": [optim.group("*", frozen=True)]}, "freeze every parameter"),
        ({"optimizer": optax.lbfgs()}, "asks for what a training step doesn't give"),
        ({"optimizer": optax.sgd(optim.schedules.linear(0.1))}, "length isn't known: give it a total"),
        ({"model": ResNetConfig()}, "reads no tokens"),
        (staged(4, batch_size=3), "batch_size = 3 .* into 4 microbatches, as many as stages: use .* such as 4 or 5"),
        (staged(4, model=SMALL), "layers = 1 does not divide over stage = 4: use a stage of 1, or layers = 4"),
        (staged(2, groups=[optim.group("blocks/*", frozen=True)]), "stages of a pipeline train all of theirs"),
        (staged(2, optimizer=optim.sophia(0.1)), "mesh stage = 2: a pipeline has no second derivatives"),
        (
            staged(
                2,
                model=dataclasses.replace(SMALL, layers=6),
                strategy=parallel.strategy(schedule="interleaved", chunks=2),
            ),
            "layers = 6 over stage = 2 are 3 a stage, .*chunks = 2 does not divide: use chunks of 1 or 3, or layers",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(options, message):
    with pytest.raises(UserError, match=message):
        _ = small_session(**options).plan


def test_a_batch_is_cut_into_several_microbatches_a_stage():
    assert [plan.microbatch_examples for plan in small_session(**staged(2, batch_size=64)).plans()] == [8, 4, 2, 1]
    assert next(small_session(**staged(2, batch_size=2)).plans()).microbatch_examples == 1
    interleaved = parallel.strategy(schedule="interleaved", chunks=2)
    assert next(small_session(**staged(2, batch_size=64, strategy=interleaved)).plans()).microbatch_examples == 16


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"matmul": "fp8"}], ids=["bfloat16", "fp8"])
def test_stages_train_in_fewer_bits(changes):
    model = dataclasses.replace(SMALL, layers=2, kv_heads=4, **changes)
    losses = [
        [record["loss"] for record in run(small_session(**options))[1]]
        for options in (staged(2, model=model), {"model": model})
    ]
    assert losses[0][-1] < losses[0][0] - 0.1
    # What one program rounds to 8 bits at the end of a fusion the other may keep: of a loss of 4.9 by 0.02.
    np.testing.assert_allclose(*losses, atol=0.02)


def test_nothing_frozen_is_the_whole_tree():
    tree = {"a": 1, "b": {"c": 2}}
    every = Trainable(jax.tree.map(lambda _: True, tree))
    assert every.take(tree) == tree
    assert every.put(tree, tree) == tree


def test_a_policy_takes_its_rows_from_the_data_and_says_before_the_first_step_that_it_stays(monkeypatch):
    # What it says is known without its step.
    monkeypatch.setattr(Session, "lower", lambda *_, **__: SimpleNamespace(compile=lambda: "the step"))
    monkeypatch.setattr(session_module, "peak_bytes", lambda compiled: 0)
    curve = {"tokens": [0, 1600], "critical_batch_size": [0, 32]}  # above 16 from 800 tokens on, 50 rows of 16
    policy = optim.critical_batch_following(curve, 8, 16)
    session = small_session(batch_size=policy, total_examples=64)
    assert session.policy.first_change_examples == 51
    assert session.step
    (note,) = session.notes
    assert "stays at 8 in the whole run" in note
    assert "at 51 examples at the earliest" in note
    with pytest.raises(UserError, match=r"sequence_length = 128, but the data's rows have 16 tokens"):
        small_session(batch_size=optim.critical_batch_following(curve, 8, 16, sequence_length=128))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.scale_by_adam(),
        optax.chain(optim.scale_by_lars(), optax.add_decayed_weights(0.1)),
        optax.masked(optax.identity(), True),
        optax.scale(0.1),
    ],
)
def test_an_optimizer_that_climbs_is_refused(optimizer):
    with pytest.raises(
        UserError, match=r"train\.optimizer \(.*\) moves the parameters along the gradient, and the loss"
    ):
        small_session(optimizer=optimizer)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(optax.linear_schedule(0.0, 0.1, 2)),
        optax.MultiSteps(optax.adam(0.1), 8).gradient_transformation(),
        optax.lbfgs(),  # asks for what isn't there
        optax.chain(optim.scale_by_lars(), optim.scale_by_learning_rate(0.1)),
    ],
)
def test_an_optimizer_that_descends_or_waits_is_taken(optimizer):
    small_session(optimizer=optimizer)


@pytest.mark.parametrize(
    "make", [optax.sgd, lambda schedule: optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)]
)
def test_a_schedule_that_counts_steps_is_said_and_refused_where_the_batch_moves(make):
    optimizer = make(optax.linear_schedule(0.1, 0.0, 8))
    (note,) = small_session(optimizer=optimizer).notes
    assert re.match(r"the optimizer's schedule \(\w+\) counts steps, of 8 examples each here, and doesn't know", note)
    with pytest.raises(UserError, match="counts steps, and the batch size moves from 8 to 16"):
        small_session(optimizer=optimizer, batch_size=optim.staged([8, 16], starts_examples=[0, 32]))
    assert small_session(optimizer=make(0.1)).notes == []


def test_a_transform_is_refused_by_its_name():
    with pytest.raises(
        UserError, match=r"train.optimizer = @scale_by_lars\(\) has no learning rate, .* set .* @chain\(\)"
    ):
        configurables.bind(train, ["debug.gin"], ["train.optimizer = @scale_by_lars()"])
    named = ["scale_by_learning_rate.learning_rate = 0.1", "train.optimizer = @scale_by_learning_rate()"]
    configurables.bind(train, ["debug.gin"], named)


def test_a_run_from_python_keeps_what_it_was_given_and_says_that_it_does_not_repeat(tmp_path, capsys):
    folder = tmp_path / "run"
    options = {"model": SMALL, "optimizer": optim.adamw(1e-2), "mesh": one_device(), "evaluation_examples": 8}
    once = {"evaluate_every_examples": 16, "checkpoint_every_examples": 16}
    train(
        run=str(folder), data=RandomText(128, 16), batch_size=8, total_examples=16, profile_steps=1, **options, **once
    )
    said = capsys.readouterr().out
    assert "\nno profile: it begins after 3 steps, and there were 2\n" in said
    lines = iter(said.splitlines())
    for begin in (
        "data: ",
        "run: 16 examples, ",
        "mesh: one device, of 1 x cpu; strategy: fsdp",
        "optimizer: given in P",
    ):
        assert next(lines).startswith(begin)
    assert next(lines) == "compiling the step ..."
    assert re.match(r"model: .* needs [\d.,]+ MiB", next(lines))
    assert re.match(r"kernels: rms_norm xla, .*attention xla, swiglu xla, linear_cross_entropy xla$", next(lines))
    kept = (folder / "config.gin").read_text()
    assert "\n# train.batch_size = 8\n" in kept
    assert "\n# train.model = ModelConfig(vocab_size=128, width=16, " in kept
    assert "rope_theta" not in kept  # a field at its default
    assert "\n# train.optimizer = optax." in kept
    # A profile is no part of what was trained.
    train(run=str(folder), data=RandomText(128, 16), batch_size=8, total_examples=16, **options, **once)
    assert f"{folder} is complete" in capsys.readouterr().out
    otherwise = options | once | {"evaluation_examples": 16}
    with pytest.raises(UserError, match=r"is complete, and train.evaluation_examples was 8 and is now 16: undo that"):
        train(run=str(folder), data=RandomText(128, 16), batch_size=8, total_examples=16, **otherwise)
    with pytest.raises(UserError, match=r"config.gin is of a run that was started from Python"):
        configurables.bind(train, [str(folder / "config.gin")])
    configurables.bind(train, ["debug.gin"])
    with pytest.raises(UserError, match=r"config.gin is of a run that was started from Python"):
        is_finished(folder)
    assert _bindings(kept)["train.batch_size"] == "8"
    assert _bindings(kept)["started"] == "from Python"
    records = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match=r"complete run and no checkpoint.*: put its checkpoints back, or give another"):
        train(run=str(folder), data=RandomText(128, 16), batch_size=8, total_examples=16, **options, **once)
    assert (folder / "metrics.jsonl").read_bytes() == records


@pytest.mark.parametrize("optimizer", [optax.adam("fast"), optax.adam(0.1, b1=[1]), optax.adamw(0.1, weight_decay={})])
def test_a_librarys_optimizer_of_no_numbers_is_refused(optimizer):
    with pytest.raises(UserError, match=r"^train\.optimizer can't make an update of what it was given: [^\n]*$"):
        climbs(optimizer, {"w": jnp.ones((4, 4))})
