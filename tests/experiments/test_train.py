"""The loop: batch sizes that move, resuming, what is recorded, and what is refused."""

import json
import re
import shutil
import signal
import sys

import jax
import numpy as np
import pytest

from crescendo.experiments import train as train_module
from crescendo.experiments.reports.write import _events
from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runs.state import Clock
from crescendo.experiments.runtime.cache import CompilationCounter
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import Interrupted
from crescendo.experiments.trainer import training
from crescendo.experiments.trainer.recorder import Recorder

STAGED = ("train.batch_size = @staged()", "staged.sizes = [8, 16, 32]", "staged.starts_examples = [0, 128, 256]")


@pytest.fixture(scope="module")
def staged(train_small, tmp_path_factory):
    """A whole run with two batch-size changes: its folder, its result, and the programs compiled up to each step."""
    run = tmp_path_factory.mktemp("runs") / "staged"
    counter, compiled, step = CompilationCounter(), [], Recorder.step

    def count(self, *arguments):
        compiled.append(counter.count)
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "step", count)
        return run, train_small(run, *STAGED, devices=8), compiled


@pytest.fixture(scope="module")
def constant(train_small, tmp_path_factory):
    """The same with one batch size."""
    run = tmp_path_factory.mktemp("runs") / "constant"
    return run, train_small(run)


@pytest.fixture
def copy_of_staged(staged, tmp_path):
    return shutil.copytree(staged[0], tmp_path / "staged")


def newest_arrays(run):
    """The bytes of the newest checkpoint's arrays, by their fingerprints."""
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    return json.loads((newest / "meta" / "metadata").read_text())["fingerprints"], newest


def test_the_model_learns_and_the_clock_counts_examples(constant):
    run, last = constant
    train = read_run(run).train
    assert train["loss"][-4:].mean() < train["loss"][0] - 1.5
    assert last["loss"] == pytest.approx(train["loss"][-4:].mean(), abs=0.5)
    np.testing.assert_array_equal(train["examples_seen"], 16 * np.arange(1, 33))
    np.testing.assert_array_equal(train["tokens_seen"], 32 * train["examples_seen"])
    assert last["examples_seen"] == 512
    assert last["step"] == 32


def test_the_learning_rate_is_a_function_of_examples(constant):
    train = read_run(constant[0]).train
    middle = train["examples_seen"] - train["batch_size"] / 2
    expected = 1e-2 * np.where(middle < 64, middle / 64, (512 - middle) / (512 - 64))
    np.testing.assert_allclose(train["learning_rate"], expected, rtol=1e-5)


def test_the_batch_follows_its_stages_one_step_late_and_the_rate_follows_the_batch(staged):
    run, _, _ = staged
    train = read_run(run).train
    sizes, seen = train["batch_size"].astype(int), train["examples_seen"].astype(int)
    # The size of step n + 2 is what the stages say at the end of step n.
    expected = [8, 8, *(8 if at < 128 else 16 if at < 256 else 32 for at in seen[:-2])]
    expected[-1] = min(expected[-1], 512 - seen[-2])
    np.testing.assert_array_equal(sizes, expected)
    assert set(sizes) >= {8, 16, 32}
    middle = seen - sizes / 2
    base = 1e-2 * np.where(middle < 64, middle / 64, (512 - middle) / (512 - 64))
    np.testing.assert_allclose(train["learning_rate"], base * np.sqrt(sizes / 8), rtol=1e-5)
    changes = [(event["from"], event["to"]) for event in read_run(run).events if event["kind"] == "batch_size"]
    assert changes == [(8, 16), (16, 32)]


