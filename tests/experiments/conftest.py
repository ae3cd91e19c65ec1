"""The program small: runs' folders without running, commands to their end, compiled quickly."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crescendo.experiments.reports import plots


@pytest.fixture(autouse=True, scope="module")
def _quick(quick_compilation):
    """For every module of the folder: its runs are short, and compiled for each batch size."""


@pytest.fixture(autouse=True, scope="module")
def _drawn_elsewhere():
    """Charts cost most of a report, and are drawn in the reports' own tests: here they are no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "render", lambda chart, arms: b"")
        yield


@pytest.fixture
def run_experiment():
    """`run_experiment(module, *arguments)`: a command on one CPU device, to its end."""

    def call(module: str, *arguments: str) -> None:
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        subprocess.run(
            [sys.executable, "-m", f"crescendo.experiments.{module}", *arguments], check=True, env=environment
        )

    return call


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
