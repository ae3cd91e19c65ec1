"""What is recorded reads back the same, through kills, resumes and full disks."""

import io
import json
import math
import os
import re
import resource
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from crescendo.experiments.reports.compare import compare, remark
from crescendo.experiments.reports.write import _events
from crescendo.experiments.runs.folder import provenance
from crescendo.experiments.runs.records import (
    TRAIN_COLUMNS,
    VALIDATION_COLUMNS,
    JsonlWriter,
    began_at,
    gaps,
    read_records,
)
from crescendo.experiments.runs.run import last_validation, read_run
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.text import RunningMean, compact
from crescendo.experiments.trainer.observers import Observers, TensorBoardWriter, run_observers
from crescendo.experiments.trainer.progress import ProgressLine

unhurried = settings(deadline=None)  # a busy machine's pauses are no failure


def test_the_commit_is_that_of_the_packages_own_repository_or_none(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "crescendo"
    (package / "experiments" / "runs").mkdir(parents=True)
    monkeypatch.setitem(provenance.__globals__, "__file__", str(package / "experiments" / "runs" / "folder.py"))

    def commit(root: Path) -> str:
        git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
        for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
            subprocess.run([*git, *words], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    assert commit(tmp_path)  # the user's, in which the package is installed
    assert provenance()["git_commit"] is None
    with monkeypatch.context() as within_a_hook:
        within_a_hook.setenv("GIT_DIR", str(tmp_path / ".git"))
        assert provenance()["git_commit"] is None
    assert commit(package) == provenance()["git_commit"]


def train_record(step: int, *, batch_size: int = 8, loss: float = 2.5, mfu: float | None = None) -> dict:
    seen = step * batch_size
    return {
        **{"kind": "train", "step": step, "examples_seen": seen, "tokens_seen": 128 * seen, "loss": loss},
        **{"learning_rate": 1e-3, "batch_size": batch_size, "microbatches": 1, "gradient_norm": 0.7},
        **{"skipped_steps": 0, "seconds": 0.01 * step, "tokens_per_second": 102_400.0, "mfu": mfu},
    }


def all_records(steps: int) -> list[dict]:
    """A run's records in the order of its clock: a validation each four steps, a change and a warning."""
    records: list[dict] = []
    for step in range(1, steps + 1):
        records.append(train_record(step, loss=1.0 + 1.0 / 3.0 / step))
        at = {"step": step, "examples_seen": 8 * step}
        if step % 4 == 0:
            records.append({"kind": "validation", **at, "tokens_seen": 1024 * step, "loss": 0.1 * step, "seconds": 0.1})
        if step == 5:
            records.append({"kind": "batch_size", **at, "from": 8, "to": 16, "reason": "staged"})
        if step == 7:
            records.append({"kind": "warning", **at, "message": 'odd "characters" ü\n'})
    return records


def write(path: Path, records: list[dict], resume_at_examples: int = 0) -> bytes:
    writer = JsonlWriter(path, resume_at_examples)
    for record in records:
        writer(record)
    writer.close()
    return path.read_bytes()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text(json.dumps({"name": "a  run\n", "total_examples": 80, "unknown": [1]}))
    (tmp_path / "config.gin").write_text("train.seed = 1\n")
    return tmp_path


def test_a_line_is_one_json_object_with_the_record(tmp_path: Path):
    records = all_records(10)
    lines = write(tmp_path / "metrics.jsonl", records).decode().splitlines()
    assert [json.loads(line) for line in lines] == records


@unhurried
@given(st.lists(st.floats(width=64)), st.floats(width=32))
def test_finite_floats_read_back_bit_identically_and_others_are_null(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], single: float
):
    path = tmp_path_factory.mktemp("floats") / "metrics.jsonl"
    record = {"kind": "train", "examples_seen": 1} | {f"x{i}": value for i, value in enumerate(values)}
    write(path, [record | {"float32": np.float32(single), "int32": np.int32(-7)}])
    (read,) = read_records(path)
    assert json.loads(path.read_bytes(), parse_constant=pytest.fail) == read
    for i, value in enumerate(values):
        assert math.isfinite(value) == (read[f"x{i}"] is not None)
        assert not math.isfinite(value) or struct.pack("d", read[f"x{i}"]) == struct.pack("d", value)
    assert np.float32(read["float32"]) == np.float32(single) if np.isfinite(single) else read["float32"] is None
    assert read["int32"] == -7


def test_a_run_that_diverged_is_json_and_reads_back_as_numbers(run_folder: Path):
    path = run_folder / "metrics.jsonl"
    diverged = train_record(1, loss=math.nan) | {"gradient_norm": np.float32("inf")}
    at = {"step": 1, "examples_seen": 8, "tokens_seen": 1024, "seconds": 0.1}
    records = [diverged, {"kind": "validation", **at, "loss": -math.inf}]
    path.write_text("".join(json.dumps(r, default=float) + "\n" for r in records))  # as Python writes it, no JSON
    for content in (write(path, [], resume_at_examples=8), write(path, records)):
        assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in content.splitlines()] == [None, None]
        run = read_run(run_folder)
        assert np.isnan([run.train["loss"][0], run.train["gradient_norm"][0], run.validation["loss"][0]]).all()
        assert math.isnan(last_validation(run_folder)["loss"])


