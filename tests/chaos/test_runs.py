"""What a run's folder is called and what goes missing from it, by the command itself, in processes of their own."""

import shutil
import signal

import jax
import jax.numpy as jnp
import pytest
from faults import (
    assert_clean,
    checkpoints,
    errors,
    examples_seen,
    fingerprints,
    finish,
    half_saved,
    kill,
    random_moments,
    times,
    wait_until,
)
from spoil import spoil

from crescendo.experiments.reports.compare import compare, remark
from crescendo.experiments.runs.checkpoint import Checkpoints
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime.errors import UserError

BINDINGS = ("TOTAL_EXAMPLES = 4096", "train.batch_size = 16", "train.checkpoint_every_examples = 512")


@pytest.fixture(scope="module")
def whole(start_train, tmp_path_factory):
    """The run without a fault."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(start_train(run, *BINDINGS))
    return run


def stopped(start_train, run, *bindings) -> None:
    """A run that was asked to stop somewhere behind its second checkpoint."""
    process = start_train(run, *BINDINGS, *bindings)
    wait_until(lambda: examples_seen(run) >= 1200, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["lr[1e-3]", "[x]*?[!y]** ü'{1}"])
def test_a_folder_of_any_name_keeps_its_checkpoints(start_train, tmp_path, whole, records, name):
    run, cache = tmp_path / name, tmp_path / f"cache {name}"
    own = f"text_data.cache_directory = {str(cache)!r}"
    environment = {"XDG_CACHE_HOME": str(cache), "JAX_COMPILATION_CACHE_DIR": str(cache / "xla")}
    process = start_train(run, *BINDINGS, own, environment=environment)
    wait_until(lambda: examples_seen(run) >= 1200, process)
    assert kill(process)
    assert "going on at" in finish(start_train(run, *BINDINGS, own, environment=environment))
    assert records(run) == records(whole)
    assert fingerprints(run) == fingerprints(whole)
    assert len(checkpoints(run)) == 2
    assert not half_saved(run)


@pytest.mark.chaos
def test_a_second_process_is_refused_though_the_locks_file_is_gone(start_train, tmp_path, whole, records):
    run = tmp_path / "run"
    first = start_train(run, *BINDINGS)
    wait_until(lambda: examples_seen(run) > 0, first)
    first.send_signal(signal.SIGSTOP)  # it would end before the second one has begun
    (run / ".lock").unlink()
    output, _ = start_train(run, *BINDINGS).communicate(timeout=100)
    first.send_signal(signal.SIGCONT)
    (line,) = errors(output)
    assert "is in use by process" in line
    finish(first)
    assert records(run) == records(whole)


@pytest.mark.chaos
def test_another_seed_is_refused_though_run_json_is_gone(start_train, tmp_path, whole):
    run = tmp_path / "run"
    stopped(start_train, run)
    (run / "run.json").unlink()
    output, _ = start_train(run, *BINDINGS, "train.seed = 1").communicate(timeout=100)
    assert_clean(output)
    assert "seed was 0 and is now 1" in errors(output)[0]
    assert fingerprints_after(start_train, run) == fingerprints(whole)
    assert read_run(run).info["fixed"] == read_run(whole).info["fixed"]


def fingerprints_after(start_train, run) -> list[int]:
    finish(start_train(run, *BINDINGS))
    return fingerprints(run)


@pytest.mark.chaos
@pytest.mark.parametrize("lost", ["deleted", "cut", "NUL tail"])
def test_lost_records_are_said_in_the_run_and_in_the_report(start_train, tmp_path, whole, lost):
    run = tmp_path / "run"
    stopped(start_train, run)
    path = run / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(b"" if lost == "deleted" else content[: len(content) // 2] + b"\0" * 4096 * (lost == "NUL tail"))
    if lost == "deleted":
        path.unlink()
    assert "note: the training records of the examples from" in finish(start_train(run, *BINDINGS))
    assert fingerprints(run) == fingerprints(whole)
    (gap,) = read_run(run).gaps
    assert (gap.begin == 0) == (lost == "deleted")
    assert remark(compare([read_run(run)])[0]) == "records missing"


@pytest.mark.chaos
@pytest.mark.parametrize("what", ["metrics.jsonl", "."])
def test_what_is_removed_under_a_run_stops_it_with_one_line(start_train, tmp_path, what):
    run = tmp_path / "run"
    process = start_train(run, *BINDINGS, "TOTAL_EXAMPLES = 200_000")
    wait_until(lambda: checkpoints(run), process)
    process.send_signal(signal.SIGSTOP)
    (run / what).resolve().rename(tmp_path / "away")
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=200)
    assert_clean(output)
    assert process.returncode == 2, output
    (line,) = errors(output)
    assert str(run) in line
    assert "make room" not in line
    assert "No such file" in line or "moved, removed or replaced" in line


@pytest.mark.chaos
def test_a_run_that_goes_on_at_another_rate_says_so(start_train, tmp_path):
    run = tmp_path / "run"
    stopped(start_train, run)
    output = finish(start_train(run, *BINDINGS, "schedules.linear.peak = 2e-2"))
    assert any(
        line.startswith("note: from here on ") and "0.01 and is now 0.02" in line for line in output.splitlines()
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints of a small state."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, run={"format": 2, "fixed": {"seed": 0}}) as keeper:
        for seen in (8, 16):
            keeper.save(state(seen), Clock(seen, seen // 8, 8))
    return folder


def state(value: float) -> TrainState:
    return TrainState({"w": jnp.arange(4096.0) * value, "b": jnp.zeros(2)}, (), jnp.int32(0), jnp.int32(0))


@pytest.mark.chaos
def test_a_spoilt_checkpoint_is_never_taken_for_a_whole_one(saved, tmp_path):
    choose = random_moments()
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    for trial in range(times(200)):
        copy = shutil.copytree(saved, tmp_path / str(trial) / "checkpoints")
        how, lines = spoil(copy / "16", choose), []
        with Checkpoints(copy) as keeper:
            try:
                found, clock = keeper.restore(wanted, lines.append)
            except UserError as error:
                told = str(error)
            else:
                told = ""
        if told:
            assert told.startswith("cannot read"), how
            assert len(told.splitlines()) == 1, how
            continue
        assert found.parameters["w"].tolist() == state(clock.examples_seen).parameters["w"].tolist(), how
        assert (clock.examples_seen, len(lines)) in ((16, 0), (8, 1)), (how, lines)
        shutil.rmtree(copy.parent)
