"""What the tests with real processes share: how often, by which seed, and what became of a run."""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCALE = float(os.environ.get("CRESCENDO_CHAOS_SCALE", "1"))

# A run whose batch moves, by plan, with the noise scale measured along it.
MEASURED = (
    "train.noise_scale = @gradient_noise_scale()",
    "train.max_microbatch_examples = 4",
    "train.checkpoint_every_examples = 500",
)
STAGED = (
    "train.batch_size = @staged()",
    "staged.sizes = [8, 16, 32]",
    "staged.starts_examples = [0, 4000, 8000]",
)
MOVING = (*STAGED, *MEASURED)


def times(count: int) -> int:
    """So many, or that share of them which CRESCENDO_CHAOS_SCALE asks for."""
    return max(1, round(count * SCALE))


def random_moments() -> random.Random:
    """Of the test that runs, by the session's seed."""
    return random.Random(f"{os.environ['CRESCENDO_CHAOS_SEED']} {os.environ['PYTEST_CURRENT_TEST'].split(' (')[0]}")


def examples_seen(run: Path) -> int:
    """Of the last record."""
    metrics = run / "metrics.jsonl"
    try:
        seen = re.findall(rb'"examples_seen": (\d+)', metrics.read_bytes())
    except FileNotFoundError:
        return 0
    return int(seen[-1]) if seen else 0


def checkpoints(run: Path) -> list[int]:
    """The examples of every complete checkpoint, increasing."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def half_saved(run: Path) -> list[str]:
    """The names of the checkpoints that are being written."""
    return [path.name for path in (run / "checkpoints").glob("*tmp*")]


def fingerprints(run: Path) -> list[int]:
    """Of every array of the newest checkpoint: parameters and what the optimizer keeps."""
    said = json.loads((run / "checkpoints" / str(checkpoints(run)[-1]) / "meta" / "metadata").read_text())
    found = _found(said, "fingerprints")
    assert found
    return found


def _found(tree: Any, name: str) -> Any:
    if not isinstance(tree, dict):
        return None
    return tree[name] if name in tree else next(filter(None, (_found(each, name) for each in tree.values())), None)


def wait_until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 400) -> None:
    """Until it holds, or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> bool:
    """SIGKILL; whether the process was still there."""
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    return process.returncode == -signal.SIGKILL


def finish(process: subprocess.Popen, seconds: float = 1000) -> str:
    """Its output, of a process that ends as it should."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    assert_clean(output)
    return output


def assert_clean(output: str) -> None:
    """Neither a traceback nor what threads say of an interpreter that ends."""
    for word in ("Traceback", "Exception ignored", "cannot schedule new futures", "Fatal Python error", "*** Check"):
        assert word not in output, output


def hears_ctrl_c() -> None:
    """For a process that is started, in it: also where the tests run behind `&`, by which nothing hears Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def errors(output: str) -> list[str]:
    """The lines that say what is wrong."""
    return [line for line in output.splitlines() if line.startswith("error: ")]