RECORDS = all_records(12)
WHOLE = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


@unhurried
@given(cut=st.integers(0, len(WHOLE)), checkpoint=st.integers(0, 12))
def test_a_run_killed_at_any_byte_and_resumed_writes_the_uncut_file(
    tmp_path_factory: pytest.TempPathFactory, cut: int, checkpoint: int
):
    path = tmp_path_factory.mktemp("resume") / "metrics.jsonl"
    path.write_bytes(WHOLE[:cut])
    # The checkpoint is one whose records were all written before the cut, as the loop guarantees.
    written = len(read_records(path))
    late = [record["examples_seen"] for record in RECORDS[written:]]
    resume_at = min([8 * checkpoint, *(seen - 1 for seen in late)]) // 8 * 8
    rewritten = [r for r in RECORDS if r["examples_seen"] > resume_at] if resume_at else RECORDS
    assert write(path, rewritten, resume_at) == WHOLE
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_a_fresh_start_keeps_nothing(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    at_zero = {"kind": "validation", "step": 0, "examples_seen": 0, "tokens_seen": 0, "loss": 5.5, "seconds": 0.0}
    write(path, [at_zero, train_record(1)])
    assert write(path, [at_zero]) == json.dumps(at_zero).encode() + b"\n"


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, all_records(2))
    path.write_bytes(path.read_bytes()[:-1])
    write(path, [train_record(3)], resume_at_examples=16)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "damage",
    [b'{"kind": "tr', b"\xff\x00", b"5", b'{"step": 1}', b'{"kind": "train", "examples_seen": "8"}', b"[" * 9999],
)
def test_damage_before_the_end_is_an_error_that_names_the_line(tmp_path: Path, damage: bytes):
    path = tmp_path / "metrics.jsonl"
    lines = write(path, all_records(3)).splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + b"\n" + lines[1])
    with pytest.raises(UserError, match=rf"{path} is damaged at line 2"):
        JsonlWriter(path, 8)
    path.write_bytes(lines[0] + damage + b"\n" + damage)  # a torn end is no damage
    assert len(read_records(path)) == 1


@unhurried
@given(lost=st.sets(st.integers(1, 20)), begin=st.sampled_from([0, 400]), doubled=st.booleans())
def test_records_that_are_lost_are_known_by_the_clock(lost: set[int], begin: int, doubled: bool):
    records = [train_record(step) for step in range(1, 21)]
    for record in records:
        record["examples_seen"] += begin
    left = [record for record in records if record["step"] not in lost]
    found = gaps(left, begin=begin, end=begin + 160)
    missing = {step for gap in found for step in range((gap.begin - begin) // 8 + 1, (gap.end - begin) // 8 + 1)}
    assert missing == lost
    assert not any(gap.twice for gap in found)
    assert len(found) == len([step for step in lost if step - 1 not in lost])
    if doubled and left:
        assert [gap.twice for gap in gaps([*left, left[-1]], begin=begin)][-1:] == [True]
    assert gaps(records, begin=begin, end=begin + 80) == []  # those past the clock are dropped, and no gap


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [],
        lambda lines: lines[:5],
        lambda lines: [*lines[:5], b"\0" * 512],
        lambda lines: [*lines[:5], lines[5][:40]],
    ],
    ids=["deleted", "cut", "NUL tail", "torn"],
)
def test_a_file_that_lost_its_end_is_a_gap_up_to_the_clock(tmp_path: Path, damage):
    path = tmp_path / "metrics.jsonl"
    lines = write(path, all_records(12)).splitlines(keepends=True)
    path.write_bytes(b"".join(damage(lines)))
    (gap,) = gaps(read_records(path), end=96)
    assert (gap.begin in (0, 32), gap.end, gap.twice) == (True, 96, False)
    assert f"from {gap.begin} to 96 are missing" in str(gap)


