"""Disks that are full, folders that may not be written: one line, nothing lost, and then the same command goes on."""

import os
import resource
import shutil
import signal
import subprocess

import pytest
from faults import MOVING, assert_clean, errors, examples_seen, fingerprints, finish, wait_until

BINDINGS = ("TOTAL_EXAMPLES = 1024", *MOVING, "staged.starts_examples = [0, 300, 600]", "model.width = 64")
# What the cache of compiled programs can't write it says in warnings of its own.
ENVIRONMENT = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


@pytest.fixture(scope="module")
def whole(start_train, tmp_path_factory):
    """The run without a fault; its data are prepared."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(start_train(run, *BINDINGS))
    return run


def limited(size_bytes: int):
    """No file beyond so many bytes; what would be longer is an error, as on a full disk."""

    def call() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))

    return call


def assert_one_line(process: subprocess.Popen, run) -> None:
    """That names what is in the run's folder."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    assert_clean(output)
    assert len(errors(output)) == 1, output
    assert str(run) in errors(output)[0]


def assert_goes_on(start_train, run, whole, records) -> None:
    finish(start_train(run, *BINDINGS))
    assert records(run) == records(whole)
    assert fingerprints(run) == fingerprints(whole)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("begun", [False, True], ids=["at the beginning", "on going on"])
@pytest.mark.parametrize("kib", [0, 1, 4, 16, 32, 64])
def test_a_disk_on_which_no_file_fits_beyond_a_size(start_train, tmp_path, whole, records, kib, begun):
    run = tmp_path / "run"
    if begun:
        process = start_train(run, *BINDINGS)
        wait_until(lambda: examples_seen(run) >= 500, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    process = start_train(run, *BINDINGS, preexec_fn=limited(1024 * kib), environment=ENVIRONMENT)
    assert_one_line(process, run)
    assert_goes_on(start_train, run, whole, records)


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(kib)`: a folder on a disk of that size, where this machine lets one be mounted."""
    mounted = []

    def call(kib: int):
        disk = tmp_path / f"disk{kib}"
        disk.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield call
    for disk in mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kib", [16, 128, 512, 1024])
def test_a_disk_that_fills_up(start_train, tmp_path, small_disk, whole, records, kib):
    run = small_disk(kib) / "run"
    assert_one_line(start_train(run, *BINDINGS, environment=ENVIRONMENT), run)
    moved = tmp_path / "on_a_larger_one"
    shutil.copytree(run, moved)
    assert_goes_on(start_train, moved, whole, records)


@pytest.fixture
def plain_user():
    """Of `Popen`: what a process of root's needs to be refused what others are."""
    if os.geteuid():
        return []
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True) if shutil.which("setpriv") else None
    if tried is None or tried.returncode:
        pytest.skip("root may write everywhere, and setpriv can't take that away here")
    return prefix


@pytest.mark.chaos
@pytest.mark.parametrize("name", [".", "checkpoints", "metrics.jsonl", "run.json"])
def test_what_may_not_be_written_is_said_in_one_line(start_train, tmp_path, whole, plain_user, records, name):
    run = tmp_path / "run"
    process = start_train(run, *BINDINGS)
    wait_until(lambda: examples_seen(run) >= 500, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    path = run / name
    before = path.stat().st_mode
    path.chmod(before & ~0o777 | (0o555 if path.is_dir() else 0o000))
    try:
        output, _ = start_train(run, *BINDINGS, prefix=plain_user).communicate(timeout=600)
    finally:
        path.chmod(before)
    assert_clean(output)
    assert len(errors(output)) == 1, output
    assert "ermission denied" in errors(output)[0]
    assert "damaged" not in output
    assert_goes_on(start_train, run, whole, records)
