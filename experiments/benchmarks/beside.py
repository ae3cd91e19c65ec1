"""Our training step beside its peers', each in a process of its own: `crescendo benchmark train --peer NAME`.

A process that has used a GPU keeps its memory, so this one uses none. In every round all take their turn, each round
beginning with the next, so that a drift of the clock is shared.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from rich.table import Table

from crescendo import parallel
from crescendo.experiments.benchmarks.peers import Prepared, peer
from crescendo.experiments.benchmarks.steps import prepare
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.data.rows import Stream
from crescendo.experiments.runtime import hardware, schemas
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import replace_json, to_json
from crescendo.models import ModelConfig

OURS = "ours"
WARMUP_STEPS, STEPS_A_READING = 4, 5


class Work(schemas.Schema):
    """What is timed: a preset's step on rows of random tokens, as skewed as a text's.

    Attributes:
      preset: a key of `crescendo.models.config.PRESETS`.
      sequence_length: tokens in a row.
      batch_size: in examples.
      steps: timed steps.
      platform: "cpu" or "gpu", as ours found it: a peer that asked JAX would have it take the device's memory.
      matmul: of ours, a key of `crescendo.models.low_precision.RECIPES`.
    """

    preset: str
    sequence_length: int
    batch_size: int
    steps: int
    platform: str = ""
    matmul: str = "dtype"


class Measured(schemas.Schema):
    """What one process measured.

    Attributes:
      device: its kind.
      platform: as `Work` has it.
      parameter_count: of the model.
      seconds: of a step, in the mean of a few in a row, one number a reading.
      first_loss: the mean loss before the first update, in nats a token.
      peak_bytes: the device's memory at its peak; None where that isn't known.
      begin_seconds: until the first step was done, compilation included.
    """

    device: str
    platform: str
    parameter_count: int
    seconds: list[float]
    first_loss: float
    peak_bytes: int | None
    begin_seconds: float


def ours(work: Work) -> Prepared:
    """The step of a run, on the first device."""
    layout = parallel.Layout(parallel.make_mesh(devices=jax.devices()[:1]))
    loop = prepare(
        ModelConfig.preset(work.preset, matmul=work.matmul),
        sequence_length=work.sequence_length,
        batch_size=work.batch_size,
        layout=layout,
    )
    session, state, device = loop.session, loop.state, jax.devices()[0]

    def step():
        nonlocal state
        state, metrics = loop.step(state, loop.batch)
        return metrics["loss"]

    def peak_bytes() -> int:
        return (device.memory_stats() or {}).get("peak_bytes_in_use") or session.peak_bytes

    count = sum(x.size for x in jax.tree.leaves(session.parameters))
    return Prepared(device.device_kind, count, step, float, peak_bytes)


def theirs(name: str, work: Work) -> Prepared:
    """A peer's step, on the same rows."""
    model = ModelConfig.preset(work.preset).for_platform(work.platform)
    rows = Stream(RandomText(model.vocab_size, work.sequence_length), seed=0).read(0, work.batch_size)
    return peer(name).prepare(model, rows)


