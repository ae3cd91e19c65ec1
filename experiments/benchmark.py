"""Speed on the devices at hand, of training steps and of optimizers: `python -m crescendo.experiments.benchmark`."""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from crescendo import optim, parallel
from crescendo.experiments import hardware
from crescendo.experiments.benchmark_optim import PEERS, optimizer_table
from crescendo.experiments.cli import run_command
from crescendo.experiments.compile import compile_step
from crescendo.experiments.errors import UserError, user_values
from crescendo.experiments.state import abstract_batch, initial_state
from crescendo.models import ModelConfig
from crescendo.models.config import PRESETS
from crescendo.optim.batch_size import adaptive_batch_size, constant

EXAMPLES = """examples:
  python -m crescendo.experiments.benchmark train debug
  python -m crescendo.experiments.benchmark train 124m --sequence-length 1024 --batch-size 32
  python -m crescendo.experiments.benchmark train 1b --sequence-length 2048 --batch-size 4 --remat dots
  python -m crescendo.experiments.benchmark optim adamw lion lamb --preset 1b"""


class Speed(NamedTuple):
    """What a training step costs.

    Attributes:
      step_seconds: the median over the timed steps.
      tokens_per_second: of all devices together.
      mfu: the share of the devices' peak; None where the peak isn't known.
      peak_bytes: memory of a device, by the compiler's count.
      microbatch_examples: as the planner chose.
      compile_seconds: tracing and compilation.
    """

    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    peak_bytes: int
    microbatch_examples: int
    compile_seconds: float


def measure(
    model: ModelConfig, *, sequence_length: int, batch_size: int, steps: int = 20, documents_in_row: int = 1
) -> Speed:
    """Times the loop's own step, AdamW included, on random tokens.

    Args:
      model: the decoder's shape.
      sequence_length: tokens in a row.
      batch_size: global, in examples.
      steps: how many to time, after three to warm up.
      documents_in_row: packed documents of equal length.
    """
    mesh = parallel.make_mesh()
    device = mesh.devices.flat[0]
    config = model.for_platform(device.platform)
    optimizer = optax.chain(optim.adamw(3e-4), adaptive_batch_size(constant(batch_size)))
    start = time.perf_counter()
    compiled = compile_step(config, optimizer, mesh, [batch_size], sequence_length=sequence_length)
    compile_seconds = time.perf_counter() - start
    shardings = jax.tree.map(lambda x: x.sharding, compiled.abstract_state)
    state = jax.jit(lambda: initial_state(config, optimizer, 0), out_shardings=shardings)()
    random = np.random.default_rng(0)
    shape = (compiled.plan.max_microbatches, compiled.plan.microbatch_examples, sequence_length)
    index = np.arange(sequence_length)
    length = -(-sequence_length // documents_in_row)
    rows = {
        "tokens": random.integers(0, config.vocab_size, shape, np.int32),
        "labels": random.integers(0, config.vocab_size, shape, np.int32),
        "segment_ids": np.broadcast_to(index // length + 1, shape).astype(np.int32),
        "positions": np.broadcast_to(index % length, shape).astype(np.int32),
    }
    layout = jax.tree.map(lambda x: x.sharding, abstract_batch(mesh, compiled.plan, sequence_length))
    batch = {"rows": rows, "microbatches": np.int32(shape[0]), "examples_seen": np.int32(0)}
    batch = jax.device_put(batch, layout)
    seconds = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        state, metrics = compiled.call(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    step_seconds = statistics.median(seconds[3:])
    tokens_per_second = batch_size * sequence_length / step_seconds
    peak = hardware.peak_flops_per_second(device)
    flops = tokens_per_second * config.flops_per_token(sequence_length)
    return Speed(
        step_seconds,
        tokens_per_second,
        flops / (peak * mesh.devices.size) if peak else None,
        compiled.peak_bytes,
        compiled.plan.microbatch_examples,
        compile_seconds,
    )


def training_table(presets: Sequence[str], arguments: argparse.Namespace) -> Table:
    """One row a preset."""
    title = (
        f"{len(jax.devices())} x {jax.devices()[0].device_kind}, rows of {arguments.sequence_length}, "
        f"batch {arguments.batch_size}"
    )
    table = Table("preset", "ms a step", "tokens/s", "MFU", "GiB", "microbatch", "compiled in", title=title)
    for preset in presets:
        with user_values():
            model = ModelConfig.preset(preset, remat=arguments.remat, scan_layers=arguments.scan_layers or None)
        speed = measure(
            model,
            sequence_length=arguments.sequence_length,
            batch_size=arguments.batch_size,
            steps=arguments.steps,
            documents_in_row=arguments.documents_in_row,
        )
        table.add_row(
            preset,
            f"{1e3 * speed.step_seconds:,.1f}",
            f"{speed.tokens_per_second:,.0f}",
            f"{speed.mfu:.1%}" if speed.mfu else "-",
            f"{speed.peak_bytes / 2**30:.2f}",
            str(speed.microbatch_examples),
            f"{speed.compile_seconds:.0f} s",
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Speed of training steps and of optimizers on the devices at hand.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="the presets' training steps, AdamW included")
    train.add_argument("presets", nargs="+", choices=list(PRESETS), metavar="PRESET", help=", ".join(PRESETS))
    train.add_argument("--sequence-length", type=int, default=1024, help="tokens in a row (default 1024)")
    train.add_argument("--batch-size", type=int, default=32, help="global, in examples (default 32)")
    train.add_argument("--documents-in-row", type=int, default=1, help="packed documents of equal length (default 1)")
    train.add_argument("--steps", type=int, default=20, help="timed steps (default 20)")
    train.add_argument("--remat", default="none", choices=["none", "dots", "full"], help="what the backward recomputes")
    train.add_argument("--scan-layers", action="store_true", help="layers in a loop (default: the preset's choice)")
    optimizers = commands.add_parser("optim", help="one update, beside optax's own and the bandwidth bound")
    optimizers.add_argument("names", nargs="+", choices=list(PEERS), metavar="OPTIMIZER", help=", ".join(PEERS))
    optimizers.add_argument("--preset", default="1b", choices=list(PRESETS), help="whose parameters (default 1b)")
    arguments = parser.parse_args(argv)
    if arguments.command == "optim":
        Console().print(optimizer_table(arguments.names, arguments.preset))
        return
    for name in ("sequence_length", "batch_size", "documents_in_row", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    Console().print(training_table(arguments.presets, arguments))


if __name__ == "__main__":
    run_command(main)