def test_a_report_says_which_records_are_missing(run_folder: Path):
    (run_folder / "run.json").write_text(json.dumps({"name": "a", "total_examples": 96, "fixed": {"seed": 0}}))
    kept = [record for record in all_records(12) if record["kind"] != "train" or not 3 <= record["step"] <= 6]
    write(run_folder / "metrics.jsonl", kept)
    run = read_run(run_folder)
    assert _events(run)[0] == "the training records of the examples from 16 to 48 are missing"
    assert remark(compare([run])[0]) == "records missing"
    assert began_at({"start_from": "runs/a@16"}) == 16


def test_records_survive_a_sigkill(tmp_path: Path):
    code = (
        "import os, signal, sys; from pathlib import Path; from crescendo.experiments.runs.records import *\n"
        "w = JsonlWriter(Path(sys.argv[1]), 0)\n"
        "for step in range(100): w({'kind': 'train', 'examples_seen': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    assert [record["examples_seen"] for record in read_records(path)] == list(range(100))


@contextmanager
def full_disk():
    """Lets this process's files grow to 2,000 bytes and no further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, kind: str):
    writer = JsonlWriter(tmp_path / kind, 0) if kind == "metrics.jsonl" else TensorBoardWriter(tmp_path, 0)
    message = rf"cannot write {tmp_path}/\S+: File too large; mend that or choose another path"
    records = [{**train_record(step, mfu=0.5), "kind": "validation"} for step in range(1, 100)]
    accepted: list[None] = []
    with full_disk(), pytest.raises(UserError, match=message):
        accepted.extend(map(writer, records))
    writer.close()
    if kind == "metrics.jsonl":
        assert read_records(tmp_path / kind) == records[: len(accepted)]
        assert len(accepted) > 3


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for make in (JsonlWriter, TensorBoardWriter):
        with pytest.raises(UserError, match=r"cannot .* Not a directory"):
            make(tmp_path / "file" / "metrics.jsonl", 0)


class Collect:
    def __init__(self, log: list, fail: bool = False):
        self.log, self.fail = log, fail

    def __call__(self, record):
        self.log.append(record["step"])

    def close(self):
        self.log.append("closed")
        if self.fail:
            raise UserError("full")


def test_all_observers_are_closed_even_where_one_fails():
    log: list = []
    observers = Observers([Collect(log), Collect(log, fail=True), Observers([Collect(log)])])
    observers(train_record(3))
    with pytest.raises(UserError, match="full"):
        observers.close()
    assert log == [3, 3, 3, "closed", "closed", "closed"]


def test_run_observers_write_what_read_run_reads(run_folder: Path, capsys: pytest.CaptureFixture):
    observers = run_observers(run_folder, resume_at_examples=0, total_examples=80, label="a run")
    for record in all_records(10):
        before = json.dumps(record)
        observers(record)
        assert json.dumps(record) == before
    observers.close()
    run = read_run(run_folder)
    assert (run.name, run.config, run.info["unknown"]) == ("a run", "train.seed = 1\n", [1])
    np.testing.assert_array_equal(run.train["examples_seen"], 8 * np.arange(1, 11))
    np.testing.assert_array_equal(run.train["loss"], [1.0 + 1.0 / 3.0 / step for step in range(1, 11)])
    assert run.train["step"].dtype == np.int64
    assert np.isnan(run.train["mfu"]).all()
    np.testing.assert_array_equal(run.validation["loss"], [0.4, 0.8])
    assert [event["kind"] for event in run.events] == ["batch_size", "warning"]
    assert [path.name for path in run_folder.glob("*tfevents*")] != []
    assert "batch size 8 → 16 (staged)" in capsys.readouterr().out


def test_a_run_that_has_just_started_reads_as_empty_columns(run_folder: Path):
    (run_folder / "config.gin").unlink()
    run = read_run(run_folder)
    assert set(run.train) == set(TRAIN_COLUMNS)
    assert set(run.validation) == set(VALIDATION_COLUMNS)
    assert all(len(column) == 0 for column in run.train.values())
    assert run.config == ""


def test_new_numbers_become_columns_and_other_values_do_not(run_folder: Path):
    extra = [train_record(1) | {"noise_scale": 3.5, "note": "x"}, train_record(2)]
    write(run_folder / "metrics.jsonl", extra)
    run = read_run(run_folder)
    np.testing.assert_array_equal(run.train["noise_scale"], [3.5, np.nan])
    assert "note" not in run.train


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run folder: it has no run.json"),
        ('{"name": "x"', "run.json is damaged"),
        ('{"name": "x"}', "run.json has no total_examples"),
        ("[]", r"run.json: \[\]: input should be an object"),
        ('{"name": 3, "total_examples": 8}', "run.json: name = 3: input should be a valid string"),
        (
            '{"name": "x", "total_examples": 0}',
            "run.json: total_examples = 0: input should be greater than or equal to 1",
        ),
        ('{"name": "x", "total_examples": 8.0}', "run.json: total_examples = 8.0: input should be a valid integer"),
        ('{"name": "x", "total_examples": 8, "total_examples": 9}', "run.json has 'total_examples' twice"),
        ('{"name": "x", "total_examples": 8, "unit": "a b"}', "run.json: unit = 'a b': string should match pattern"),
        (
            '{"name": "x", "total_examples": 8, "flops_per_token": "6"}',
            "flops_per_token = '6' must be a number of at least 0",
        ),
        (
            '{"name": "x", "total_examples": 8, "fixed": {"model": []}}',
            r"fixed.model = \[\]: input should be an object",
        ),
        (
            '{"name": "x", "total_examples": 8, "fixed": {"arrays": {"a": "float32[-1]"}}}',
            r"arrays.a = 'float32\[-1\]'",
        ),
        ('{"name": "x", "more": ' + "[" * 100_000, r"run.json is damaged \(invalid JSON: recursion limit exceeded"),
    ],
)
def test_what_is_no_run_is_a_clear_error(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}.*{message}"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("train", {"loss": "low"}, "train records: loss is no number in one of them"),
        ("train", {"loss": True}, "train records: loss is no number in one of them"),
        ("train", {"loss": 10**400}, "train records: loss is no number in one of them"),
        ("train", {"learning_rate": [1e-3]}, "train records: learning_rate is no number in one of them"),
        ("train", {"batch_size": 8.0}, "train records: batch_size is missing or no whole number in one of them"),
        ("train", {"step": None}, "train records: step is missing or no whole number in one of them"),
        ("train", {"step": 2**70}, "train records: step is no number in one of them"),
        ("train", {"batch_size": 0}, "train record 3: batch_size = 0 must be a whole number of at least 1"),
        ("train", {"microbatches": 1.5}, "train record 3: microbatches = 1.5 must be a whole number of at least 1"),
        ("train", {"tokens_seen": -3}, "train record 3: units_seen = -3 must be a whole number of at least 0"),
        ("train", {"seconds": -0.5}, "train record 3: seconds = -0.5 must be at least 0"),
        ("train", {"gradient_norm": 1.7e308}, r"train record 3: gradient_norm = 1.7e\+308 is beyond 1e\+300"),
        ("validation", {"loss": {}}, "validation records: loss is no number in one of them"),
        (
            "validation",
            {"examples_seen": 96},
            "validation record 3: examples_seen = 64 lies before that of the record b",
        ),
        ("batch_size", {"to": "16"}, "batch_size records: 0.to = '16': input should be a valid integer"),
        ("batch_size", {"reason": None}, "batch_size records: 0.reason = None: input should be a valid string"),
        ("warning", {"message": ["x"]}, r"warning records: 0.message = \['x'\]: input should be a valid string"),
        ("warning", {"step": -1}, "warning records: 0.step = -1: input should be greater than or equal to 0"),
        ("warning", {"first_example": "0"}, "warning records: 0.first_example = '0': input should be a valid integer"),
        ("rollback", {"message": None}, "rollback records: 0.message = None: input should be a valid string"),
        ("rollback", {"to": -8}, "rollback records: 0.to = -8: input should be greater than or equal to 0"),
        ("sample", {"text": 3}, "sample records: 0.text = 3: input should be a valid string"),
        ("time", {"wall_seconds": "1"}, "time records: 0.wall_seconds = '1': input should be a valid number"),
    ],
)
def test_a_record_that_is_none_of_its_kind_is_named(run_folder: Path, kind: str, change: dict, message: str):
    at = {"step": 8, "examples_seen": 64, "tokens_seen": 8192, "seconds": 0.1}
    spent = {f"{part}_seconds": 0.1 for part in ("wall", "compile", "evaluation", "saving", "lost")}
    more = [
        {"kind": "sample", **at, "prompt": "a", "text": "b"},
        {"kind": "rollback", **at, "to": 32, "first_example": 32, "last_example": 63, "message": "back"},
        {"kind": "time", **at, **spent},
        {"kind": "probe", **at, "of": "a probe's own", "norm": 1.0},
        {"kind": "validation", **at, "loss": 1.0},
    ]
    records = [*all_records(8), *more]
    write(run_folder / "metrics.jsonl", records)
    read_run(run_folder)
    of_kind = [record for record in records if record["kind"] == kind]
    of_kind[min(2 if kind == "train" else 1, len(of_kind) - 1)] |= change
    write(run_folder / "metrics.jsonl", records)
    with pytest.raises(UserError, match=rf"metrics\.jsonl: {message}"):
        read_run(run_folder)


def masked(data: bytes) -> int:
    """The TFRecord format's checksum, from its definition: a CRC-32C rotated right by 15 bits plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def read_events(folder: Path) -> list[Event]:
    events = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,), check = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
            body = data[12 : 12 + length]
            assert check == (masked(data[:8]),)
            assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked(body),)
            events.append(Event.FromString(body))
            data = data[16 + length :]
    return events


