"""A model's parameters, FLOPs and memory: `python -m crescendo.models.describe 124m`."""

import argparse
import functools
import sys
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from crescendo import models
from crescendo.models.config import PRESETS, ModelConfig

# float32 parameters, their gradients, and Adam's two moments.
BYTES_PER_PARAMETER = {"parameters": 4, "gradients": 4, "Adam moments": 8}


def parameter_table(config: ModelConfig) -> tuple[Table, int]:
    """One row a parameter: path, logical axes, shape, count; and the count of all."""
    shapes = jax.eval_shape(functools.partial(models.initialize, config), jax.random.key(0))
    axes = jax.tree.leaves(models.logical_axes(config), is_leaf=lambda x: isinstance(x, tuple))
    table = Table("parameter", "logical axes", "shape")
    table.add_column("count", justify="right")
    total = 0
    for (path, shape), names in zip(jax.tree.leaves_with_path(shapes), axes, strict=True):
        name = ".".join(str(key.key) for key in path)
        table.add_row(name, ", ".join(names), " x ".join(map(str, shape.shape)), f"{shape.size:,}")
        total += shape.size
    table.add_section()
    table.add_row("all", "", "", f"{total:,}")
    return table, total


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description="A preset's parameters, FLOPs a token and memory.",
        epilog="example: python -m crescendo.models.describe 124m --sequence-length 2048",
    )
    parser.add_argument("preset", choices=list(PRESETS))
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens in a row (default 1024)")
    arguments = parser.parse_args(argv)
    if arguments.sequence_length < 1:
        print(f"error: --sequence-length {arguments.sequence_length} must be at least 1", file=sys.stderr)
        sys.exit(2)
    config = ModelConfig.preset(arguments.preset).for_platform("gpu")
    console = Console()
    table, total = parameter_table(config)
    console.print(table)
    flops = config.flops_per_token(arguments.sequence_length)
    console.print(
        f"{flops / 1e6:,.1f} MFLOPs a token, forward and backward, at {arguments.sequence_length} tokens a row"
    )
    for name, size in BYTES_PER_PARAMETER.items():
        console.print(f"{total * size / 2**30:8.2f} GiB  {name}, float32")
    console.print(f"{total * sum(BYTES_PER_PARAMETER.values()) / 2**30:8.2f} GiB  in all, activations not counted")


if __name__ == "__main__":
    main()
