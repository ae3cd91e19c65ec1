"""Signals at odd moments, from the program's first line to its last: saved and said, or ended without a traceback."""

import random
import signal
import subprocess
import sys
import time

import pytest
from faults import (
    MOVING,
    assert_clean,
    checkpoints,
    errors,
    examples_seen,
    fingerprints,
    finish,
    half_saved,
    hears_ctrl_c,
    random_moments,
    times,
    wait_until,
)

from crescendo.experiments.runs.run import is_complete

TOTAL = 6_144
SIGNALS = 60
BINDINGS = (f"TOTAL_EXAMPLES = {TOTAL}", *MOVING)
STOPPED = {-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM}


def heeds_signals(process: subprocess.Popen) -> None:
    """Waits for the first line of the program: before it Python itself starts, which says tracebacks of its own."""

    def caught() -> int:
        try:
            with open(f"/proc/{process.pid}/status") as status:
                (mask,) = (int(line.split()[1], 16) for line in status if line.startswith("SigCgt:"))
        except (FileNotFoundError, ProcessLookupError, ValueError):  # it ends
            return 0
        return mask >> (signal.SIGINT - 1) & 1

    wait_until(caught, process)  # by Python, which listens while it starts
    wait_until(lambda: not caught(), process)  # by nobody, while the program imports what it needs


def send_signals(process: subprocess.Popen, run, moments: random.Random) -> str:
    """One or two signals at a random moment of the program; says which and when."""
    heeds_signals(process)
    when = moments.choice(("start", "start", "training", "saving", "end"))
    match when:
        case "start":
            time.sleep(moments.random() * 10)
        case "training":
            before = examples_seen(run)
            wait_until(lambda: examples_seen(run) > before, process)
            time.sleep(moments.random() * 0.5)
        case "saving":
            wait_until(lambda: half_saved(run), process)
        case "end":
            wait_until(lambda: examples_seen(run) >= TOTAL, process)
            time.sleep(moments.random() * 3)
    which = moments.choice(("SIGINT", "SIGTERM", "SIGINT SIGINT", "SIGTERM SIGINT")).split()
    for name in which:
        process.send_signal(signal.Signals[name])
        time.sleep(moments.random() * 0.3)
    return f"{' '.join(which)} ({when})"


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(6))
def test_signals_at_odd_moments_save_and_say_so_or_end_without_a_word(start_train, tmp_path, records, number):
    moments, whole = random_moments(), tmp_path / "whole"
    finish(start_train(whole, *BINDINGS))
    run, left = tmp_path / "run0", times(SIGNALS // 6)
    while left:
        process = start_train(run, *BINDINGS, preexec_fn=hears_ctrl_c)
        sent = send_signals(process, run, moments)
        output, _ = process.communicate(timeout=600)
        print(f"{sent}: {process.returncode} at {examples_seen(run)} of {TOTAL}")
        assert_clean(output)
        assert not errors(output), output
        assert process.returncode in STOPPED | {0}, output
        if f"saved {run} at" in output:
            assert process.returncode != 0, output
            assert checkpoints(run)[-1] == examples_seen(run), output
            assert "the same command goes on from there" in output.replace("\n", " ")
        if process.returncode == 0:
            assert is_complete(run), output
        left -= 1
        if is_complete(run):
            finish(start_train(run, *BINDINGS))
            assert records(run) == records(whole)
            run = tmp_path / f"run{left}"
    finish(start_train(run, *BINDINGS))
    assert records(run) == records(whole)
    assert fingerprints(run) == fingerprints(whole)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "crescendo.experiments.train", "--list"],
        ["-m", "crescendo.experiments", "doctor"],
        ["-m", "crescendo.experiments.describe", "--model", "debug"],
        [
            "-c",
            "import sys; sys.argv = ['crescendo', 'report', '--help']; from crescendo.experiments import run; run()",
        ],
    ],
    ids=lambda command: command[-1].split()[-1],
)
def test_ctrl_c_ends_any_command_from_its_first_line_on(command):
    """Every time, within a moment, and without a traceback."""
    moments = random_moments()
    began = time.monotonic()
    subprocess.run([sys.executable, *command], capture_output=True, check=True)
    takes = time.monotonic() - began
    for _ in range(times(10)):
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=hears_ctrl_c,
        )
        heeds_signals(process)
        time.sleep(moments.random() * takes)
        process.send_signal(signal.SIGINT)
        signalled = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert_clean(output)
        # It may have been at its end.
        assert process.returncode in (0, 130, -signal.SIGINT), output
        assert time.monotonic() - signalled < 10


@pytest.mark.chaos
def test_sigterm_saves_says_how_to_go_on_and_exits_143(start_train, tmp_path):
    run = tmp_path / "run"
    process = start_train(run, *BINDINGS, preexec_fn=hears_ctrl_c)
    wait_until(lambda: examples_seen(run) >= 100, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "SIGTERM: saved" in output
    assert "the same command goes on from there" in output
    assert checkpoints(run)[-1] == examples_seen(run)


FAILS = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError

def main():
    {waits}
    print("said before")
    raise UserError("full")

run_command(main)
"""


@pytest.mark.chaos
@pytest.mark.parametrize(
    "waits",
    ["threading.Thread(target=time.sleep, args=(100,)).start()", "ThreadPoolExecutor(1).submit(time.sleep, 100)"],
    ids=["thread", "pool"],
)
def test_a_thread_that_waits_holds_up_no_command_that_has_failed(waits):
    command = [sys.executable, "-c", FAILS.format(waits=waits)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "said before\n", "error: full\n")
