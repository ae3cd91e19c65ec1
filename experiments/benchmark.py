"""Time training steps and optimizers on the devices at hand: `python -m crescendo.experiments.benchmark`."""

import argparse
import functools
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from crescendo.experiments.benchmarks import beside, experts, peers
from crescendo.experiments.benchmarks.optimizers import PEERS, optimizer_table
from crescendo.experiments.benchmarks.profile import kernel_flops, profile_of, profile_table, write
from crescendo.experiments.benchmarks.scaling import KINDS, scaling_table
from crescendo.experiments.benchmarks.steps import Loop, noise_scale_table, training_table
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.command import plain_parser
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.runtime.files import local_path
from crescendo.experiments.runtime.tracing import check_writable
from crescendo.models import ModelConfig
from crescendo.models.config import PRESETS
from crescendo.models.low_precision import RECIPES
from crescendo.pallas_kernels.console import output_console
from crescendo.parallel import STRATEGIES, MeshSpec
from crescendo.parallel.mesh import AXES

EXAMPLES = """examples:
  python -m crescendo.experiments.benchmark train debug
  python -m crescendo.experiments.benchmark train 124m --sequence-length 1024 --batch-size 32 --profile profile
  python -m crescendo.experiments.benchmark train 1b --sequence-length 2048 --batch-size 4 --remat dots
  python -m crescendo.experiments.benchmark train 124m --peer torch --peer jax --json beside.json
  python -m crescendo.experiments.benchmark noise-scale 30m --batch-size 32
  python -m crescendo.experiments.benchmark scaling 124m data fsdp tensor --batch-size 32 --profile
  python -m crescendo.experiments.benchmark experts moe-300m --fsdp 2 --tensor 4 --batch-size 4 --chunks 1 2 4
  python -m crescendo.experiments.benchmark optim adamw lion lamb --preset 1b"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = plain_parser("Speed of training steps and of optimizers on the devices at hand.", EXAMPLES)
    commands = result.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="the presets' training steps, AdamW included")
    train.add_argument("presets", nargs="+", choices=list(PRESETS), metavar="PRESET", help=", ".join(PRESETS))
    train.add_argument("--sequence-length", type=int, default=1024, help="tokens in a row (default 1024)")
    train.add_argument("--batch-size", type=int, default=32, help="global, in examples (default 32)")
    train.add_argument("--documents-in-row", type=int, default=1, help="packed documents of equal length (default 1)")
    train.add_argument("--steps", type=int, default=20, help="timed steps (default 20)")
    train.add_argument("--remat", default="none", choices=["none", "dots", "full"], help="what the backward recomputes")
    train.add_argument("--matmul", default="dtype", choices=list(RECIPES), help="the blocks' matmuls (default dtype)")
    train.add_argument(
        "--profile", metavar="FOLDER", help="the step by kernel: a table, PRESET.json, PRESET.png and the trace there"
    )
    train.add_argument("--scan-layers", action="store_true", help="layers in a loop (default: the preset's choice)")
    train.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME",
        help=f"beside ours, each in a process of its own on one device: {', '.join(peers.names())}; may be repeated",
    )
    train.add_argument("--rounds", type=int, help="with --peer: how often each is measured, in turns (default 1)")
    train.add_argument("--json", type=local_path, metavar="FILE", help="with --peer: write the measurements there")
    noise = commands.add_parser("noise-scale", help="what the noise scale and a policy cost a step")
    noise.add_argument("preset", choices=list(PRESETS), metavar="PRESET", help=", ".join(PRESETS))
    noise.add_argument("--sequence-length", type=int, default=512, help="tokens in a row (default 512)")
    noise.add_argument("--batch-size", type=int, default=32, help="global, in examples (default 32)")
    scaling = commands.add_parser("scaling", help="several devices, each way of using them, beside one")
    scaling.add_argument("preset", choices=list(PRESETS), metavar="PRESET", help=", ".join(PRESETS))
    scaling.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default: all but stage)")
    scaling.add_argument("--sequence-length", type=int, default=1024, help="tokens in a row (default 1024)")
    scaling.add_argument("--batch-size", type=int, default=32, help="of one device, in examples (default 32)")
    scaling.add_argument("--steps", type=int, default=20, help="timed steps (default 20)")
    scaling.add_argument("--profile", action="store_true", help="the time in collectives, and what hides none of it")
    ways = commands.add_parser("experts", help="every way to split experts over a mesh, tokens sent in chunks")
    ways.add_argument("preset", choices=list(PRESETS), metavar="PRESET", help=", ".join(PRESETS))
    for axis in AXES:
        default = {"data": 1, "fsdp": -1}.get(axis, 1)
        ways.add_argument(f"--{axis}", type=int, default=default, help=f"devices along {axis} (default {default})")
    ways.add_argument("--strategy", default="fsdp", choices=list(STRATEGIES), help="(default fsdp)")
    ways.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4], help="numbers of them (default 1 2 4)")
    ways.add_argument("--sequence-length", type=int, default=1024, help="tokens in a row (default 1024)")
    ways.add_argument("--batch-size", type=int, default=4, help="of a part of the batch, in examples (default 4)")
    ways.add_argument("--steps", type=int, default=20, help="timed steps (default 20)")
    ways.add_argument("--json", type=local_path, metavar="FILE", help="write the measurements there, as they come")
    optimizers = commands.add_parser("optim", help="one update, beside optax's own and the bandwidth bound")
    optimizers.add_argument("names", nargs="+", choices=list(PEERS), metavar="OPTIMIZER", help=", ".join(PEERS))
    optimizers.add_argument("--preset", default="1b", choices=list(PRESETS), help="whose parameters (default 1b)")
    return result


def _beside_peers(arguments: argparse.Namespace, console: Console) -> None:
    """Prints a table a preset, and writes all measurements."""
    for name, default in {"documents_in_row": 1, "remat": "none", "scan_layers": False, "profile": None}.items():
        if getattr(arguments, name) != default:
            raise UserError(
                f"--{name.replace('_', '-')} is of our step alone, and a peer's has a document a row, unrolled layers "
                "and keeps all for its backward pass: leave it out, or --peer"
            )
    for name in arguments.peer:
        peers.peer(name)  # is there, before anything is timed
    if arguments.json is not None:
        check_writable(arguments.json.parent)
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    compared = []
    for preset in arguments.presets:
        work = beside.Work(
            preset=preset,
            sequence_length=arguments.sequence_length,
            batch_size=arguments.batch_size,
            steps=arguments.steps,
            matmul=arguments.matmul,
        )
        measured = beside.compare(work, arguments.peer, arguments.rounds or 1, say)
        console.print(beside.peer_table(work, measured))
        compared.append((work, measured))
    if arguments.json is not None:
        beside.write(arguments.json, compared)


def _ways_of_experts(arguments: argparse.Namespace, console: Console) -> None:
    """Prints a line as each way is measured, then the table."""
    if arguments.json is not None:
        check_writable(arguments.json.parent)
    with user_values():
        spec = MeshSpec(**{axis: getattr(arguments, axis) for axis in AXES})
    model, ways = ModelConfig.preset(arguments.preset), list[experts.Way]()
    rows = {name: getattr(arguments, name) for name in ("sequence_length", "batch_size", "steps")}
    for way in experts.measured(model, spec, arguments.strategy, arguments.chunks, **rows):
        ways.append(way)
        said = f"{', '.join(way.experts)} in {way.chunks}: {1e3 * way.step_seconds:,.1f} ms"
        console.print(said, highlight=False, soft_wrap=True)
        if arguments.json is not None:
            experts.keep(arguments.json, arguments.preset, spec, arguments.strategy, rows, ways)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    of_rows = f"rows of {arguments.sequence_length}, {arguments.batch_size} a part of the batch"
    console.print(experts.ways_table(f"{arguments.preset} on {devices}, {spec}, {of_rows}", ways))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    console = output_console()
    if arguments.command == "optim":
        console.print(optimizer_table(arguments.names, arguments.preset))
        return
    for name in ("sequence_length", "batch_size", "documents_in_row", "steps", "rounds"):
        if getattr(arguments, name, None) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    rows = {"sequence_length": arguments.sequence_length, "batch_size": arguments.batch_size}
    if arguments.command == "noise-scale":
        console.print(noise_scale_table(arguments.preset, **rows))
        return
    if arguments.command == "experts":
        _ways_of_experts(arguments, console)
        return
    if arguments.command == "scaling":
        for kind in arguments.kinds:
            if kind not in KINDS:
                raise UserError(f"no way to use several devices is called {kind!r}: there are {', '.join(KINDS)}")
        if len(jax.devices()) == 1:
            raise UserError("scaling compares several devices with one, and here is one")
        # Stages must divide a model's layers; what every model can do is measured unasked.
        kinds = arguments.kinds or [kind for kind in KINDS if kind != "stage"]
        model = ModelConfig.preset(arguments.preset)
        console.print(scaling_table(model, kinds, **rows, steps=arguments.steps, profile=arguments.profile))
        return
    if arguments.peer:
        _beside_peers(arguments, console)
        return
    for name in ("rounds", "json"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is of a comparison: add --peer NAME, or leave it out")
    changes = {"remat": arguments.remat, "matmul": arguments.matmul, "scan_layers": arguments.scan_layers or None}
    with user_values():
        models = {preset: ModelConfig.preset(preset, **changes) for preset in arguments.presets}
    packed = {"documents_in_row": arguments.documents_in_row}
    tables: list[Table] = []
    folder = None if arguments.profile is None else local_path(arguments.profile)
    if folder is not None:
        check_writable(folder)  # before anything is timed

    def profiled(preset: str, loop: Loop) -> None:
        if folder is None:
            return
        flops = kernel_flops(models[preset], **rows, **packed)
        shape = f"rows of {arguments.sequence_length}, batch {arguments.batch_size}"
        title = f"{preset} on {jax.devices()[0].device_kind}, {shape}"
        seen = profile_of(loop, folder / preset, flops=flops)
        write(folder, preset, title, seen)
        tables.append(profile_table(title, seen))

    tables.insert(0, training_table(models, **rows, **packed, steps=arguments.steps, after_each=profiled))
    for table in tables:
        console.print(table)


if __name__ == "__main__":
    run_command(main)
