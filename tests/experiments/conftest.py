"""A small corpus and a small model: the whole program in a second or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crescendo.experiments import configurables
from crescendo.experiments.train import train

SMALL_MODEL = (
    "model.width = 16",
    "model.layers = 1",
    "model.heads = 2",
    "model.kv_heads = 1",
    "model.mlp_width = 32",
)
WORDS = ("batch", "size", "noise", "scale", "warm", "up", "learning", "rate", "mesh", "kernel", "decay", "token")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """400 text files of random sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for i in range(400):
        words = random.choice(WORDS, size=random.integers(20, 80))
        (folder / f"{i:03}.txt").write_text(" ".join(words) + ".\n")
    return folder


@pytest.fixture(scope="session")
def small_bindings(corpus, tmp_path_factory) -> list[str]:
    """Bindings on top of debug.gin that make a run of 512 examples take a second."""
    return [
        "text_data.documents = @text_files()",
        f"text_files.paths = ['{corpus}/*.txt']",
        f"text_data.cache_directory = '{tmp_path_factory.mktemp('cache')}'",
        "SEQUENCE_LENGTH = 32",
        "TOTAL_EXAMPLES = 512",
        "schedules.linear.warmup = 64",
        "schedules.linear.peak = 1e-2",
        "train.batch_size = 16",
        "train.evaluation_examples = 16",
        *SMALL_MODEL,
    ]


@pytest.fixture(scope="session")
def train_small(small_bindings):
    """`train_small(run, *bindings)`: trains in this process."""

    def call(run: Path, *bindings: str) -> dict:
        return configurables.bind(train, ["debug.gin"], [*small_bindings, *bindings])(run=str(run))

    return call


@pytest.fixture
def start_train(small_bindings, tmp_path_factory):
    """`start_train(run, *bindings)`: the command in a process of its own, on one CPU device."""

    def call(run: Path, *bindings: str, **options) -> subprocess.Popen:
        arguments = [part for binding in (*small_bindings, *bindings) for part in ("--set", binding)]
        arguments += options.pop("arguments", [])
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "crescendo.experiments.train", "--run", str(run), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | options.pop("environment", {}),
            **options,
        )

    return call


@pytest.fixture
def run_experiment():
    """`run_experiment(module, *arguments)`: a command on one CPU device, to its end."""

    def call(module: str, *arguments: str) -> None:
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        subprocess.run(
            [sys.executable, "-m", f"crescendo.experiments.{module}", *arguments], check=True, env=environment
        )

    return call


@pytest.fixture
def records():
    """`records(run)`: the metrics of a run without what the clock on the wall decides."""

    def read(run: Path) -> list[dict]:
        timed = ("seconds", "tokens_per_second", "mfu")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in record.items() if name not in timed} for record in lines]

    return read
