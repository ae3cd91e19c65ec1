"""A run that goes on over other devices, meshes and batch sizes each time has the losses of one on one device."""

import itertools

import jax
import numpy as np
import pytest

from crescendo import optim, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runs.state import Clock
from crescendo.experiments.trainer import loop
from crescendo.experiments.trainer.batch_sizes import FixedBatchSizes
from crescendo.experiments.trainer.recorder import Recorder
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.training import make_recorder, train
from crescendo.models import ModelConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

MODEL = ModelConfig(vocab_size=128, width=32, layers=2, heads=8, kv_heads=4, mlp_width=64)
SIZES, LENGTH, KEPT = (8, 16, 24, 48), 32, 48
MESHES: dict[str, tuple[dict[str, int], parallel.Strategy]] = {
    "one device": ({"data": 1}, parallel.strategy("data")),
    "data 2": ({"data": 2}, parallel.strategy("data")),
    "fsdp 4": ({"data": 1, "fsdp": 4}, parallel.strategy("fsdp")),
    "zero1 8": ({"data": 1, "fsdp": 8}, parallel.strategy("zero1")),
    "zero2 2x4": ({"data": 2, "fsdp": 4}, parallel.strategy("zero2")),
    "fsdp 8": ({"data": 1, "fsdp": 8}, parallel.strategy("fsdp")),
    "data 2, tensor 4": ({"data": 2, "tensor": 4}, parallel.strategy("data")),
    "data 2, fsdp 2, tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, parallel.strategy("fsdp")),
    "ring 4": ({"data": 1, "sequence": 4}, parallel.strategy("fsdp")),
    "ulysses 4": ({"data": 2, "sequence": 4}, parallel.strategy("fsdp", ulysses=4)),
    "fsdp 2, tensor 2, ring 2": ({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, parallel.strategy("fsdp")),
}
QUICK = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}


def mesh_of(name: str):
    axes, _ = MESHES[name]
    return parallel.make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])


def over_all_pairs(names: list[str]) -> list[str]:
    """A closed way that goes between every two of an odd number of names once (Hierholzer's)."""
    left = {name: [other for other in names if other != name] for name in names}
    way, stack = [], [names[0]]
    while stack:
        if ahead := left[stack[-1]]:
            left[ahead[-1]].remove(stack[-1])
            stack.append(ahead.pop())
        else:
            way.append(stack.pop())
    return way


class KilledError(Exception):
    """Stands for a SIGKILL: nothing is saved or written after it."""


def arguments(total: int) -> dict:
    return {
        "data": RandomText(MODEL.vocab_size, LENGTH),
        "model": MODEL,
        "optimizer": optim.adamw(1e-3, weight_decay=0.1),
        "total_examples": total,
    }


def on_one_device(schedule: list[tuple[int, int]]) -> list[float]:
    """The losses of a run on one device that is never stopped, over batches of `(size, how many)`."""
    total = sum(size * count for size, count in schedule)
    session = Session(
        **arguments(total),
        batch_size=schedule[0][0],
        further_sizes=SIZES,
        max_microbatch_examples=8,
        mesh=mesh_of("one device"),
    )
    records: list[dict] = []
    recorder, state, clock = make_recorder(session, records.append), session.fresh_state(), Clock()
    for size, count in schedule:
        state, clock = loop.run(
            session,
            state,
            Clock(clock.examples_seen, clock.steps, size),
            end=clock.examples_seen + size * count,
            recorder=recorder,
            batch_sizes=FixedBatchSizes(size),
        )
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_every_two_of_eleven_meshes_in_one_run_that_is_killed_each_time(tmp_path, monkeypatch, quick_compilation):
    way = over_all_pairs(list(MESHES))
    assert {frozenset(pair) for pair in itertools.pairwise(way)} == {
        frozenset(pair) for pair in itertools.combinations(MESHES, 2)
    }
    random, step = np.random.default_rng(0), Recorder.step
    sizes, total, kill_at = itertools.cycle(SIZES), 2 * KEPT * len(way), 0

    def kill(self, clock, *rest):
        if clock.examples_seen >= kill_at:
            raise KilledError
        return step(self, clock, *rest)

    monkeypatch.setattr(Recorder, "step", kill)
    folder, seen = tmp_path / "run", 0
    for number, name in enumerate(way):
        # Past the next checkpoint or the one after it, at any step.
        kill_at = seen + int(random.integers(KEPT + 1, 3 * KEPT))
        options = arguments(total) | {"mesh": mesh_of(name), "strategy": MESHES[name][1], "batch_size": next(sizes)}
        options |= {"checkpoint_every_examples": KEPT, "evaluation_examples": 8, "evaluate_every_examples": 10**6}
        options |= {"max_microbatch_examples": int(random.choice([8, 16, 1000]))}
        with pytest.raises(KilledError):
            train(run=str(folder), **options)
        seen = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
        print(
            f"kill {number + 1} of {len(way)}: {name}, batches of {options['batch_size']}, saved at {seen}", flush=True
        )
    records = read_run(folder).train
    batches = records["batch_size"].astype(int)
    schedule = [(size, len(list(group))) for size, group in itertools.groupby(batches.tolist())]
    assert len(schedule) >= 40
    expected = on_one_device(schedule)
    np.testing.assert_allclose(records["loss"], expected, rtol=1e-5)
    off = np.max(np.abs(records["loss"] / expected - 1))
    print(f"{len(way)} kills, {len(batches)} steps: losses within {off:.1e}")
