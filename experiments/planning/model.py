"""A model by itself: its parameters, FLOPs and memory."""

import functools

import jax
from rich.console import Console
from rich.table import Table

from crescendo import models
from crescendo.experiments.planning.fitting import fit
from crescendo.experiments.runtime.hardware import named_device
from crescendo.models import ModelConfig

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


def describe_model(console: Console, model: ModelConfig, *, sequence_length: int, device: str | None = None) -> None:
    """Prints parameters, FLOPs a token and the memory of what training adds up or updates.

    Args:
      console: where.
      model: the decoder's shape.
      sequence_length: tokens in a row.
      device: a name of `hardware.KNOWN_DEVICES`, to say whether it fits; None: that isn't said.

    Raises:
      UserError: an unknown device.
    """
    table, total = parameter_table(model.for_platform("gpu"))
    console.print(table)
    if model.experts is not None:
        idle = model.feed_forward_parameters(model.experts) - model.feed_forward_parameters(model.experts_per_token)
        idle //= model.layers if model.shared_layers else 1
        console.print(
            f"{total - idle:,} of them active: a token goes to {model.experts_per_token} of {model.experts} experts"
        )
    if model.shared_layers:
        console.print(f"{model.layers} layers have the weights of one block, and norms of their own")
    flops = model.flops_per_token(sequence_length)
    console.print(f"{flops / 1e6:,.1f} MFLOPs a token, forward and backward, at {sequence_length} tokens a row")
    for name, size in BYTES_PER_PARAMETER.items():
        console.print(f"{total * size / 2**30:8.2f} GiB  {name}, float32")
    held = float(total * sum(BYTES_PER_PARAMETER.values()))
    console.print(f"{held / 2**30:8.2f} GiB  in all, activations not counted: --model counts them, of a microbatch")
    if device is not None:
        named = named_device(device)
        verdict = fit({"parameters": held}, named.memory_bytes, named.device_kind)
        console.print(f"{verdict}, activations not counted", highlight=False)
