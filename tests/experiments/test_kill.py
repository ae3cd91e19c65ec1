"""Runs killed at random moments, in processes of their own, and runs on disks that are full."""

import random
import re
import resource
import signal
import time

import pytest

from crescendo.experiments.runs.run import read_run

KILLS = 6
STAGED = (
    "TOTAL_EXAMPLES = 12288",
    "model.width = 64",
    "train.batch_size = @staged()",
    "staged.sizes = [8, 16, 32]",
    "staged.starts_examples = [0, 3000, 6000]",
    "train.checkpoint_every_examples = 500",
)


def fingerprints(run):
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    return (newest / "meta" / "metadata").read_text().split('"fingerprints"')[1]


def examples_seen(run):
    metrics = run / "metrics.jsonl"
    seen = re.findall(rb'"examples_seen": (\d+)', metrics.read_bytes()) if metrics.exists() else []
    return int(seen[-1]) if seen else 0


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_killed_at_random_moments_ends_bit_identical(start_train, tmp_path, records):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start_train(whole, *STAGED)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    moments = random.Random(time.time_ns())
    # One kill falls in the first examples, and one on each side of both batch-size changes; anywhere within.
    stages = [(1, 1500), (1500, 2990), (3010, 4500), (4500, 5990), (6010, 9000), (9000, 12000)]
    killed_at = []
    for low, high in stages[:KILLS]:
        process = start_train(killed, *STAGED)
        kill_at = moments.randint(low, high)
        while examples_seen(killed) < kill_at and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        killed_at.append(examples_seen(killed))
    process = start_train(killed, *STAGED)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    print(f"killed at {killed_at} of 12288 examples")
    assert records(killed) == records(whole)
    assert fingerprints(killed) == fingerprints(whole)
    assert {8, 16, 32} <= set(read_run(killed).train["batch_size"])


@pytest.mark.chaos
def test_sigterm_saves_says_how_to_go_on_and_exits_143(start_train, tmp_path):
    run = tmp_path / "run"
    process = start_train(run, *STAGED)
    while examples_seen(run) < 100 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "SIGTERM: saved" in output
    assert "the same command goes on from there" in output
    assert int(max((run / "checkpoints").iterdir()).name) == examples_seen(run)


@pytest.mark.chaos
def test_a_second_process_is_refused_while_the_first_lives(start_train, tmp_path):
    run = tmp_path / "run"
    first = start_train(run, *STAGED, "TOTAL_EXAMPLES = 500_000")
    while examples_seen(run) < 10 and first.poll() is None:
        time.sleep(0.01)
    second = start_train(run, *STAGED)
    output, _ = second.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert f"is in use by process {first.pid}" in output
    assert "Traceback" not in output, output


@pytest.mark.chaos
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(start_train, train_small, tmp_path):
    run = tmp_path / "run"
    train_small(tmp_path / "prepares_the_data", "TOTAL_EXAMPLES = 128")

    def no_file_over_16_kilobytes():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))

    shorter = [binding for binding in STAGED if not binding.startswith("TOTAL")]
    process = start_train(
        run,
        *shorter,
        "staged.starts_examples = [0, 100, 200]",
        preexec_fn=no_file_over_16_kilobytes,
        environment={"JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "Traceback" not in output, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(run) in errors[0]
    again = start_train(run, *shorter, "staged.starts_examples = [0, 100, 200]")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
