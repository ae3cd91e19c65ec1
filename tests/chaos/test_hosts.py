"""Runs of several processes, joined over loopback: killed, resumed with another number of them, the same losses."""

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from crescendo.experiments.runs.records import read_records
from crescendo.parallel.hosts import Process

DEVICES = 4
MESH = (
    "TOTAL_EXAMPLES = 4096",
    "train.batch_size = @staged()",
    "staged.sizes = [8, 16]",
    "staged.starts_examples = [0, 2000]",
    "train.checkpoint_every_examples = 256",
    "train.max_microbatch_examples = 8",
    "train.noise_scale = @gradient_noise_scale()",
    "train.mesh = @mesh()",
    "mesh.data = 1",
    "mesh.fsdp = 2",
    "mesh.tensor = 2",
    "model.kv_heads = 2",
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start_hosts(start_train):
    """`start_hosts(run, count)`: the command as so many processes, of `DEVICES` devices in all."""
    started: list[subprocess.Popen] = []

    def call(run, count, *bindings) -> list[subprocess.Popen]:
        port, environment = free_port(), {"JAX_NUM_CPU_DEVICES": str(DEVICES // count)}
        hosts = [["--hosts", f"127.0.0.1:{port},{i},{count}", "--join-seconds", "60"] for i in range(count)]
        new = [start_train(run, *MESH, *bindings, arguments=each, environment=environment) for each in hosts]
        started.extend(new)
        return new

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def examples_seen(run) -> int:
    path = run / "metrics.jsonl"
    return max((r["examples_seen"] for r in read_records(path)), default=0) if path.exists() else 0


def wait_for(run, examples, processes):
    while examples_seen(run) < examples and all(p.poll() is None for p in processes):
        time.sleep(0.02)


def finish(processes, timeout=240):
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_killed_and_resumed_with_another_number_of_processes_the_losses_are_the_same(start_hosts, tmp_path, records):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start_hosts(whole, 1))
    moments = random.Random(time.time_ns())
    for count, (low, high) in zip((2, 4, 1), ((300, 1000), (1100, 2200), (2300, 3500)), strict=True):
        processes = start_hosts(killed, count)
        wait_for(killed, moments.randint(low, high), processes)
        victim = moments.choice(processes)
        victim.send_signal(signal.SIGKILL)
        for process in processes:
            output, _ = process.communicate(timeout=150)  # the others notice, and end
            assert process.returncode != 0, output
            assert "Traceback" not in output, output
        print(f"{count} processes, killed at {examples_seen(killed)} of 4096 examples")
    finish(start_hosts(killed, 2))
    assert records(killed) == records(whole)


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_a_sigterm_to_one_process_stops_and_saves_all(start_hosts, tmp_path):
    run = tmp_path / "run"
    processes = start_hosts(run, 2)
    wait_for(run, 200, processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "SIGTERM: saved" in outputs[0]
    assert int(max((run / "checkpoints").iterdir(), key=lambda f: int(f.name)).name) == examples_seen(run)


@pytest.mark.chaos
def test_each_process_reads_its_share_alone():
    code = """
        import sys
        import numpy as np
        from crescendo import parallel
        from crescendo.experiments.tasks.base import RowArray
        from crescendo.experiments.trainer.feed import Feed
        from crescendo.parallel import hosts

        hosts.join(sys.argv[1], timeout_seconds=60)

        class Recorded:
            row = {"tokens": RowArray((4,), "int32", ("length",))}
            seen = []

            def __len__(self):
                return 1000

            def take(self, numbers):
                self.seen.append(len(numbers))
                return {"tokens": np.zeros((len(numbers), 4), np.int32)}

        source = Recorded()
        layout = parallel.Layout(parallel.make_mesh(data=2, fsdp=2))
        rows = Feed(source, source, parallel.BatchPlan(4, 3), layout, seed=0).read(100, 8)["rows"]
        held = {int(x) for shard in rows["example"].addressable_shards for x in shard.data.ravel()}
        print(source.seen[0], sorted(held), rows["tokens"].shape)  # the next batch is read ahead
    """
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), f"{address},{i},2"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
        )
        for i in range(2)
    ]
    first, second = (process.communicate(timeout=100)[0] for process in processes)
    # Two microbatches of four, half of each a process; the third is not used, and is 0.
    assert "4 [0, 100, 101, 104, 105] (3, 4, 4)" in first
    assert "4 [0, 102, 103, 106, 107] (3, 4, 4)" in second


@pytest.mark.chaos
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_waits_in_vain_says_so_in_bounded_time(start_train, tmp_path, index):
    began = time.monotonic()
    hosts = ["--hosts", f"127.0.0.1:{free_port()},{index},2", "--join-seconds", "3"]
    process = start_train(tmp_path / "run", arguments=hosts)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert time.monotonic() - began < 30
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "all 2 processes did not join process 0 at 127.0.0.1" in line
    assert "within 3 s" in line
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.0.0.1", "must be 'auto' or HOST:PORT,INDEX,COUNT"),
        ("10.0.0.1:80,0", "must be 'auto' or HOST:PORT,INDEX,COUNT"),
        ("host:80,x,2", "must be 'auto' or HOST:PORT,INDEX,COUNT"),
        ("host:80,2,2", "the index 2 must be below the count 2"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Process.parse(text)