def test_tensorboard_events_hold_the_scalars_against_examples(tmp_path: Path):
    writer = TensorBoardWriter(tmp_path, 0, interval_seconds=0.0)
    for record in all_records(8):
        writer(record)
    writer.close()
    version, start, *events = read_events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (SessionLog.START, 0)
    scalars = {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}
    assert {step for tag, step in scalars if tag == "train/loss"} == set(range(8, 72, 8))
    assert scalars["train/loss", 24] == np.float32(1.0 + 1.0 / 9.0)
    assert scalars["validation/loss", 64] == np.float32(0.8)
    assert scalars["batch_size/to", 40] == 16.0
    assert ("train/mfu", 8) not in scalars
    assert ("train/examples_seen", 8) not in scalars


def test_tensorboard_training_events_are_thinned_in_time_and_the_last_gets_in(tmp_path: Path):
    now = 0.0
    writer = TensorBoardWriter(tmp_path, 0, interval_seconds=0.5, clock=lambda: now)
    for step in range(1, 52):
        now = step * 0.125
        writer(train_record(step, batch_size=1))
    writer.close()
    assert [event.step for event in read_events(tmp_path)[2:]] == [*range(1, 50, 4), 51]


def test_a_resumed_tensorboard_writer_forgets_what_lies_past_the_checkpoint(tmp_path: Path):
    for resume_at_examples in (0, 40):
        TensorBoardWriter(tmp_path, resume_at_examples).close()
    starts = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert starts == [0, 41]  # TensorBoard drops the steps from this one on