def measure(name: str, work: Work) -> Measured:
    """Times `OURS` or a peer here: readings of a few steps in a row, with one wait at the end of each."""
    begin = time.perf_counter()
    prepared = ours(work) if name == OURS else theirs(name, work)
    first_loss = prepared.read(prepared.step())
    begin_seconds = time.perf_counter() - begin

    def reading(steps: int) -> float:
        begin = time.perf_counter()
        losses = [prepared.step() for _ in range(steps)]
        prepared.read(losses[-1])
        return (time.perf_counter() - begin) / steps

    reading(WARMUP_STEPS)
    seconds = [reading(STEPS_A_READING) for _ in range(-(-work.steps // STEPS_A_READING))]
    return Measured(
        device=prepared.device,
        platform=work.platform or jax.default_backend(),
        parameter_count=prepared.parameter_count,
        seconds=seconds,
        first_loss=first_loss,
        peak_bytes=prepared.peak_bytes(),
        begin_seconds=begin_seconds,
    )


def measure_elsewhere(name: str, work: Work) -> Measured:
    """`measure` in a process of its own.

    Raises:
      UserError: it failed; with the last line that it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "measured.json"
        command = [sys.executable, "-m", __spec__.name, name, str(result)]
        ended = subprocess.run(command, input=to_json(work.model_dump()), capture_output=True)
        if ended.returncode or not result.exists():
            said = [line for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
            why = said[-1].removeprefix("error: ") if said else f"exit code {ended.returncode}"
            raise UserError(f"{work.preset}, {name}: {why}")
        return schemas.read(result, Measured)


def compare(
    work: Work, peers: Sequence[str], rounds: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, list[Measured]]:
    """Every round's measurements of ours and of each peer, by name.

    Args:
      work: what is timed.
      peers: names of `crescendo.experiments.benchmarks.peers`.
      rounds: how often each is measured.
      say: told of each measurement as it comes, since one takes a minute.

    Raises:
      UserError: a peer failed, is on another device, or is another model.
    """
    order = [OURS, *dict.fromkeys(peers)]
    measured: dict[str, list[Measured]] = {name: [] for name in order}
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            measured[name].append(its := measure_elsewhere(name, work))
            say(f"{work.preset}, {name}: {1e3 * statistics.median(its.seconds):,.1f} ms a step")
            work = work.model_copy(update={"platform": measured[OURS][0].platform})
            check_alike(ModelConfig.preset(work.preset), {name: each[0] for name, each in measured.items() if each})
    return measured


def check_alike(model: ModelConfig, measured: Mapping[str, Measured]) -> None:
    """That all were on one kind of device, and have as many parameters but for the norms of queries and keys.

    Raises:
      UserError: names the first that isn't like ours.
    """
    here, norms = measured[OURS], 2 * model.head_size * model.layers * model.qk_norm
    for name, its in measured.items():
        if name != OURS and its.parameter_count != here.parameter_count - norms:
            raise UserError(
                f"--peer {name} has {its.parameter_count:,} parameters, and ours without the norms of queries and keys "
                f"{here.parameter_count - norms:,}: not the same model, so there is nothing to compare"
            )
        if its.device != here.device:
            raise UserError(f"--peer {name} ran on {its.device}, and ours on {here.device}: leave --peer {name} out")


def peer_table(work: Work, measured: Mapping[str, Sequence[Measured]]) -> Table:
    """A row each: the median over all readings, and ours over it."""
    model, device = ModelConfig.preset(work.preset), measured[OURS][0].device
    known = hardware.known_device(device)
    tokens = work.batch_size * work.sequence_length
    title = f"{work.preset} on one {device}, rows of {work.sequence_length}, batch {work.batch_size}"
    columns = ["whose", "ms a step", "tokens/s", "MFU", "GiB", "begins after", "parameters"]
    table = Table(*columns, "ours over it", "memory, ours over it", title=title)
    medians = {name: statistics.median(s for each in its for s in each.seconds) for name, its in measured.items()}
    memory = {name: max((each.peak_bytes or 0) for each in its) for name, its in measured.items()}
    for name, its in measured.items():
        tokens_per_second = tokens / medians[name]
        flops = tokens_per_second * model.flops_per_token(work.sequence_length)
        table.add_row(
            name,
            f"{1e3 * medians[name]:,.1f}",
            f"{tokens_per_second:,.0f}",
            f"{flops / known.peak_flops_per_second:.1%}" if known else "-",
            f"{memory[name] / 2**30:.2f}" if memory[name] else "-",
            f"{min(each.begin_seconds for each in its):.0f} s",
            f"{its[0].parameter_count:,}",
            f"{medians[name] / medians[OURS]:.2f}",
            f"{memory[OURS] / memory[name]:.2f}" if memory[name] else "-",
        )
    return table


def write(path: Path, compared: Sequence[tuple[Work, Mapping[str, Sequence[Measured]]]]) -> None:
    """Every measurement, as JSON."""
    content = [
        work.model_dump() | {"measured": {name: [each.model_dump() for each in its] for name, its in measured.items()}}
        for work, measured in compared
    ]
    replace_json(path, content)


def main() -> None:
    """Measures one and writes the result: `NAME FILE`, the work as JSON on standard input."""
    name, result = sys.argv[1:]
    work = schemas.parse(sys.stdin.buffer.read(), Work, "the work")
    replace_json(Path(result), measure(name, work).model_dump())


if __name__ == "__main__":
    run_command(main)
