"""A small corpus and a small model: the whole program in a second or two."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from crescendo import parallel
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.trainer.training import train

SMALL_MODEL = (
    "model.width = 16",
    "model.layers = 1",
    "model.heads = 2",
    "model.kv_heads = 1",
    "model.mlp_width = 32",
)
WORDS = ("batch", "size", "noise", "scale", "warm", "up", "learning", "rate", "mesh", "kernel", "decay", "token")


@pytest.fixture(autouse=True, scope="module")
def _quick(quick_compilation):
    """For every module of the folder: its runs are short, and compiled for each batch size."""


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
    """`train_small(run, *bindings)`: trains in this process, on the first of its devices or on several."""

    def call(run: Path, *bindings: str, devices: int = 1) -> dict:
        mesh = parallel.make_mesh(devices=jax.devices()[:devices])
        return configurables.bind(train, ["debug.gin"], bindings, own=small_bindings)(run=str(run), mesh=mesh)

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
        lines = [line for line in lines if line["kind"] != "time"]
        return [{name: value for name, value in record.items() if name not in timed} for record in lines]

    return read


T = 128


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes run folders whose batch size doubles at the given fractions of 1,000 examples."""

    def make(
        name: str,
        *,
        loss: float | None = 2.0,
        batch_size: int = 2,
        doublings: tuple[float, ...] = (),
        total: int = 1000,
        seen_until: int | None = None,
        seconds_per_step: float = 0.05,
        config: str = "train.seed = 1\n",
        warnings: tuple[str, ...] = (),
        train_loss: Callable[[int], float] = lambda seen: 2.0 + 3.0 * math.exp(-seen / 50),
    ) -> Path:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        records: list[dict] = []
        step = seen = 0
        size = batch_size
        ahead = list(doublings)
        while seen < (total if seen_until is None else seen_until):
            if ahead and seen >= ahead[0] * total:
                at = {"step": step, "examples_seen": seen, "from": size, "to": 2 * size}
                records.append({"kind": "batch_size", **at, "reason": f"staged: {ahead.pop(0):.0%}"})
                size *= 2
            drawn = min(size, total - seen)
            step, seen = step + 1, seen + drawn
            at = {"step": step, "examples_seen": seen, "tokens_seen": seen * T, "seconds": step * seconds_per_step}
            rest = {"microbatches": 1, "gradient_norm": 1.0, "skipped_steps": 0, "tokens_per_second": 1.0, "mfu": None}
            rate = 1e-3 * (1 - seen / total)
            records.append(
                {"kind": "train", "loss": train_loss(seen), "learning_rate": rate, "batch_size": drawn, **at, **rest}
            )
            if loss is not None and step % 100 == 0:
                records.append({"kind": "validation", "loss": loss + 1.0, **at})
        if loss is not None and step:
            records.append({"kind": "validation", "loss": loss, **at})
        records += [
            {"kind": "warning", "step": step, "examples_seen": seen, "message": message} for message in warnings
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        info = {"total_examples": total, "device": "2 x cpu", "versions": {"jax": "0.11.2"}, "parameters": 705_408}
        (folder / "run.json").write_text(json.dumps({"name": name, **info, "peak_flops_per_second": None}))
        (folder / "config.gin").write_text(config)
        return folder

    return make