def test_a_change_of_batch_size_compiles_nothing(staged):
    run, _, compiled = staged
    train = read_run(run).train
    assert len(compiled) == len(train["step"])
    assert compiled[0] > 0
    # The fingerprints of the first checkpoint are the last program: it is saved before the first change.
    saved = int(np.searchsorted(train["examples_seen"], 512 // 10)) + 1
    assert train["batch_size"][saved] == 8
    assert set(compiled[saved:]) == {compiled[-1]}


@pytest.mark.slow
def test_a_run_with_lamb_records_its_trust_ratios(train_small, constant, tmp_path):
    train_small(
        tmp_path / "run",
        *("train.optimizer = @lamb()", "lamb.learning_rate = @schedules.linear()", "TOTAL_EXAMPLES = 128"),
    )
    train = read_run(tmp_path / "run").train
    least, median, largest = (train[f"trust_ratio_{name}"] for name in ("min", "median", "max"))
    assert np.all((least > 0) & (least < median) & (median < largest))
    assert not any(1.0 in ratios for ratios in (least, median, largest))  # what has no ratio doesn't count
    assert "trust_ratio_median" not in read_run(constant[0]).train


@pytest.mark.slow
def test_a_large_constant_batch_gets_the_rate_of_its_base(train_small, tmp_path):
    train_small(tmp_path / "run", "train.batch_size = 32", "train.base_batch_size = 8", "TOTAL_EXAMPLES = 128")
    train = read_run(tmp_path / "run").train
    np.testing.assert_array_equal(train["batch_size"], 32)
    # The first batch covers the warmup's first half, so that its middle is a quarter of it.
    assert train["learning_rate"][0] == pytest.approx(2 * 1e-2 / 4)


def test_a_run_interrupted_and_resumed_is_the_run_that_was_not(staged, train_small, tmp_path, monkeypatch, records):
    run, resumed = staged[0], tmp_path / "resumed"
    step = Recorder.step
    stop_at = {8, 12, 20}

    def stop(self, clock, *rest):
        values = step(self, clock, *rest)
        if clock.steps in stop_at:
            stop_at.remove(clock.steps)
            signal.raise_signal(signal.SIGTERM)
        return values

    monkeypatch.setattr(Recorder, "step", stop)
    for _ in range(3):
        with pytest.raises(Interrupted, match=r"SIGTERM: saved .* the same command goes on"):
            train_small(resumed, *STAGED, devices=8)
    assert train_small(resumed, *STAGED, devices=8)["loss"] == staged[1]["loss"]
    assert records(resumed) == records(run)
    assert newest_arrays(resumed)[0] == newest_arrays(run)[0]


def files(run):
    """The content of every file of a run's folder, by path."""
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(staged, train_small):
    before = files(staged[0])
    assert train_small(staged[0], *STAGED, "train.label = 'other'", devices=8) == staged[1]
    assert files(staged[0]) == before


@pytest.mark.parametrize(
    ("binding", "said"),
    [
        pytest.param(*("schedules.linear.peak = 2e-2", "linear.peak was 0.01 and is now 0.02"), marks=pytest.mark.slow),
        pytest.param("TOTAL_EXAMPLES = 256", "train.total_examples was 512 and is now 256", marks=pytest.mark.slow),
        ("train.evaluate_every_examples = 64", "train.evaluate_every_examples was None and is now 64"),
    ],
)
def test_a_finished_run_asked_for_otherwise_is_refused_and_left_as_it_is(staged, train_small, binding, said):
    before = files(staged[0])
    with pytest.raises(
        UserError, match=rf"staged is complete, and .*{re.escape(said)}.*another folder with --run"
    ) as told:
        train_small(staged[0], *STAGED, binding, devices=8)
    assert "\n" not in str(told.value)
    assert files(staged[0]) == before


def test_what_changes_as_a_run_goes_on_is_recorded_where_it_does(constant, train_small, tmp_path, capsys):
    run = shutil.copytree(constant[0], tmp_path / "run")
    train_small(run, "TOTAL_EXAMPLES = 544", "adamw.weight_decay = 0.5", "train.label = 'longer'")
    events = [event for event in read_run(run).events if event["kind"] == "setting"]
    assert [(event["name"], event["from"], event["to"]) for event in events] == [
        ("optim.adamw.weight_decay", "0.1", "0.5"),
        ("train.total_examples", "512", "544"),
    ]
    assert {event["examples_seen"] for event in events} == {512}
    said = capsys.readouterr().out
    assert (
        "note: from here on optim.adamw.weight_decay was 0.1 and is now 0.5; train.total_examples was 512 and" in said
    )
    assert "step 32 (94%)  optim.adamw.weight_decay 0.1 → 0.5" in said
    assert _events(read_run(run))[0] == "94%: optim.adamw.weight_decay 0.1 → 0.5, as the run went on from step 32"
    assert "adamw.weight_decay = 0.5" in (run / "config.gin").read_text()


def test_a_run_is_known_and_told_without_what_its_folder_lost(copy_of_staged, train_small, staged, capsys):
    for name in ("run.json", "metrics.jsonl", "config.gin"):
        (copy_of_staged / name).unlink()
    with pytest.raises(UserError, match="can't go on: seed was 0 and is now 1"):
        train_small(copy_of_staged, *STAGED, "train.seed = 1", devices=8)
    assert not (copy_of_staged / "run.json").exists()
    capsys.readouterr()
    assert train_small(copy_of_staged, *STAGED, devices=8)["loss"] == staged[1]["loss"]
    said = capsys.readouterr().out
    assert "note: the training records of the examples from 0 to 512 are missing" in said
    assert "has no config.gin: whether a setting is another one now isn't known" in said
    fixed = [json.loads((run / "run.json").read_text())["fixed"] for run in (copy_of_staged, staged[0])]
    assert fixed[0] == fixed[1]


def test_a_run_that_lost_its_checkpoints_says_that_it_begins_anew(tmp_path):
    records, said = [{"kind": "train", "examples_seen": 16}], []
    training._say_of_going_on(tmp_path, Clock(), records, {}, "", said.append)
    assert said == [f"note: no checkpoint is in {tmp_path}: the run begins anew, without its 1 records"]
    training._say_of_going_on(tmp_path, Clock(), [], {}, "", said.append)
    assert len(said) == 1


def test_writers_are_looked_up_before_anything_is_compiled(train_small, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Session", pytest.fail)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, said in (("mlflow", "must each be one of wandb"), ("wandb", "needs the package wandb")):
        with pytest.raises(UserError, match=said):
            train_small(tmp_path / "run", f"train.writers = ['{name}']")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    staged, copy_of_staged, train_small, damage, records, capsys
):
    prints, newest = newest_arrays(copy_of_staged)
    for file in [path for path in (newest / "state").rglob("d/*") if path.is_file()]:
        content = bytearray(file.read_bytes())
        middle = len(content) // 2
        if damage == "remove":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(content[:middle])
        else:
            content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
            file.write_bytes(content)
    train_small(copy_of_staged, *STAGED, devices=8)
    said = capsys.readouterr()
    assert f"{newest.name} is damaged" in said.out.replace("\n", " ")
    assert "Traceback" not in said.err
    assert records(copy_of_staged) == records(staged[0])
    assert newest_arrays(copy_of_staged)[0] == prints


def test_arrays_that_are_not_those_saved_are_noticed_by_their_fingerprints(staged, copy_of_staged, train_small, capsys):
    prints, newest = newest_arrays(copy_of_staged)
    meta = newest / "meta" / "metadata"
    says = json.loads(meta.read_text())
    del says["fingerprint"], says["run"]  # as a version wrote it that kept neither
    meta.write_text(json.dumps(says).replace(str(prints[0]), str(prints[0] ^ 1)))
    train_small(copy_of_staged, *STAGED, devices=8)
    assert "is damaged (its arrays are not the ones that were saved)" in capsys.readouterr().out.replace("\n", " ")
    assert newest_arrays(copy_of_staged)[0] == prints


def test_only_damaged_checkpoints_stop_the_run(copy_of_staged, train_small):
    for path in (copy_of_staged / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:3])
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged .* move the folder away"):
        train_small(copy_of_staged, *STAGED, devices=8)


def test_old_checkpoints_go_and_one_every_so_many_examples_stays(train_small, tmp_path):
    train_small(
        tmp_path / "run",
        "train.checkpoint_every_examples = 64",
        "train.keep_last_checkpoints = 2",
        "train.keep_checkpoint_every_examples = 192",
    )
    kept = sorted(int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [64, 192, 384, 448, 512]


def test_a_run_that_finds_no_finite_loss_stops_with_its_last_good_checkpoint(train_small, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no finite loss, gradient and update in 3 steps in a row") as stopped:
        train_small(
            run,
            "schedules.linear.peak = 1e38",
            "train.max_bad_steps = 3",
            "train.checkpoint_every_examples = 16",
            "TOTAL_EXAMPLES = 5120",
        )
    assert "lower the learning rate" in str(stopped.value)
    result = read_run(run)
    assert result.train["skipped_steps"][-1] == 3
    skips = [event for event in result.events if "first_example" in event]
    assert [event["kind"] for event in skips] == ["warning"] * 3
    assert "was skipped" in result.events[0]["message"]
    assert newest_arrays(run)[0]


def test_the_run_folder_says_how_to_repeat_the_run(staged):
    run, _, compiled = staged
    info = json.loads((run / "run.json").read_text())
    assert info["total_examples"] == 512
    assert info["versions"]["jax"] == jax.__version__
    assert info["device"] == "8 x cpu"
    assert info["compilations"] > compiled[-1] / 2  # the fixture counts from before the run does
    config = (run / "config.gin").read_text()
    assert "staged.sizes = [8, 16, 32]" in config
    assert "train.seed = 0" in config
    assert list(run.glob("events.out.tfevents*"))


def test_a_run_repeats_from_its_own_config(staged, tmp_path, records):
    config = staged[0] / "config.gin"
    train_module.main(["--config", str(config), "--run", str(tmp_path / "again")])
    assert records(tmp_path / "again") == records(staged[0])


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("train.batch_size = 0", "batch_size = 0 must be at least 1"),
        ("train.batch_size = -8", "batch_size = -8 must be at least 1"),
        ("train.batch_size = 12", "batch_size = 12 does not divide over 8 devices: use 8 or 16"),
        ("train.batch_size = 'many'", "train.batch_size = 'many' must be int | "),
        ("train.batch_size = 8192", r"the data have \d+ rows, fewer than one batch of 8192"),
        ("train.total_examples = 0", "train.total_examples = 0 must be at least 1"),
        ("train.max_gradient_norm = -1.0", "train.max_gradient_norm = -1.0 must be above 0"),
        ("train.total_examples = 3000000000", "must be at least 1 and below 2\\^31"),
        ("train.coupling = 'cubic'", "train.coupling = 'cubic' must be 'linear', 'sqrt' or 'none'"),
        ("train.stop_at_loss = 0.0", r"train.stop_at_loss = 0.0 must be above 0 and finite"),
        ("train.stop_after_minutes = 1e400", "train.stop_after_minutes = inf must be above 0 and finite"),
        ("train.seed = -1", r"train.seed = -1 must be at least 0 and below 2\^31"),
        ("train.writers = ['mlflow']", r"train.writers = \['mlflow'\] must each be one of wandb"),
        ("text_data.sequence_length = 0", "sequence_length"),
        ("text_files.paths = ['/nowhere/*.txt']", "/nowhere"),
        ("model.heads = 3", "width = 16 must be a multiple of heads = 3"),
        ("model.preset = 'huge'", "model.preset = 'huge' must be one of debug, 30m"),
        ("model.matmul = 'fp9'", "model.matmul = 'fp9' must be one of dtype, fp8, fp8-hadamard"),
        (
            "model.matmul = 'fp8'",
            "kv_heads x head width = 8 must be a multiple of 16 with matmul = 'fp8': the least is 16",
        ),
        ("staged.sizes = [8, 16]\nstaged.starts_examples = [0]\ntrain.batch_size = @staged()", "2 sizes and 1 starts"),
    ],
)
def test_bad_input_is_one_line_that_names_it(train_small, tmp_path, binding, message):
    with pytest.raises(UserError, match=message) as refused:
        train_small(tmp_path / "run", binding, devices=8)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_is_refused_before_data_are_prepared(tmp_path):
    nowhere = ("text_data.documents = @text_files()", "text_files.paths = ['/nowhere/*.txt']")
    bindings = ("model.matmul = 'fp8'", "model.mlp_width = 1000", *nowhere)
    with pytest.raises(UserError, match=r"mlp_width = 1000 must be a multiple of 16 .* 992 and 1008"):
        train_module.main(["--run", str(tmp_path / "run"), *(word for each in bindings for word in ("--set", each))])


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("model.width = 32", "model.width was 16 and is now 32"),
        ("train.seed = 1", "seed was 0 and is now 1"),
        ("train.optimizer = @lion()\nlion.learning_rate = 1e-3", "arrays"),
        (
            "SEQUENCE_LENGTH = 16",
            "data was .* and is now .*, a hash of what is read: documents, .* length of rows, .*: undo",
        ),
    ],
)
def test_a_run_goes_on_only_as_what_it_was(staged, train_small, binding, message):
    run = staged[0]
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=message):
        train_small(run, *STAGED, binding, devices=8)
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_folder_in_use_is_refused(staged, train_small):
    with (
        run_folder.locked(staged[0]),
        pytest.raises(UserError, match=r"staged is in use by process \d+: wait for it to end, or give another"),
    ):
        train_small(staged[0], *STAGED, devices=8)


def test_a_folder_that_cannot_be_written_is_refused(train_small):
    with pytest.raises(UserError, match="cannot write /proc/crescendo"):
        train_small("/proc/crescendo/run")


def test_the_command_ends_with_exit_code_2_and_one_line(small_bindings, capsys):
    from crescendo.experiments.runtime.cli import run_command

    with pytest.raises(SystemExit) as ended:
        run_command(lambda: train_module.main(["--set", "train.batch_sise = 8"]))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: --set: train has no parameter 'batch_sise'; nearest: batch_size, base_batch_size\n"
