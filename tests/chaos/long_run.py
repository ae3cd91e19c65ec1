"""A long run with a moving batch: is its memory bounded, and is a step as quick at the end as it was at the begin?

    python tests/chaos/long_run.py --minutes 120

Trains a tiny model in this process, by `train` with its records, evaluations and checkpoints, while the batch goes up
and down; asks the process in even intervals for its memory and its processors' time. It ends with a table, and exit
code 1 where memory grows by more than 100 bytes a step, by least squares, or steps are slower by more than 10% in the
second half than in the first. Compared are the quickest tenths of both: beside other work on the machine a step takes
more of the processors' time, since they share caches and cores.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

BYTES_A_STEP = 100.0
SLOWER = 0.10
# What a process takes until everything has been done once is no growth.
WARM_UP = 0.25


class Look(NamedTuple):
    """At a running process: seconds on its processors (all threads'), steps, resident bytes."""

    seconds: float
    steps: int
    resident: int


class Fit(NamedTuple):
    """What the looks after the warm-up say.

    Attributes:
      steps: that they cover.
      bytes_a_step: the growth of the memory.
      milliseconds: of a step on the process's processors, in the mean.
      slower: how much longer the quickest tenth of the later half takes than that of the half before, as a fraction.
    """

    steps: int
    bytes_a_step: float
    milliseconds: float
    slower: float


def fit(looks: Sequence[Look]) -> Fit:
    """After the first quarter of the steps.

    >>> looks = [Look(0.002 * steps, steps, 10**8 + 20 * steps) for steps in range(0, 1001, 100)]
    >>> fit(looks)
    Fit(steps=700, bytes_a_step=20.0, milliseconds=2.0, slower=0.0)
    """
    seconds, steps, resident = np.array([look for look in looks if look.steps >= WARM_UP * looks[-1].steps]).T
    growth = np.polyfit(steps, resident, 1)[0]
    each, covered = np.diff(seconds) / np.diff(steps), steps[-1] - steps[0]
    mean = (seconds[-1] - seconds[0]) / covered
    before, after = (np.percentile(half, 10) for half in np.array_split(each, 2))
    slower = round(float(after / before - 1), 6)
    return Fit(int(covered), round(float(growth), 3), round(float(1e3 * mean), 6), slower)


def run(minutes: float, folder: Path, looks_at_most: int = 1000) -> list[Look]:
    """Trains for so long, and the looks at it; prints one line in twenty."""
    import jax
    import jax.numpy as jnp
    import psutil

    from crescendo import optim, parallel
    from crescendo.experiments.data.random_text import RandomText
    from crescendo.experiments.trainer.probes import Probe
    from crescendo.experiments.trainer.training import train
    from crescendo.models import ModelConfig
    from crescendo.optim.batch_size import BatchSizePolicy

    process, looks, every, total = psutil.Process(), list[Look](), 4096, 2**30
    begin = time.perf_counter()

    def look(clock, state) -> dict[str, float]:
        looks.append(Look(time.process_time(), clock.steps, process.memory_info().rss))
        if len(looks) % 20 == 0:
            minutes, memory = (time.perf_counter() - begin) / 60, looks[-1].resident / 2**20
            print(f"{minutes:6.1f} min  step {clock.steps:>10,}  {memory:7.1f} MiB", flush=True)
        return {"resident_bytes": looks[-1].resident}

    def next_size(state, stats):
        return jnp.array([8, 16, 8, 32])[stats.examples_seen // 8192 % 4], state

    train(
        run=str(folder),
        data=RandomText(64, 8),
        model=ModelConfig(vocab_size=64, width=8, layers=1, heads=1, kv_heads=1, mlp_width=16),
        optimizer=optim.adamw(1e-3),
        batch_size=BatchSizePolicy(lambda: (), next_size, (8, 16, 32), "up and down"),
        noise_scale=optim.gradient_noise_scale(),
        guard=optim.guard(z=20.0),
        max_microbatch_examples=4,
        total_examples=total,
        mesh=parallel.make_mesh(devices=jax.devices()[:1]),
        stop_after_minutes=minutes,
        evaluate_every_examples=1 << 18,
        evaluation_examples=16,
        checkpoint_every_examples=1 << 18,
        probes=[Probe(every, look)],
    )
    thinned = looks[:: -(-len(looks) // looks_at_most)]
    return thinned if thinned[-1] is looks[-1] else [*thinned, looks[-1]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, prints a table; 1 where memory or time grow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=120.0, help="of training (default: 120)")
    parser.add_argument("--run", type=Path, help="the run's folder (default: a temporary one)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        looks = run(arguments.minutes, arguments.run or Path(temporary) / "run")
    found = fit(looks)
    print(
        f"\n{'steps':>12} {'CPU ms a step':>13} {'slower':>8} {'bytes a step':>13} {'MiB at first':>13} {'at last':>8}"
    )
    print(
        f"{found.steps:>12,} {found.milliseconds:>13.3f} {found.slower:>8.1%} {found.bytes_a_step:>13.1f} "
        f"{looks[0].resident / 2**20:>13.1f} {looks[-1].resident / 2**20:>8.1f}"
    )
    return int(found.bytes_a_step > BYTES_A_STEP or found.slower > SLOWER)


if __name__ == "__main__":
    sys.exit(main())
