"""Plan a model, by itself or over a mesh, before there is a device: `python -m crescendo.experiments.describe`.

It is `python -m crescendo.models.describe` and `python -m crescendo.parallel.describe` too. Without `--topology`
nothing is compiled and no device is needed. With it, the training step is compiled for a machine that need not be
there: TPUs with JAX's tpu extra installed, H100s with the CUDA plugin (`make test-aot` installs both).
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from crescendo import parallel
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs import own_modules
from crescendo.experiments.planning.mesh import describe_mesh
from crescendo.experiments.planning.model import describe_model
from crescendo.experiments.planning.run import add_options, options_of, plan_run
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.command import check_not_given, plain_parser
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.runtime.hardware import topology_devices
from crescendo.experiments.trainer.training import train
from crescendo.models import ModelConfig
from crescendo.models.config import PRESETS
from crescendo.models.low_precision import RECIPES
from crescendo.pallas_kernels.console import output_console
from crescendo.parallel.mesh import AXES
from crescendo.parallel.schedules import SCHEDULES

EXAMPLES = """examples:
  python -m crescendo.models.describe 124m --sequence-length 2048
  python -m crescendo.experiments.describe --config lm_1b.gin --set 'text_files.paths = "a.txt"' --device H100
  python -m crescendo.parallel.describe --model 70b --devices 4096 --fsdp 512 --tensor 8 --batch-size 512
  python -m crescendo.parallel.describe --model 1b --devices 8 --strategy zero1
  python -m crescendo.parallel.describe --model 70b --topology v5p:16x16x16 --fsdp 512 --tensor 8 --batch-size 512
  python -m crescendo.parallel.describe --model 124m --topology h100:1x1x8 --target h100.txtpb --batch-size 64"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = plain_parser(
        "Describe a preset by itself (parameters, FLOPs a token, memory), a model over a mesh (every "
        "array's place, memory a device, traffic a step), or the run of a config (see train --dry-run).",
        EXAMPLES,
        prog="python -m crescendo.experiments.describe",
    )
    result.add_argument("preset", nargs="?", choices=list(PRESETS), help="describe this one by itself, over no mesh")
    result.add_argument(
        "--model", default="debug", choices=list(PRESETS), help="the preset to lay over a mesh (default debug)"
    )
    machine = result.add_mutually_exclusive_group()
    machine.add_argument("--devices", type=int, help="how many devices (default 8, of a config 1)")
    machine.add_argument("--topology", help="compile the step for this machine: v5p:16x16x16, h100:1x1x8, ...")
    own_modules.add_option(result)
    result.add_argument("--config", action="append", metavar="FILE.gin", help="describe the run of a config")
    result.add_argument("--set", action="append", default=[], metavar="'NAME = VALUE'", help="one gin binding of it")
    add_options(result)
    result.add_argument("--target", type=Path, help="for GPU topologies: XLA's description of the GPU")
    for axis in AXES:
        default = {"data": 1, "fsdp": -1}.get(axis, 1)
        result.add_argument(f"--{axis}", type=int, default=default, help=f"devices along {axis} (default {default})")
    result.add_argument("--strategy", default="fsdp", choices=list(parallel.STRATEGIES), help="(default fsdp)")
    result.add_argument("--ulysses", type=int, default=1, help="the part of sequence that splits heads (default 1)")
    result.add_argument("--schedule", default="1f1b", choices=list(SCHEDULES), help="of the stages (default 1f1b)")
    result.add_argument("--chunks", type=int, default=1, help="of a stage's layers, interleaved (default 1)")
    result.add_argument(
        "--one-of", type=int, default=1, help="a microbatch goes through one stage of so many (default 1)"
    )
    result.add_argument(
        "--experts",
        nargs="+",
        default=["expert"],
        choices=AXES,
        metavar="AXIS",
        help="of the mesh, along which a layer's experts are split (default expert)",
    )
    result.add_argument("--expert-chunks", type=int, default=1, help="in which tokens go to experts (default 1)")
    result.add_argument("--batch-size", type=int, help="global, in examples (default: the least there can be)")
    result.add_argument("--microbatches", type=int, default=1, help="how many make a batch (default 1)")
    result.add_argument(
        "--sequence-length", type=int, help="tokens in a row (default 4096, of a preset by itself 1024)"
    )
    result.add_argument("--remat", choices=["none", "dots", "full"], help="(default: the preset's)")
    result.add_argument("--matmul", default="dtype", choices=list(RECIPES), help="the blocks' matmuls (default dtype)")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser()
    arguments = options.parse_args(argv)
    for name in ("devices", "microbatches", "sequence_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    console = output_console()
    if arguments.config or arguments.set:
        of_mesh = {*vars(arguments)} - {"module", "config", "set", *options_of(arguments)}
        check_not_given(options, arguments, of_mesh, " is of a mesh, and a config says its own")
        configurables.bind(train, arguments.config or ["debug.gin"], arguments.set)
        plan_run(
            console,
            settings=configurables.resolved(train),
            arguments=functools.partial(configurables.arguments, train),
            mesh_sizes=configurables.given("mesh"),
            **options_of(arguments),
        )
        return
    of_config = ("module", "mfu", "dollars_per_hour")
    check_not_given(options, arguments, of_config, " is of a config: name one with --config")
    if arguments.preset:
        instead = f": say --model {arguments.preset} then, and not {arguments.preset}"
        of_mesh = {*vars(arguments)} - {"preset", "sequence_length", "device"}
        check_not_given(options, arguments, of_mesh, f" is of a mesh{instead}")
        model = ModelConfig.preset(arguments.preset)
        length = arguments.sequence_length or 1024
        describe_model(console, model, sequence_length=length, device=arguments.device)
        return
    devices = topology_devices(arguments.topology, arguments.target) if arguments.topology else []
    with user_values():
        spec = parallel.MeshSpec(**{axis: getattr(arguments, axis) for axis in AXES})
        mesh = spec.make(devices) if devices else spec.abstract(arguments.devices or 8)
        strategy = parallel.strategy(
            arguments.strategy,
            ulysses=arguments.ulysses,
            schedule=arguments.schedule,
            chunks=arguments.chunks,
            one_of=arguments.one_of,
            experts=arguments.experts,
            expert_chunks=arguments.expert_chunks,
        )
        layout = parallel.Layout(mesh, strategy)
        # In a loop the layers compile in the time of one.
        changes = {"scan_layers": True, "matmul": arguments.matmul}
        changes |= {"remat": arguments.remat} if arguments.remat else {}
        model = ModelConfig.preset(arguments.model, **changes)
    describe_mesh(
        console,
        model,
        layout,
        batch_size=arguments.batch_size or layout.batch_shards * max(arguments.microbatches, layout.sizes["stage"]),
        microbatches=arguments.microbatches,
        sequence_length=arguments.sequence_length or 4096,
        devices=devices,
        device=arguments.device,
    )


if __name__ == "__main__":
    run_command(main)
