"""A model over a mesh: memory, traffic and the compiler's own word: `python -m crescendo.parallel.describe`.

Without `--topology` nothing is compiled and no device is needed. With it, the training step is compiled for a machine
that need not be there: TPUs with JAX's tpu extra installed, H100s with the CUDA plugin (`make test-aot` installs both).
"""

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from crescendo import optim, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.trainer.compilation import peak_bytes
from crescendo.experiments.trainer.session import Session
from crescendo.models import ModelConfig
from crescendo.models.config import PRESETS
from crescendo.parallel.collectives import KINDS, traffic
from crescendo.parallel.costs import Work, step_traffic
from crescendo.parallel.mesh import AXES
from crescendo.parallel.tables import describe_sharding, device_bytes

EXAMPLES = """examples:
  python -m crescendo.parallel.describe --model 70b --devices 4096 --fsdp 512 --tensor 8 --batch-size 512
  python -m crescendo.parallel.describe --model 1b --devices 8 --strategy zero1
  python -m crescendo.parallel.describe --model 70b --topology v5p:16x16x16 --fsdp 512 --tensor 8 --batch-size 512
  python -m crescendo.parallel.describe --model 124m --topology h100:1x1x8 --target h100.txtpb --batch-size 64"""

WIDTH = 160  # of the tables in a file or a pipe


def held_table(session: Session, work: Work) -> Table:
    """What a device holds, by our own count."""
    state, shardings, layout = session.abstract_state, session.shardings, session.layout
    gradients = layout.gradients(session.task.logical_axes())
    table = Table("on a device", title="by our own count")
    table.add_column("GiB", justify="right")
    parts = {
        "parameters, float32": device_bytes(state.parameters, shardings.parameters),
        "optimizer state": device_bytes(state.opt_state, shardings.opt_state),
        "gradients, float32": device_bytes(state.parameters, gradients),
    }
    if work.full_remat:
        share = layout.batch_shards * layout.sizes["sequence"] * layout.sizes["tensor"]
        tokens = work.examples * work.sequence_length / share
        parts["inputs of the layers, kept for the backward pass"] = (
            tokens * work.layers * work.width * work.compute_bytes
        )
    for name, size in parts.items():
        table.add_row(name, f"{size / 2**30:.3f}")
    table.add_section()
    table.add_row("all of these", f"{sum(parts.values()) / 2**30:.3f}")
    return table


def traffic_table(title: str, found: dict[str, float], counts: dict[str, float] | None = None) -> Table:
    """Bytes that a device sends in a step, by kind of collective."""
    table = Table("collective", title=title)
    if counts:
        table.add_column("count", justify="right")
    table.add_column("GiB sent by a device", justify="right")
    for kind in KINDS:
        table.add_row(kind, *([f"{counts[kind]:,.0f}"] if counts else []), f"{found[kind] / 2**30:.3f}")
    table.add_section()
    table.add_row("all", *([f"{sum(counts.values()):,.0f}"] if counts else []), f"{sum(found.values()) / 2**30:.3f}")
    return table


