"""Which way to split a layer's experts, and how many chunks, is fastest on the devices at hand: `benchmark experts`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from rich.table import Table

from crescendo import parallel
from crescendo.experiments.benchmarks.steps import prepare
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.runtime.files import replace_json
from crescendo.models import ModelConfig
from crescendo.parallel.costs import ways_to_split


class Way(NamedTuple):
    """One way to bring tokens and experts together.

    Attributes:
      experts: the mesh axes, as `strategy.experts` takes them.
      chunks: as `strategy.expert_chunks`.
      step_seconds: the median.
      peak_bytes: memory of a device, by the compiler's count.
    """

    experts: tuple[str, ...]
    chunks: int
    step_seconds: float
    peak_bytes: int


def measured(
    model: ModelConfig,
    spec: parallel.MeshSpec,
    plan: str,
    chunks: Sequence[int],
    *,
    sequence_length: int,
    batch_size: int,
    steps: int,
) -> Iterator[Way]:
    """Times the training step, every way to split the experts over a mesh of all devices, in each number of chunks.

    Args:
      model: the decoder's shape.
      spec: of the mesh.
      plan: a key of `parallel.STRATEGIES`.
      chunks: which numbers of them, where tokens are sent.
      sequence_length: tokens in a row.
      batch_size: of a part of the batch, in examples.
      steps: timed steps, after three to warm up.

    Raises:
      UserError: a model without experts, a mesh that can't divide it, or rows that the chunks can't divide.
    """
    if model.experts is None:
        raise UserError("this preset has no experts: name one that has, such as moe-300m")
    with user_values():
        mesh = spec.make()
        layouts = [
            parallel.Layout(mesh, parallel.strategy(plan, experts=axes or ("expert",), expert_chunks=each))
            for axes in ways_to_split(dict(mesh.shape), model.experts)
            for each in (chunks if axes else [1])
        ]
        for layout in layouts:
            layout.order(sequence_length)  # refuses rows that the chunks can't divide, before anything is timed
    for layout in layouts:
        with user_values():
            rows = batch_size * layout.batch_shards
            loop = prepare(model, sequence_length=sequence_length, batch_size=rows, layout=layout)
        loop, seconds = loop.median_seconds(steps)
        yield Way(layout.strategy.experts, layout.strategy.expert_chunks, seconds, loop.session.peak_bytes)


def ways_table(title: str, ways: Sequence[Way]) -> Table:
    """The ways, the fastest first."""
    table = Table("strategy.experts", "strategy.expert_chunks", "ms a step", "GiB", title=title)
    for way in sorted(ways, key=lambda way: way.step_seconds):
        seconds, memory = f"{1e3 * way.step_seconds:,.1f}", f"{way.peak_bytes / 2**30:.1f}"
        table.add_row(", ".join(way.experts), str(way.chunks), seconds, memory)
    return table


def keep(
    path: Path, preset: str, spec: parallel.MeshSpec, plan: str, rows: dict[str, int], ways: Sequence[Way]
) -> None:
    """Writes what was measured, and of what, as JSON: the fastest first."""
    ordered = sorted(ways, key=lambda way: way.step_seconds)
    of = {"preset": preset, "mesh": str(spec), "strategy": plan, **rows}
    devices = {"devices": jax.device_count(), "device_kind": jax.devices()[0].device_kind}
    replace_json(path, of | devices | {"ways": [way._asdict() for way in ordered]})
