"""Runs of several processes, joined over loopback: killed, resumed with another number of them, the same losses."""

import math
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
from faults import (
    assert_clean,
    checkpoints,
    errors,
    examples_seen,
    half_saved,
    hears_ctrl_c,
    random_moments,
    wait_until,
)

from crescendo.experiments.runs.records import read_records
from crescendo.parallel.hosts import Process, join

# Within which the others end when one is killed: what a loaded machine takes to wake them.
BOUND_SECONDS = 20
DEVICES = 4
EVALUATE_EVERY = 512
MESH = (
    "TOTAL_EXAMPLES = 4096",
    "train.batch_size = @staged()",
    "staged.sizes = [8, 16]",
    "staged.starts_examples = [0, 2000]",
    "train.checkpoint_every_examples = 256",
    f"train.evaluate_every_examples = {EVALUATE_EVERY}",
    "train.evaluation_examples = 48",
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
        hosts = [["--hosts", f"127.0.0.1:{port},{i},{count}", "--join-seconds", "300"] for i in range(count)]
        new = [start_train(run, *MESH, *bindings, arguments=each, environment=environment) for each in hosts]
        started.extend(new)
        return new

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def finish(processes, timeout=1000):
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


def in_evaluation(run) -> bool:
    """Whether the last step has reached an evaluation that isn't recorded yet."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return False
    at = {kind: 0 for kind in ("train", "validation")}
    at |= {record["kind"]: record["examples_seen"] for record in read_records(path)}
    return at["train"] // EVALUATE_EVERY > at["validation"] // EVALUATE_EVERY


def wait_for_phase(phase, run, process, moments):
    """Until the run is there, a random moment later."""
    before = examples_seen(run)
    conditions = {
        "compiling": lambda: (run / ".lock").exists() and str(process.pid) in (run / ".lock").read_text(),
        "training": lambda: examples_seen(run) > before,
        "evaluating": lambda: examples_seen(run) > before and in_evaluation(run),
        "saving": lambda: examples_seen(run) > before and half_saved(run),
    }
    wait_until(conditions[phase], process)
    time.sleep(moments.random() * {"compiling": 3.0, "training": 0.5}.get(phase, 0.01))


@pytest.mark.chaos
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("count", "victim"), [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)])
def test_where_one_is_killed_the_others_end_with_one_line_and_the_same_command_goes_on(
    start_hosts, tmp_path, count, victim
):
    run, moments = tmp_path / "run", random_moments()
    for phase in ("compiling", "training", "evaluating", "saving"):
        processes = start_hosts(run, count)  # the same command each time: it goes on
        wait_for_phase(phase, run, processes[0], moments)
        processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        print(f"{phase}: process {victim} of {count} killed at {examples_seen(run)}, {time.monotonic() - killed:.2f} s")
        assert time.monotonic() - killed < BOUND_SECONDS
        assert processes[victim].returncode == -signal.SIGKILL, outputs
        for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            if index != victim:
                assert process.returncode == 2, output
                assert_clean(output)
                assert "terminate called" not in output, output
                (line,) = errors(output)
                assert line.startswith(f"error: process {victim} of the {count} of this run has ended")
    finish(start_hosts(run, 1))


@pytest.mark.chaos
@pytest.mark.timeout(2400)
def test_killed_and_resumed_with_another_number_of_processes_the_losses_are_the_same(start_hosts, tmp_path, records):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start_hosts(whole, 1))
    moments = random_moments()
    for count, (low, high) in zip((2, 4, 1), ((300, 1000), (1100, 2200), (2300, 3500)), strict=True):
        processes = start_hosts(killed, count)
        at = moments.randint(low, high)
        wait_until(lambda at=at: examples_seen(killed) >= at, processes[0])
        moments.choice(processes).send_signal(signal.SIGKILL)
        for process in processes:
            output, _ = process.communicate(timeout=60)  # the others notice, and end
            assert process.returncode != 0, output
            assert_clean(output)
        print(f"{count} processes, killed at {examples_seen(killed)} of 4096 examples")
    finish(start_hosts(killed, 2))
    assert records(killed) == records(whole)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("process", [0, 1])
def test_a_part_that_one_process_cannot_read_is_damage_to_all(start_hosts, tmp_path, process):
    run = tmp_path / "run"
    processes = start_hosts(run, 2)
    wait_until(lambda: len(checkpoints(run)) == 2, processes[0])
    processes[0].send_signal(signal.SIGTERM)
    for each in processes:
        each.communicate(timeout=300)
    *_, before, newest = checkpoints(run)
    parts = run / "checkpoints" / str(newest) / "state" / f"ocdbt.process_{process}" / "d"
    largest = max(parts.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 3)
    processes = start_hosts(run, 2, "TOTAL_EXAMPLES = 1024")
    outputs = [each.communicate(timeout=300)[0] for each in processes]
    assert [each.returncode for each in processes] == [0, 0], outputs
    assert outputs[0].count("is damaged") == 1, outputs[0]
    assert f"going on at {before:,}" in outputs[0]
    assert run.joinpath(f"damaged_checkpoint_{newest}").is_dir()


JOINED = """
import sys, time
from crescendo.experiments.runtime.cli import hosts_lost, run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.parallel import hosts

def main():
    hosts.join(sys.argv[1], timeout_seconds=60, heartbeat_seconds=10)
    print("joined", flush=True)
    sys.stdin.readline()
    {then}

run_command(main)
"""


@pytest.fixture
def joined():
    """`joined(then)`: two processes that have joined, and do that when told a line.

    With `slurm` they find each other by what SLURM's variables say, instead of by an address.
    """
    started: list[subprocess.Popen] = []

    def call(then: str, slurm: bool = False) -> list[subprocess.Popen]:
        address, code = f"127.0.0.1:{free_port()}", JOINED.format(then=then)
        job = {"SLURM_JOB_ID": str(random.randrange(4096)), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        new = [
            subprocess.Popen(
                [sys.executable, "-c", code, "auto" if slurm else f"{address},{i},2", str(i)],
                preexec_fn=hears_ctrl_c,
                env=os.environ | (job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} if slurm else {}),
                **pipes,
            )
            for i in range(2)
        ]
        started.extend(new)
        for process in new:
            assert process.stdout.readline() == "joined\n"
        return new

    yield call
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.chaos
@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_is_there_and_silent_is_noticed_within_the_heartbeat(joined, silent):
    processes = joined("time.sleep(60)")
    processes[silent].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    output, _ = processes[1 - silent].communicate("\n", timeout=60)
    assert time.monotonic() - began < 10 + BOUND_SECONDS
    assert processes[1 - silent].returncode == 2
    assert len(errors(output)) == len(output.strip().splitlines()) == 1, output


@pytest.mark.chaos
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("error", "code", "says"), [("UserError('full')", 2, "error: full\n"), ("KeyError('bug')", 1, "KeyError: 'bug'\n")]
)
def test_one_that_fails_says_why_and_the_other_that_it_has_ended(joined, failing, error, code, says):
    processes = joined(f"if sys.argv[2] == '{failing}': raise {error}\n    time.sleep(60)")
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    began = time.monotonic()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert time.monotonic() - began < BOUND_SECONDS
    assert (processes[failing].returncode, processes[1 - failing].returncode) == (code, 2), outputs
    assert outputs[failing].endswith(says)
    (line,) = outputs[1 - failing].splitlines()
    assert line.startswith(f"error: process {failing} of the 2 of this run has ended")


@pytest.mark.chaos
@pytest.mark.parametrize("interrupted", [0, 1])
def test_ctrl_c_in_one_ends_both(joined, interrupted):
    processes = joined("time.sleep(60)")
    processes[interrupted].send_signal(signal.SIGINT)
    outputs = [process.communicate("\n", timeout=60)[0] for process in processes]
    assert (processes[interrupted].returncode, processes[1 - interrupted].returncode) == (130, 2), outputs
    assert outputs[interrupted].startswith("interrupted; what was saved is kept")
    assert outputs[1 - interrupted].startswith(f"error: process {interrupted} of the 2 of this run has ended")
    assert all(len(output.splitlines()) == 1 for output in outputs), outputs


@pytest.mark.chaos
@pytest.mark.parametrize("killed", [0, 1])
def test_processes_that_a_cluster_brought_together_watch_each_other_too(joined, killed):
    processes = joined("time.sleep(60)", slurm=True)
    processes[killed].kill()
    output, _ = processes[1 - killed].communicate("\n", timeout=60)
    (line,) = output.splitlines()
    assert line.startswith(f"error: process {killed} of the 2 of this run has ended")
    assert processes[1 - killed].returncode == 2


@pytest.mark.chaos
def test_processes_that_end_well_at_different_times_say_nothing(joined):
    processes = joined("time.sleep(3 * int(sys.argv[2]))")
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs == ["", ""]


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_sigterm_to_one_process_stops_and_saves_all(start_hosts, tmp_path):
    run = tmp_path / "run"
    processes = start_hosts(run, 2)
    wait_until(lambda: examples_seen(run) >= 200, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
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
        ("host:99999,0,2", "the port 99999 must be from 1 to 65535"),
        ("host:0,0,2", "the port 0 must be from 1 to 65535"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Process.parse(text)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, math.inf, math.nan])
def test_a_time_that_no_process_can_wait_is_refused(seconds):
    with pytest.raises(ValueError, match="must be above 0 and at most"):
        join("10.0.0.1:80,0,2", timeout_seconds=seconds)