def progress(width: int = 200, *, terminal: bool = False, **options) -> tuple[ProgressLine, io.StringIO]:
    screen = io.StringIO()
    console = Console(
        file=screen, width=width, force_terminal=terminal, legacy_windows=False, _environ={"TERM": "xterm"}
    )
    return ProgressLine(800, "warm[red]up", console, **options), screen


def test_a_plain_line_comes_at_first_then_each_ten_seconds_and_at_last():
    now = 0.0
    line, screen = progress(clock=lambda: now)
    for step in range(1, 101):
        now = 0.25 * step
        line(train_record(step, mfu=0.414))
    line.close()
    lines = screen.getvalue().splitlines()
    assert [re.search(r"step (\d+)", text)[1] for text in lines] == ["1", "41", "81", "100"]  # type: ignore[index]
    first = "warm[red]up    1%  0:01 left  loss 2.500  102k tok/s  batch 8  lr 1.00e-03  MFU 41.4%  step 1"
    assert lines[0] == first
    assert "100%  in 0:01  loss 2.500" in lines[-1]
    assert "\x1b" not in screen.getvalue()


def test_changes_and_warnings_are_permanent_lines_and_the_validation_loss_is_shown():
    line, screen = progress(clock=lambda: 0.0)
    for record in all_records(8):
        line(record)
    line({"kind": "rollback", "step": 8, "examples_seen": 64, "to": 32, "message": "as at 32 examples again"})
    line.close()
    lines = screen.getvalue().splitlines()
    assert "warm[red]up  step 8 (8%)  rollback: as at 32 examples again" in lines
    assert "warm[red]up  step 5 (5%)  batch size 8 → 16 (staged)" in lines
    assert any(text.startswith("warm[red]up  step 7 (7%)  warning: odd") for text in lines)
    assert "val 0.800" in lines[-1]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (20, "    8%"),
        (40, "    8%  0:01 left  loss 1.058"),
        (80, "    8%  0:01 left  loss 1.058  102k tok/s  batch 8  lr 1.00e-03"),
        (112, f"  {'━' * 17}    8%  0:01 left  loss 1.058  102k tok/s  batch 8  lr 1.00e-03  val 0.800  step 8"),
        (200, f"  {'━' * 24}    8%  0:01 left  loss 1.058  102k tok/s  batch 8  lr 1.00e-03  val 0.800  step 8"),
    ],
)
def test_the_live_line_shows_what_fits_the_terminal(width: int, shown: str):
    line, screen = progress(width, terminal=True)
    for record in all_records(8):
        line(record)
    line.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    last = re.split(r"[\r\n]+", text.rstrip())[-1]
    assert last == f"warm[red]up{shown}"
    assert len(last) <= width
    assert "step 5 (5%)  batch size 8 → 16 (staged)\n" in text


