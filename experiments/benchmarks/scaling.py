"""What several devices give, beside one of them in the same session: `crescendo benchmark scaling`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from rich.table import Table

from crescendo import parallel
from crescendo.experiments.benchmarks.profile import is_collective, overlap, spans_of_gpu, trace
from crescendo.experiments.benchmarks.steps import Loop, prepare
from crescendo.experiments.runtime.errors import user_values
from crescendo.models import ModelConfig
from crescendo.parallel.collectives import traffic


class Kind(NamedTuple):
    """One way to use several devices: the mesh's axis that takes all of them, and the strategy.

    Attributes:
      axis: of the mesh.
      strategy: a key of `crescendo.parallel.STRATEGIES`.
      ulysses: whether heads are split along `sequence`, where the axis is that one.
    """

    axis: str
    strategy: str
    ulysses: bool = False


KINDS = {
    "data": Kind("data", "data"),
    "zero1": Kind("fsdp", "zero1"),
    "zero2": Kind("fsdp", "zero2"),
    "fsdp": Kind("fsdp", "fsdp"),
    "tensor": Kind("tensor", "fsdp"),
    "ring": Kind("sequence", "fsdp"),
    "ulysses": Kind("sequence", "fsdp", ulysses=True),
    "stage": Kind("stage", "fsdp"),
}


def layout_of(kind: Kind, devices: Sequence[jax.Device]) -> parallel.Layout:
    """All the devices along the kind's axis."""
    spec = parallel.MeshSpec(**({"data": 1} | {kind.axis: len(devices)}))
    ulysses = len(devices) if kind.ulysses else 1
    return parallel.Layout(spec.make(devices), parallel.strategy(kind.strategy, ulysses=ulysses))


class Communication(NamedTuple):
    """What a profile says of the collectives of a step, on the first device.

    Attributes:
      seconds: while a collective ran.
      exposed_seconds: while one ran and nothing else did.
    """

    seconds: float
    exposed_seconds: float


def communication(loop: Loop, steps: int = 4) -> Communication | None:
    """Profiles a few steps; None where the profile has no streams of a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        trace(loop, steps, Path(folder))
        spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by whether it is a collective
        for span in spans_of_gpu(Path(folder)):
            spans[is_collective(span.kernel)].append((span.begin, span.end))
    if not any(spans.values()):
        return None
    total, exposed = overlap(spans[True], spans[False])
    return Communication(1e-9 * total / steps, 1e-9 * exposed / steps)


def sent_bytes(loop: Loop, examples: int) -> float:
    """What a device sends in a step of so many examples, as the compiled program says."""
    sent = traffic(loop.session.step.as_text() or "", microbatches=loop.session.plan.microbatches(examples))
    return sum(kind.sent_bytes for kind in sent.values())


def scaling_table(
    model: ModelConfig, kinds: Sequence[str], *, sequence_length: int, batch_size: int, steps: int, profile: bool
) -> Table:
    """Each kind over all devices, beside one device: the same examples for every part of the batch (weak scaling).

    `tensor`, `ring`, `ulysses` and `stage` split no examples, so they take the batch of one device. What stages send is
    not counted: their program doesn't say how often its conditions are met.

    Args:
      model: the decoder's shape.
      kinds: keys of `KINDS`.
      sequence_length: tokens in a row.
      batch_size: of one device, in examples.
      steps: timed steps.
      profile: whether to measure the time in collectives, and its part that nothing hides.
    """
    devices = jax.devices()
    layouts = {"one device": layout_of(KINDS["data"], devices[:1])} | {
        kind: layout_of(KINDS[kind], devices) for kind in kinds
    }
    title = f"{len(devices)} x {devices[0].device_kind}, rows of {sequence_length}, {batch_size} a part of the batch"
    columns = ["kind", "batch", "ms a step", "tokens/s", f"of {len(devices)} x one", "sent, MB", "collectives, ms"]
    table = Table(*columns, "not hidden, ms", "GiB", "microbatch", title=title)
    alone = None
    for name, layout in layouts.items():
        examples = batch_size * layout.batch_shards
        with user_values():
            loop = prepare(model, sequence_length=sequence_length, batch_size=examples, layout=layout)
        loop, step_seconds = loop.median_seconds(steps)
        tokens_per_second = examples * sequence_length / step_seconds
        alone = alone or tokens_per_second
        sent = "-" if layout.sizes["stage"] > 1 else f"{sent_bytes(loop, examples) / 1e6:,.0f}"
        seen = communication(loop) if profile else None
        table.add_row(
            name,
            str(examples),
            f"{1e3 * step_seconds:,.1f}",
            f"{tokens_per_second:,.0f}",
            "-" if name == "one device" else f"{tokens_per_second / alone / len(devices):.1%}",
            sent,
            f"{1e3 * seen.seconds:.1f}" if seen else "-",
            f"{1e3 * seen.exposed_seconds:.1f}" if seen else "-",
            f"{loop.session.peak_bytes / 2**30:.1f}",
            str(loop.session.plan.microbatch_examples),
        )
    return table
