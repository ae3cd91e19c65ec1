"""A model over a mesh: memory, traffic and the compiler's own word."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from crescendo import optim, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.planning.activations import activation_bytes, slot_bytes
from crescendo.experiments.planning.experts import experts_table
from crescendo.experiments.planning.fitting import ACTIVATIONS, fit
from crescendo.experiments.runtime.errors import user_values
from crescendo.experiments.runtime.hardware import KnownDevice, named_device
from crescendo.experiments.trainer.compilation import peak_bytes
from crescendo.experiments.trainer.session import Session
from crescendo.models import ModelConfig
from crescendo.models.low_precision import weight_dtype
from crescendo.parallel.collectives import traffic
from crescendo.parallel.costs import Work, moved_bytes, step_traffic
from crescendo.parallel.schedules import Schedule
from crescendo.parallel.tables import describe_sharding, device_bytes, memory_table, traffic_table

Tree = Any


def step_work(config: ModelConfig, plan: parallel.BatchPlan, sequence_length: int) -> Work:
    """What a step of a decoder, decided for its platform, works on when the plan's largest batch is cut.

    >>> config = ModelConfig.preset("debug").for_platform("cpu")
    >>> step_work(config, parallel.BatchPlan(8, 2), 64).compute_bytes
    4
    """
    return Work(
        microbatches=plan.max_microbatches,
        examples=plan.microbatch_examples,
        sequence_length=sequence_length,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_width=config.head_size,
        compute_bytes=jnp.dtype(config.dtype).itemsize,
        weight_bytes=jnp.dtype(weight_dtype(config.matmul, config.dtype)).itemsize,
        quantised=config.matmul != "dtype",
        full_remat=config.remat == "full",
        shared_layers=config.shared_layers,
        sparse_layers=config.sparse_layers,
        experts_per_token=config.experts_per_token,
        shared_expert=config.shared_expert_width is not None,
    )


def planned_session(
    model: ModelConfig,
    layout: parallel.Layout,
    *,
    batch_size: int,
    microbatches: int,
    sequence_length: int,
    platform: str,
) -> tuple[Session, parallel.BatchPlan, Work]:
    """A session of random tokens over the mesh, how its batch is cut, and what a step of it works on.

    Args:
      model: the decoder's shape.
      layout: mesh and strategy.
      batch_size: global, in examples.
      microbatches: how many make a batch.
      sequence_length: tokens in a row.
      platform: "gpu" or "tpu".

    Raises:
      UserError: a batch, or a model, that the mesh can't divide.
    """
    with user_values():
        bound = batch_size // microbatches
        plan = parallel.plan_batches([batch_size], layout.batch_shards, bound, stages=layout.sizes["stage"])
    session = Session(
        data=RandomText(model.vocab_size, sequence_length),
        model=model,
        optimizer=optim.adamw(1e-3),
        batch_size=batch_size,
        total_examples=2**31 - 1,
        mesh=layout.mesh,
        strategy=layout.strategy,
        platform=platform,
    )
    return session, plan, step_work(model.for_platform(session.platform), plan, sequence_length)


def session_memory(session: Session, plan: parallel.BatchPlan, device: KnownDevice | None = None) -> dict[str, float]:
    """What a device holds in bytes, part by part, by our own count; `device` as `activation_bytes` takes it."""
    state, shardings, layout = session.abstract_state, session.shardings, session.layout
    logical_axes = session.task.logical_axes()
    parts = {
        "parameters, float32": float(device_bytes(state.parameters, shardings.parameters)),
        "optimizer state": float(device_bytes(state.opt_state, shardings.opt_state)),
        "gradients, float32": float(device_bytes(state.parameters, layout.gradients(logical_axes))),
        ACTIVATIONS: activation_bytes(session, plan, device),
    }
    if layout.expert_axes:
        parts["room for other devices' tokens"] = slot_bytes(session, plan)
    if layout.schedule is not None and layout.schedule.chunks > 1:
        trees = (state.parameters, shardings.parameters)
        layers = (layout.pipeline(logical_axes).layered, *trees)
        stacked = [pair for layered, *pair in zip(*map(jax.tree.leaves, layers), strict=True) if layered]
        parts["layers in the order of the stages' work"] = float(device_bytes(*map(list, zip(*stacked, strict=True))))
    return parts


def stages_line(
    layout: parallel.Layout, schedule: Schedule, plan: parallel.BatchPlan, arrays: Tree, logical_axes: Tree
) -> str:
    """What a schedule costs: idle time, what is kept, and what moves to the stages whose work it is."""
    m, chunks = plan.max_microbatches, f" of {schedule.chunks} chunks each" if schedule.chunks > 1 else ""
    skipped = f" ({1 - 1 / schedule.one_of:.0%} skipped)" if schedule.one_of > 1 else ""
    line = (
        f"{schedule.stages} stages{chunks}{skipped}, {schedule.name}: {schedule.idle_share(m):.0%} of the time is "
        f"idle, the inputs of {schedule.kept(m)} passes are kept"
    )
    if not (moved := moved_bytes(layout, arrays, logical_axes)):
        return line
    return f"{line}, {moved / 2**30:.3f} GiB of layers and gradients move among the stages in a step"


def describe_mesh(
    console: Console,
    model: ModelConfig,
    layout: parallel.Layout,
    *,
    batch_size: int,
    microbatches: int,
    sequence_length: int,
    devices: Sequence[jax.Device] = (),
    device: str | None = None,
) -> None:
    """Prints every array's place, the memory of a device and the traffic of a step.

    Args:
      console: where.
      model, layout, batch_size, microbatches, sequence_length: see `planned_session`.
      devices: those of the mesh, to compile the step for; none: nothing is compiled.
      device: the kind of the mesh's devices, to say whether it fits; None: that isn't said.

    Raises:
      UserError: a batch, or a model, that the mesh can't divide.
    """
    begin, named = time.perf_counter(), None if device is None else named_device(device)
    gpu = named.platform == "gpu" if named is not None else bool(devices) and devices[0].platform in ("cuda", "gpu")
    session, plan, work = planned_session(
        model,
        layout,
        batch_size=batch_size,
        microbatches=microbatches,
        sequence_length=sequence_length,
        platform="gpu" if gpu else "tpu",
    )
    layout, arrays, axes = session.layout, session.parameters, session.task.logical_axes()
    table, warnings = describe_sharding(arrays, axes, layout)
    console.print(table)
    for warning in warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(arrays))
    console.print(
        f"{parameters:,} parameters; a batch of {batch_size} rows of {sequence_length} tokens in "
        f"{plan.max_microbatches} microbatch(es) of {plan.microbatch_examples}",
        highlight=False,
        soft_wrap=True,
    )
    if (schedule := layout.schedule) is not None:
        console.print(stages_line(layout, schedule, plan, arrays, axes), highlight=False, soft_wrap=True)
    parts = session_memory(session, plan, named)
    console.print(memory_table(parts))
    if named is not None:
        console.print(fit(parts, named.memory_bytes, named.device_kind), highlight=False, soft_wrap=True)
    console.print(traffic_table("a step, in closed form", step_traffic(layout, arrays, axes, work)))
    if (splits := experts_table(session, work, named)) is not None:
        console.print(splits)
    if devices:
        console.print(f"compiling for {len(devices)} x {devices[0].device_kind} ...", highlight=False)
        compiled = session.lower(plan, implementation="xla").compile()
        if schedule is None:  # the program doesn't say how often a tick's conditions are met
            sent = traffic(compiled.as_text() or "", microbatches=plan.max_microbatches)
            console.print(
                traffic_table(
                    "a step, by the compiled program",
                    {kind: t.sent_bytes for kind, t in sent.items()},
                    {kind: t.count for kind, t in sent.items()},
                )
            )
        peak = peak_bytes(compiled) / 2**30
        console.print(f"{peak:.3f} GiB a device at the peak, by the compiler's count", highlight=False)
    console.print(f"in {time.perf_counter() - begin:.0f} s", highlight=False)