def test_a_progress_line_without_records_prints_nothing():
    line, screen = progress()
    line.close()
    assert screen.getvalue() == ""


@unhurried
@given(
    values=st.lists(st.tuples(st.floats(-10, 10), st.floats(0.5, 50)), min_size=1, max_size=30),
    parts=st.integers(1, 4),
)
def test_the_running_mean_does_not_depend_on_how_the_data_are_cut(values: list[tuple[float, float]], parts: int):
    whole, cut = RunningMean(40.0), RunningMean(40.0)
    for value, weight in values:
        whole.add(value, weight)
        for _ in range(parts):
            cut.add(value, weight / parts)
    # By definition: weights exp(-age/window), integrated over each value's stretch.
    ends = np.cumsum([weight for _, weight in values])
    starts = ends - [weight for _, weight in values]
    weights = np.exp((ends - ends[-1]) / 40.0) - np.exp((starts - ends[-1]) / 40.0)
    expected = np.dot(weights, [value for value, _ in values]) / weights.sum()
    assert whole.value == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert cut.value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_running_mean_leaves_out_what_is_not_finite():
    mean = RunningMean(1.0)
    assert math.isnan(mean.add(math.inf, 1.0))
    assert mean.add(2.0, 1.0) == 2.0
    assert mean.add(math.nan, 1.0) == 2.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999.6, "1k"), (15_623, "15.6k"), (999_999, "1M"), (4e9, "4B"), (-2.5e12, "-2.5T")],
)
def test_compact_numbers(value: float, text: str):
    assert compact(value) == text


def test_a_writer_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no writer 'mlflow'; there are wandb"):
        run_observers(tmp_path, resume_at_examples=0, total_examples=8, label="a run", writers=["mlflow"])


@pytest.mark.parametrize(("mode", "ids"), [("online", 1), ("offline", 3), ("dryrun", 3)])
def test_parts_of_a_resumed_run_share_an_id_only_with_the_service_itself(tmp_path, monkeypatch, mode, ids):
    begun = []

    class Sent:
        define_metric = finish = log = lambda *values, **named: None

    class Client:
        Settings = dict

        def init(self, **arguments):
            begun.append(arguments)
            return Sent()

        def setup(self):
            return SimpleNamespace(settings=SimpleNamespace(mode=mode))

    monkeypatch.setitem(sys.modules, "wandb", Client())
    for _ in range(3):
        run_observers(tmp_path, resume_at_examples=0, total_examples=80, label="run", writers=["wandb"]).close()
    name = (tmp_path / "wandb_id").read_text()
    assert len({part["id"] for part in begun}) == ids
    assert all(part["id"] == name or part["group"] == name for part in begun)


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    records = all_records(8)
    for _ in range(2):  # each a part of its own, in one group: the later one synced would replace the other
        observers = run_observers(tmp_path, resume_at_examples=0, total_examples=80, label="a run", writers=["wandb"])
        for record in records:
            observers(record)
        observers.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    name = (tmp_path / "wandb_id").read_text()
    assert len({file.stem for file in files}) == 2
    assert all(file.stem.startswith(f"run-{name}-") and name.encode() in file.read_bytes() for file in files)
    content = files[0].read_bytes()  # records one after the other, their keys and JSON values as they are
    losses = [r["loss"] for r in records if r["kind"] == "validation"]
    assert all(re.search(rb"validation/loss.{0,8}" + json.dumps(x).encode(), content, re.DOTALL) for x in losses)
    last = [r["loss"] for r in records if r["kind"] == "train"][-1]  # the one in between is thinned out
    assert re.search(rb"train/loss.{0,8}" + json.dumps(last).encode(), content, re.DOTALL)