def topology_devices(name: str, target: Path | None) -> list:
    """The devices of a machine that need not be there, such as `v5p:16x16x16` or `h100:1x1x8`."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    kind, _, shape = name.partition(":")
    try:
        if kind == "h100":
            if target is None or not target.is_file():
                raise UserError(
                    f"--topology {name} needs --target FILE, XLA's description of the GPU (GpuTargetConfig as text; "
                    "tests/aot/h100.txtpb in the source tree)"
                )
            return topologies.get_topology_desc(
                "h100", "cuda", target_config=target.read_text(), topology=shape
            ).devices
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology {name}: {str(error).splitlines()[0][:200]}; names are such as v5e:4x4, v5p:16x16x16, v6e:8x8 "
            "(with crescendo[tpu] installed) or h100:1x1x8 (with jax-cuda13-plugin)"
        ) from None


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m crescendo.parallel.describe",
        description="How a model lies over a mesh: every array's place, memory a device, traffic a step.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="debug", choices=list(PRESETS), help="a preset (default debug)")
    machine = parser.add_mutually_exclusive_group()
    machine.add_argument("--devices", type=int, default=8, help="how many devices (default 8)")
    machine.add_argument("--topology", help="compile the step for this machine: v5p:16x16x16, h100:1x1x8, ...")
    parser.add_argument("--target", type=Path, help="for GPU topologies: XLA's description of the GPU")
    for axis in AXES:
        default = {"data": 1, "fsdp": -1}.get(axis, 1)
        parser.add_argument(f"--{axis}", type=int, default=default, help=f"devices along {axis} (default {default})")
    parser.add_argument("--strategy", default="fsdp", choices=list(parallel.STRATEGIES), help="(default fsdp)")
    parser.add_argument("--ulysses", type=int, default=1, help="the part of sequence that splits heads (default 1)")
    parser.add_argument("--batch-size", type=int, help="global, in examples (default: one a device of the batch)")
    parser.add_argument("--microbatches", type=int, default=1, help="how many make a batch (default 1)")
    parser.add_argument("--sequence-length", type=int, default=4096, help="tokens in a row (default 4096)")
    parser.add_argument("--remat", choices=["none", "dots", "full"], help="(default: the preset's)")
    arguments = parser.parse_args(argv)
    console, begin = Console(), time.perf_counter()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for name in ("devices", "microbatches", "sequence_length"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    devices = topology_devices(arguments.topology, arguments.target) if arguments.topology else None
    with user_values():
        spec = parallel.MeshSpec(**{axis: getattr(arguments, axis) for axis in AXES})
        mesh = spec.make(devices) if devices else spec.abstract(arguments.devices)
        layout = parallel.Layout(mesh, parallel.strategy(arguments.strategy, ulysses=arguments.ulysses))
        batch_size = arguments.batch_size or layout.batch_shards * arguments.microbatches
        plan = parallel.plan_batches([batch_size], layout.batch_shards, batch_size // arguments.microbatches)
        # In a loop the layers compile in the time of one.
        changes = {"scan_layers": True} | ({"remat": arguments.remat} if arguments.remat else {})
        model = ModelConfig.preset(arguments.model, **changes)
    session = Session(
        data=RandomText(model.vocab_size, arguments.sequence_length),
        model=model,
        optimizer=optim.adamw(1e-3),
        batch_size=batch_size,
        total_examples=2**31 - 1,
        mesh=mesh,
        strategy=layout.strategy,
        platform="gpu" if devices and devices[0].platform in ("cuda", "gpu") else "tpu",
    )
    layout, arrays, axes = session.layout, session.parameters, session.task.logical_axes()
    config = model.for_platform(session.platform)
    work = Work(
        microbatches=plan.max_microbatches,
        examples=plan.microbatch_examples,
        sequence_length=arguments.sequence_length,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_width=config.head_size,
        compute_bytes=jnp.dtype(config.dtype).itemsize,
        full_remat=config.remat == "full",
    )
    table, warnings = describe_sharding(arrays, axes, layout)
    console.print(table)
    for warning in warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(arrays))
    console.print(
        f"{parameters:,} parameters; a batch of {batch_size} rows of {arguments.sequence_length} tokens in "
        f"{plan.max_microbatches} microbatch(es) of {plan.microbatch_examples}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(held_table(session, work))
    console.print(traffic_table("a step, in closed form", step_traffic(layout, arrays, axes, work)))
    if devices:
        console.print(f"compiling for {len(devices)} x {devices[0].device_kind} ...", highlight=False)
        compiled = session.lower(plan, implementation="xla").compile()
        found = traffic(compiled.as_text() or "", microbatches=plan.max_microbatches)
        console.print(
            traffic_table(
                "a step, by the compiled program",
                {kind: t.sent_bytes for kind, t in found.items()},
                {kind: t.count for kind, t in found.items()},
            )
        )
        peak = peak_bytes(compiled) / 2**30
        console.print(f"{peak:.3f} GiB a device at the peak, by the compiler's count", highlight=False)
    console.print(f"in {time.perf_counter() - begin:.0f} s", highlight=False)


if __name__ == "__main__":
    run_command(main)
